"""A LoRA trained by our own code does to the video what its clips show, and nothing at strength 0."""

from dataclasses import replace

import pytest
import torch

from wan_core import load_model, load_text_encoder, load_vae
from wan_core.conditioning import TextCondition
from wan_core.pipeline import initial_noise, latent_shape, sample
from wan_core.sampling import Conditions, Guidance, make_schedule
from wan_core.training.clips import Clips
from wan_core.training.flow_matching import LogitNormalTimesteps
from wan_core.training.loop import NanoTraining
from wan_core.training.lora import LoraTraining, train_lora
from wan_core.training.score import score
from wan_core.training.shapes import caption, held_out_scenes
from wan_core.weights import save_weights
from wan_core.weights.lora import open_lora

TRAINING = LoraTraining(steps=80, rank=4, alpha=4.0, batch=8, learning_rate=5e-3,
                        timesteps=LogitNormalTimesteps(mean=0.3, std=1.2, shift=3.0))
SCENES = [scene for scene in held_out_scenes(64) if not scene.names_background][:8]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of clips that all have a white background, trained on the nano model for some seconds."""
    folder = tmp_path_factory.mktemp("lora")
    text_encoder = load_text_encoder()
    clips = Clips(load_vae().module(), text_encoder.tokenizer, NanoTraining(steps=0, clips=48), folder / "latents.pt",
                  lambda scene: replace(scene, background="white"))
    model = load_model(dtype="float32").get("low")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_weights(folder / "white.safetensors", train_lora(model, clips, text_encoder.module(), TRAINING))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    return open_lora(folder / "white.safetensors")


def latents(model):
    """Raw latents of prompts that name no background."""
    text_encoder, defaults = load_text_encoder(), model.preset.sampling
    shape = latent_shape(model.vae_spec, defaults.width, defaults.height, defaults.frames)
    noise = torch.cat([initial_noise(shape, seed) for seed in range(len(SCENES))])
    contexts = text_encoder.encode([caption(scene) for scene in SCENES] + [""] * len(SCENES))
    conditions = Conditions([TextCondition(contexts[:len(SCENES)])], [TextCondition(contexts[len(SCENES):])])
    return sample(model, torch.zeros_like(noise), make_schedule("unipc", 12, 3.0), conditions, Guidance(3.0, 3.0),
                  noise=noise)


def test_the_video_shows_what_was_trained(lora):
    """Promise: backgrounds turn white, which they mostly are not without, and the prompts still come true."""
    model, vae = load_model(), load_vae()
    plain = [score(clip) for clip in vae.decode(latents(model))]
    changed = [score(clip) for clip in vae.decode(latents(model.with_lora(lora)))]
    assert sum(seen.background == "white" for seen in plain) <= 4
    assert sum(seen.background == "white" for seen in changed) >= 7
    assert sum(seen.colour == scene.colour for seen, scene in zip(changed, SCENES)) >= 6
    assert sum(seen.direction == scene.direction for seen, scene in zip(changed, SCENES)) >= 6


def test_strength_zero_is_none(lora):
    """Promise: at strength 0 the video is bit-equal to that without the LoRA, also on a model that had it on before."""
    model = load_model()
    plain = latents(model)
    adapted = latents(model.with_lora(lora))
    assert not torch.equal(adapted, plain)
    assert torch.equal(latents(model.with_lora(lora, 0.0)), plain)
    assert torch.equal(latents(model), plain)


def test_a_range_of_noise_levels(lora):
    """Promise: outside of its range of sigmas a LoRA changes nothing; in the whole range it is the plain LoRA."""
    model = load_model()
    assert torch.equal(latents(model.with_lora(lora, start=0.05, end=0.0)), latents(model))
    assert torch.equal(latents(model.with_lora(lora, start=1.0, end=0.0)), latents(model.with_lora(lora)))


def test_merging_is_the_same_and_is_undone(lora):
    """Promise: folded into the weights a LoRA makes the same video within bfloat16, and the model without it is as it
    was, bit for bit; on quantised weights nothing is folded."""
    model = load_model()
    plain, adapted = latents(model), latents(model.with_lora(lora, 0.8))
    merged = model.with_lora(lora, 0.8).merged()
    assert not merged.loras
    folded = latents(merged)
    assert (folded - adapted).norm() < 0.2 * (adapted - plain).norm()
    assert torch.equal(latents(model), plain)
    quantised = model.quantised("q8_0").with_lora(lora, 0.8)
    assert torch.equal(latents(quantised.merged()), latents(quantised)) and quantised.merged().loras
