"""The Wan 2.1 VAE against the official code and diffusers, its latent statistics, and what it refuses."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.golden_cases import load_case
from tests.vae.small import SMALL, randn, random_vae
from wan_core.presets import VAES
from wan_core.vae import LatentStats, WanVAE

ROOTS = {"conv1": "quant_conv", "conv2": "post_quant_conv", "conv1_in": "conv_in", "head.0": "norm_out",
         "head.2": "conv_out", "middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0",
         "middle.2": "mid_block.resnets.1"}
PARTS = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
         "shortcut": "conv_shortcut"}


def diffusers_name(name: str, num_res_blocks: int) -> str:
    """Our (the official) parameter name in diffusers' AutoencoderKLWan: the encoder is flat there, too, the decoder
    has an upsampling after every group of num_res_blocks + 1 residual blocks."""
    stem, leaf = name.rsplit(".", 1)
    for old, new in PARTS.items():
        stem = re.sub(rf"{re.escape(old)}$", new, stem)
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", stem):
        return f"encoder.down_blocks.{match[1]}.{match[2]}.{leaf}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", stem):
        group, index = divmod(int(match[1]), num_res_blocks + 2)
        where = "upsamplers.0" if index == num_res_blocks + 1 else f"resnets.{index}"
        return f"decoder.up_blocks.{group}.{where}.{match[2]}.{leaf}"
    if "." not in stem:
        return f"{ROOTS[stem]}.{leaf}"
    half, part = stem.split(".", 1)
    match = re.fullmatch(r"(conv1|head\.\d|middle\.\d)(.*)", part)
    return f"{half}.{ROOTS['conv1_in' if match[1] == 'conv1' else match[1]]}{match[2]}.{leaf}"


@pytest.fixture(scope="module")
def case():
    return load_case("vae_wan21")


@pytest.fixture(scope="module")
def official(case) -> WanVAE:
    config = case.config
    vae = WanVAE(replace(VAES["wan21_vae"], dim=config["dim"], decoder_dim=config["dim"], z_dim=config["z_dim"],
                         dim_mult=tuple(config["dim_mult"]), num_res_blocks=config["num_res_blocks"],
                         temporal_downsample=tuple(config["temperal_downsample"])))
    vae.load_state_dict(case.weights)
    return vae


def statistics(case) -> LatentStats:
    """Those of the case, which are not the released ones."""
    return LatentStats(tuple(case.inputs["mean"].tolist()), tuple(case.inputs["std"].tolist()))


def test_encode_equals_the_official_vae(case, official):
    """Golden case: a clip of 9 frames and its first frame alone, normalised, within 1e-4."""
    stats = statistics(case)
    video = case.inputs["video"]
    torch.testing.assert_close(stats.normalise(official.encode(video)), case.outputs["encoded"], atol=1e-4, rtol=0)
    torch.testing.assert_close(stats.normalise(official.encode(video[:, :, :1])), case.outputs["encoded_first_frame"],
                               atol=1e-4, rtol=0)


@pytest.mark.parametrize(("source", "expected"), [("latent", "decoded"), ("encoded", "decoded_of_encoded")])
def test_decode_equals_the_official_vae(case, official, source, expected):
    """Golden case: a given latent and the encoded clip decode to the official pixels, clamped, within 1e-4."""
    latents = case.inputs.get(source, case.outputs.get(source))
    pixels = official.decode(statistics(case).restore(latents))
    assert (case.outputs[expected].abs() < 1).float().mean() > 0.5  # most pixels are not clamped
    torch.testing.assert_close(pixels, case.outputs[expected].clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [
    {}, {"num_res_blocks": 2, "dim_mult": (1, 1, 2), "temporal_downsample": (True, True), "spatial_stride": 4}])
def test_equals_diffusers(change):
    """Random weights, another depth and other shapes: encode and decode within 1e-4 of diffusers' class."""
    spec = replace(SMALL, **change)
    vae = random_vae(spec)
    oracle = AutoencoderKLWan(
        base_dim=spec.dim, z_dim=spec.z_dim, dim_mult=list(spec.dim_mult), num_res_blocks=spec.num_res_blocks,
        temperal_downsample=list(spec.temporal_downsample), scale_factor_spatial=spec.spatial_stride).eval()
    oracle.load_state_dict({diffusers_name(name, spec.num_res_blocks): value
                            for name, value in vae.state_dict().items()})
    video, latents = randn(2, 3, 13, 24, 40).clamp(-1, 1), randn(2, spec.z_dim, 3, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(video), oracle.encode(video).latent_dist.mode(), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(latents), oracle.decode(latents).sample, atol=1e-4, rtol=0)


