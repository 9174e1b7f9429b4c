"""Conditions as the official code builds them from pictures, and whole official runs with them."""

from dataclasses import replace

import pytest
import torch

from tests.golden_cases import Case, load_case
from tests.sampling.test_denoise import Experts
from wan_core.conditioning import (
    ImageChannels,
    KnownLatents,
    TextCondition,
    VaceCondition,
    encode_control,
    encode_known_frames,
)
from wan_core.presets import VAES, TransformerSpec
from wan_core.sampling import Conditions, Guidance, denoise, make_schedule
from wan_core.vae import LatentStats, WanVAE

DIT = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_heads", "num_layers", "in_dim", "out_dim")


def part(case: Case, name: str) -> dict[str, torch.Tensor]:
    """The weights of one model of a case; those of a case with a single model have no prefix."""
    weights = {key.removeprefix(f"{name}."): value for key, value in case.weights.items() if key.startswith(f"{name}.")}
    return weights or case.weights


def official_vae(case: Case, kind: str) -> WanVAE:
    config = case.config["vae"]
    spec = replace(VAES[kind], dim=config["dim"], decoder_dim=config.get("dec_dim", config["dim"]),
                   dim_mult=tuple(config["dim_mult"]), num_res_blocks=config["num_res_blocks"])
    vae = WanVAE(spec).eval()
    vae.load_state_dict(part(case, "vae"))
    return vae


def statistics(case: Case) -> LatentStats:
    """Those of the case, which are not the released ones."""
    return LatentStats(tuple(case.inputs["mean"].tolist()), tuple(case.inputs["std"].tolist()))


def test_channels_of_first_and_last_frame():
    """Golden case: mask and latents of a clip whose first and last frame are known, max abs error 1e-4."""
    case = load_case("condition_wan21_flf2v")
    first, last = (case.inputs[name][None] for name in ("first", "last"))
    known = encode_known_frames(official_vae(case, "wan21_vae").encode, case.config["frames"], first, last)
    channels = ImageChannels.of(known, statistics(case)).channels
    torch.testing.assert_close(channels[0], case.outputs["y"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["plain", "ref"])
def test_channels_of_vace(name):
    """Golden case: inactive and reactive latents and the mask, with and without a reference, max abs error 1e-4."""
    case = load_case("condition_wan21_vace")
    stats = statistics(case)
    references = [case.inputs["reference"]] if name == "ref" else []
    latents = encode_control(official_vae(case, "wan21_vae").encode, stats, 8, case.inputs["video"],
                             case.inputs["mask"], references)
    control = VaceCondition.of(latents, stats).control
    torch.testing.assert_close(control[0], case.outputs[name], atol=1e-4, rtol=0)
    assert latents.references == len(references)


def test_run_of_image_to_video_with_two_experts():
    """Golden case: channels from the picture, switch at 0.9, the latents after every step and the frames: 1e-3."""
    case = load_case("pipeline_wan22_i2v_moe")
    config, stats, vae = case.config, statistics(case), official_vae(case, "wan21_vae")
    known = encode_known_frames(vae.encode, config["frames"], case.inputs["image"][None], None)
    channels = ImageChannels.of(known, stats)
    torch.testing.assert_close(channels.channels[0], case.outputs["y"], atol=1e-4, rtol=0)
    spec = TransformerSpec(model_type="i2v", **{key: config[key] for key in DIT})
    experts = Experts(part(case, "high"), part(case, "low"), config["boundary"], spec)
    conditions = Conditions([TextCondition(case.inputs["context"][None], beside=(channels,))],
                            [TextCondition(case.inputs["context_null"][None], beside=(channels,))])
    steps = []
    result = denoise(experts, case.inputs["noise"][None], make_schedule("unipc", config["steps"], config["shift"]),
                     conditions, Guidance(config["guide_scale_high"], config["guide_scale_low"]), on_step=steps.append)
    latents = torch.stack([step.latents[0] for step in steps])
    torch.testing.assert_close(latents, case.outputs["latents"], atol=1e-3, rtol=0)
    # The case keeps the frames as they come; ours end at the limits.
    frames = vae.decode(stats.restore(result))
    torch.testing.assert_close(frames, case.outputs["video"].clamp(-1, 1), atol=1e-3, rtol=0)


def test_run_of_ti2v_from_a_picture():
    """Golden case: the first latent frame is the picture's at every step and enters at timestep 0; 1e-3."""
    case = load_case("pipeline_wan22_ti2v")
    config, stats = case.config, statistics(case)
    image = case.inputs["image"][None, :, None]
    first = stats.normalise(official_vae(case, "wan22_vae").encode(image))
    torch.testing.assert_close(first[0], case.outputs["image_latent"], atol=1e-4, rtol=0)
    noise = case.inputs["noise"][None]
    mask = torch.ones(1, 1, *noise.shape[2:])
    mask[:, :, 0] = 0
    known = KnownLatents(torch.cat([first, torch.zeros_like(noise[:, :, 1:])], 2), mask, None)
    spec = TransformerSpec(model_type="ti2v", **{key: config[key] for key in DIT})
    weights = part(case, "dit")
    conditions = Conditions([TextCondition(case.inputs["context"][None])],
                            [TextCondition(case.inputs["context_null"][None])], known)
    steps = []
    denoise(Experts(weights, weights, 2.0, spec), noise, make_schedule("unipc", config["steps"], config["shift"]),
            conditions, Guidance(config["guide_scale"], config["guide_scale"]), on_step=steps.append)
    latents = torch.stack([step.latents[0] for step in steps])
    torch.testing.assert_close(latents, case.outputs["latents"], atol=1e-3, rtol=0)
