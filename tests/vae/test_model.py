"""Both VAEs against the official code and diffusers, their latent statistics, and what they refuse."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.golden_cases import load_case
from tests.vae.small import SMALL, randn, random_latents, random_vae, random_video
from wan_core.presets import VAES, VAESpec
from wan_core.vae import LatentStats, WanVAE
from wan_core.vae.layers import Stream

ROOTS = {"conv1": "quant_conv", "conv2": "post_quant_conv", "conv1_in": "conv_in", "head.0": "norm_out",
         "head.2": "conv_out", "middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0",
         "middle.2": "mid_block.resnets.1"}
PARTS = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
         "shortcut": "conv_shortcut"}


def diffusers_name(name: str, spec: VAESpec) -> str:
    """Our (the official) parameter name in diffusers' AutoencoderKLWan.

    Its blocks are flat in the Wan 2.1 encoder as ours; elsewhere they are grouped by level, with the resampling apart.
    """
    stem, leaf = name.rsplit(".", 1)
    for old, new in PARTS.items():
        stem = re.sub(rf"{re.escape(old)}$", new, stem)
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(.+)", stem):
        where = "downsampler" if int(match[2]) == spec.num_res_blocks else f"resnets.{match[2]}"
        return f"encoder.down_blocks.{match[1]}.{where}.{match[3]}.{leaf}"
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", stem):
        return f"encoder.down_blocks.{match[1]}.{match[2]}.{leaf}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.(.+)", stem):
        where = "upsampler" if int(match[2]) == spec.num_res_blocks + 1 else f"resnets.{match[2]}"
        return f"decoder.up_blocks.{match[1]}.{where}.{match[3]}.{leaf}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", stem):
        group, index = divmod(int(match[1]), spec.num_res_blocks + 2)
        where = "upsamplers.0" if index == spec.num_res_blocks + 1 else f"resnets.{index}"
        return f"decoder.up_blocks.{group}.{where}.{match[2]}.{leaf}"
    if "." not in stem:
        return f"{ROOTS[stem]}.{leaf}"
    half, part = stem.split(".", 1)
    match = re.fullmatch(r"(conv1|head\.\d|middle\.\d)(.*)", part)
    return f"{half}.{ROOTS['conv1_in' if match[1] == 'conv1' else match[1]]}{match[2]}.{leaf}"


def diffusers_vae(vae: WanVAE) -> AutoencoderKLWan:
    """diffusers' class with the weights of `vae`."""
    spec = vae.spec
    family = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2} if "22" in spec.kind else {}
    oracle = AutoencoderKLWan(
        base_dim=spec.dim, decoder_base_dim=spec.decoder_dim, z_dim=spec.z_dim, dim_mult=list(spec.dim_mult),
        num_res_blocks=spec.num_res_blocks, temperal_downsample=list(spec.temporal_downsample),
        scale_factor_spatial=spec.spatial_stride, **family).eval()
    oracle.load_state_dict({diffusers_name(name, spec): value for name, value in vae.state_dict().items()})
    return oracle


@pytest.fixture(scope="module", params=SMALL)
def case(request):
    return load_case(f"vae_{request.param}")