def test_bf16_stays_near_fp32():
    """Latents and pixels computed in bf16 are within 2e-2 relative of fp32 and come back in fp32."""
    vae = random_vae()
    video, latents = randn(1, 3, 9, 32, 32).clamp(-1, 1), randn(1, 16, 3, 4, 4)
    exact = vae.encode(video), vae.decode(latents)
    vae.bfloat16()
    for rounded, expected in zip((vae.encode(video), vae.decode(latents)), exact, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - expected).norm() <= 2e-2 * expected.norm()


def test_normalised_latents_have_mean_zero_and_come_back():
    """normalise is (z - mean) / std per channel, restore its inverse, for latents and for single frames."""
    stats = LatentStats.of(VAES["wan21_vae"])
    mean, std = torch.tensor(stats.mean), torch.tensor(stats.std)
    for shape in ((2, 16, 3, 4, 5), (1, 16, 4, 5)):
        latents = randn(*shape)
        columns = [value.view(1, 16, *[1] * (len(shape) - 2)) for value in (mean, std)]
        torch.testing.assert_close(stats.normalise(latents), (latents - columns[0]) / columns[1])
        torch.testing.assert_close(stats.restore(stats.normalise(latents)), latents)
    with pytest.raises(ValueError, match="48 channels, the model's VAE 16"):
        stats.normalise(torch.zeros(1, 48, 1, 2, 2))


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 3, 4, 16, 16), "4 frames; the VAE takes 4n \\+ 1. Use 1 frames"),
    ((1, 3, 16, 16, 16), "16 frames.*Use 13 frames"),
    ((1, 3, 0, 16, 16), "0 frames"),
    ((1, 3, 5, 20, 16), "16x20 pixels; width and height must be multiples of 8"),
    ((1, 3, 5, 16, 0), "0x16 pixels"),
    ((1, 4, 5, 16, 16), r"\[1, 4, 5, 16, 16\]; expected \[batch, 3"),
    ((3, 5, 16, 16), r"\[3, 5, 16, 16\]; expected \[batch, 3"),
])
def test_videos_that_do_not_fit_are_refused(shape, message):
    """Frames that are not 4n + 1, sizes off the grid and other channels are errors, and nothing is dropped silently."""
    with pytest.raises(ValueError, match=message):
        random_vae().encode(torch.zeros(shape), on_piece=lambda: pytest.fail("a piece was encoded"))


@pytest.mark.parametrize("shape", [(1, 48, 2, 2, 2), (16, 2, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_that_do_not_fit_are_refused(shape):
    """Latents of another family, without a batch or without frames are errors that name the expected shape."""
    with pytest.raises(ValueError, match=r"this VAE decodes \[batch, 16, frames"):
        random_vae().decode(torch.zeros(shape), on_piece=lambda: pytest.fail("a piece was decoded"))


def test_buffers_that_do_not_fit_are_refused():
    """A frame buffer of another shape is an error that names both shapes."""
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 16, 16\]; these latents decode to \[1, 3, 9, 16, 16\]"):
        random_vae().decode(torch.zeros(1, 16, 3, 2, 2), out=torch.zeros(1, 3, 8, 16, 16))
