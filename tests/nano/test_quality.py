"""The shipped nano models do what held-out prompts say, as seen in the pixels."""

import json

import pytest

from wan_core import load_experts, load_model, load_text_encoder, load_vae, nano
from wan_core.training.evaluate import evaluate
from wan_core.training.nano_vae import reconstruction_psnr

PROMPTS = 16


def test_the_vae_keeps_whole_clips():
    """Promise: 27 dB or more on whole clips outside the training stream."""
    assert reconstruction_psnr(load_vae().module(), 8) >= 27


@pytest.mark.parametrize("load", [load_model, load_experts], ids=["single", "experts"])
def test_prompts_come_true(load):
    """Promise: colour and direction right in 90 % of held-out prompts, shape in 75 %."""
    figures = evaluate(load(), load_vae(), load_text_encoder(), prompts=PROMPTS)
    assert figures.colour >= 90 and figures.direction >= 90 and figures.shape >= 75


def test_recorded_figures_meet_the_promises():
    """Promise: the figures on record (64 prompts) are above the bars; guidance and experts do no harm."""
    figures = json.loads((nano.VAE.parent / "figures.json").read_text())
    assert figures["vae_psnr_db"] >= 27
    for name in ("t2v", "t2v_experts"):
        guided, plain = figures[name], figures[f"{name}_without_guidance"]
        assert guided["prompts"] == 64
        assert guided["colour"] >= 90 and guided["direction"] >= 90 and guided["shape"] >= 75
        assert all(guided[part] >= plain[part] for part in ("colour", "direction", "shape"))


def test_the_family_is_small():
    """Promise: at most 24 MB together, at most 16 MB of them for text to video."""
    size = {path: path.stat().st_size for path in nano.VAE.parent.glob("*.safetensors")}
    assert sum(size.values()) <= 24e6
    assert sum(size[path] for path in (nano.VAE, nano.TEXT_ENCODER, nano.T2V, nano.T2V_HIGH, nano.T2V_LOW)) <= 16e6