@pytest.fixture(scope="module")
def official(case) -> WanVAE:
    config = case.config
    known = VAES["wan22_vae" if "dec_dim" in config else "wan21_vae"]
    vae = WanVAE(replace(known, dim=config["dim"], decoder_dim=config.get("dec_dim", config["dim"]),
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


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("change", [
    {"decoder_dim": 12},
    {"num_res_blocks": 2, "dim_mult": (1, 1, 2, 2), "temporal_downsample": (True, False, True)}])
def test_equals_diffusers(kind, change):
    """Random weights, other widths and depths and a batch: encode and decode within 1e-4 of diffusers' class."""
    vae = random_vae(replace(SMALL[kind], **change))
    oracle = diffusers_vae(vae)
    video, latents = random_video(vae.spec, 13, 3, 5, batch=2), random_latents(vae.spec, 3, 3, 5, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(video), oracle.encode(video).latent_dist.mode(), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(latents), oracle.decode(latents).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_equal_those_of_diffusers(kind):
    """Training on a clip as one piece: gradients of pixels and of all weights, encoded and decoded, as in diffusers."""
    vae = random_vae(SMALL[kind]).requires_grad_(True)
    oracle, spec = diffusers_vae(vae), vae.spec
    videos = [random_video(spec, 9, 2, 2).requires_grad_(True) for _ in range(2)]
    latents = vae.encode_piece(videos[0], Stream(whole=True))
    vae.decode_piece(latents, Stream(whole=True)).clamp(-1, 1).square().mean().backward()
    oracle.decode(oracle.encode(videos[1]).latent_dist.mode()).sample.square().mean().backward()
    expected = dict(oracle.named_parameters())
    pairs = [(parameter.grad, expected[diffusers_name(name, spec)].grad) for name, parameter in vae.named_parameters()]
    for ours, theirs in [(videos[0].grad, videos[1].grad), *pairs]:
        assert ours.abs().sum() > 0
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7


@pytest.mark.parametrize("kind", SMALL)
def test_bf16_stays_near_fp32(kind):
    """Latents and pixels computed in bf16 are within 2e-2 relative of fp32 and come back in fp32."""
    vae = random_vae(SMALL[kind])
    video, latents = random_video(vae.spec, 9, 4, 4), random_latents(vae.spec, 3, 4, 4)
    exact = vae.encode(video), vae.decode(latents)
    vae.bfloat16()
    for rounded, expected in zip((vae.encode(video), vae.decode(latents)), exact, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("kind", SMALL)
def test_normalised_latents_have_mean_zero_and_come_back(kind):
    """normalise is (z - mean) / std per channel, restore its inverse, for latents and for single frames."""
    stats = LatentStats.of(VAES[f"{kind}_vae"])
    mean, std = torch.tensor(stats.mean), torch.tensor(stats.std)
    for shape in ((2, len(mean), 3, 4, 5), (1, len(mean), 4, 5)):
        latents = randn(*shape)
        columns = [value.view(1, -1, *[1] * (len(shape) - 2)) for value in (mean, std)]
        torch.testing.assert_close(stats.normalise(latents), (latents - columns[0]) / columns[1])
        torch.testing.assert_close(stats.restore(stats.normalise(latents)), latents)
    with pytest.raises(ValueError, match=f"4 channels, the model's VAE {len(mean)}"):
        stats.normalise(torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.parametrize(("kind", "shape", "message"), [
    ("wan21", (1, 3, 4, 16, 16), "4 frames; the VAE takes 4n \\+ 1. Use 1 frames"),
    ("wan22", (1, 3, 16, 16, 16), "16 frames.*Use 13 frames"),
    ("wan21", (1, 3, 0, 16, 16), "0 frames"),
    ("wan21", (1, 3, 5, 20, 16), "16x20 pixels; width and height must be multiples of 8"),
    ("wan22", (1, 3, 5, 32, 24), "24x32 pixels; width and height must be multiples of 16"),
    ("wan22", (1, 3, 5, 16, 0), "0x16 pixels"),
    ("wan22", (1, 4, 5, 16, 16), r"\[1, 4, 5, 16, 16\]; expected \[batch, 3"),
    ("wan21", (3, 5, 16, 16), r"\[3, 5, 16, 16\]; expected \[batch, 3"),
])
def test_videos_that_do_not_fit_are_refused(kind, shape, message):
    """Frames that are not 4n + 1, sizes off the grid and other channels are errors, and nothing is dropped silently."""
    with pytest.raises(ValueError, match=message):
        random_vae(SMALL[kind]).encode(torch.zeros(shape), on_piece=lambda: pytest.fail("a piece was encoded"))


@pytest.mark.parametrize(("kind", "shape"), [
    ("wan21", (1, 48, 2, 2, 2)), ("wan22", (1, 16, 2, 2, 2)), ("wan21", (16, 2, 2, 2)), ("wan22", (1, 48, 0, 2, 2))])
def test_latents_that_do_not_fit_are_refused(kind, shape):
    """Latents of another family, without a batch or without frames are errors that name the expected shape."""
    with pytest.raises(ValueError, match=rf"this VAE decodes \[batch, {SMALL[kind].z_dim}, frames"):
        random_vae(SMALL[kind]).decode(torch.zeros(shape), on_piece=lambda: pytest.fail("a piece was decoded"))


@pytest.mark.parametrize("kind", SMALL)
def test_buffers_that_do_not_fit_are_refused(kind):
    """A frame buffer of another shape is an error that names both shapes."""
    vae = random_vae(SMALL[kind])
    side = 2 * vae.spec.spatial_stride
    with pytest.raises(ValueError, match=rf"\[1, 3, 8, {side}, {side}\]; these latents decode to \[1, 3, 9, {side}"):
        vae.decode(random_latents(vae.spec, 3, 2, 2), out=torch.zeros(1, 3, 8, side, side))
