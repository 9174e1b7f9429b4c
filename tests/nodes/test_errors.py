"""Bad input: every node says what came, what was expected and what to do, before anything is computed."""

import pytest
import torch

from wan_core.presets import TRANSFORMERS
from wan_core.weights import expected_shapes, save_weights


@pytest.mark.parametrize(("sizes", "message"), [
    ({"width": 100}, "width is 100 pixels; it must be a multiple of 16. Use 96."),
    ({"height": 8}, "height is 8 pixels.*Use 16"),
    ({"length": 80}, "frames is 80; it must be 4n \\+ 1. Use 81."),
])
def test_sizes_off_the_grid(call, sizes, message):
    """Promise: a size that the model cannot make is refused with the nearest one that it can."""
    with pytest.raises(ValueError, match=message):
        call("WanCoreEmptyLatent", **sizes)


def test_empty_prompt(call, nano):
    """Promise: an empty prompt is refused; an empty negative prompt is not."""
    with pytest.raises(ValueError, match="the prompt is empty"):
        call("WanCoreTextEncode", clip=nano["clip"], positive=" \n", negative="blurred")
    call("WanCoreTextEncode", clip=nano["clip"], positive="red", negative="")


def test_official_negative(call, nano):
    """Promise: a blank negative prompt is the official one of the encoder's models unless switched off."""
    class Recorder:
        """A text encoder from elsewhere, which knows nothing of presets."""

        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return [[tokens, {}]]

    def negative(clip, **changes):
        return call("WanCoreTextEncode", clip=clip, positive="red", **changes)[1][0][0]

    assert negative(Recorder()).startswith("色调艳丽") and negative(Recorder(), official_negative=False) == ""
    assert negative(Recorder(), negative="blurred") == "blurred"
    assert torch.equal(negative(nano["clip"]), nano["clip"].encode(""))


@pytest.mark.parametrize(("changes", "message"), [
    ({"latent": {"samples": torch.zeros(1, 4, 8, 8)}}, "latents have shape.*same family"),
    ({"latent": {"samples": torch.zeros(1, 16, 2, 5, 4)}}, "multiples of 16"),
    ({"latent": {"samples": torch.zeros(1, 16, 2, 4, 4), "noise_mask": torch.ones(1)}}, "noise mask"),
    ({"steps": 0}, "steps must be a whole number from 1"),
    ({"steps": 3, "start_step": 3}, "hold no step"),
    ({"sigmas": torch.zeros(0)}, "sigmas must be a list of at least 2"),
    ({"positive": [[torch.zeros(1, 4, 4096), {}]]}, "encoded to a width of 4096"),
    ({"negative": []}, "negative is an empty conditioning"),
    ({"positive": [[torch.ones(1, 4, 96), {"start_percent": 0.5}]]}, "no prompt is active at sigma"),
])
def test_sampler_refuses(call, nano, changes, message):
    """Promise: what does not fit the model, and settings that make no run, are refused before weights are read."""
    model, = call("WanCoreModelLoader")
    inputs = {"model": model, "positive": nano["positive"], "negative": nano["negative"], "steps": 2,
              "latent": {"samples": torch.zeros(1, 16, 2, 4, 4)}, **changes}
    with pytest.raises(ValueError, match=message):
        call("WanCoreSampler", **inputs)
    assert model.placement._held is None


def test_decode_refuses_another_familys_vae(call, nano):
    """Promise: a latent of one family and the VAE of another are refused, both named."""
    samples = {"samples": torch.zeros(1, 16, 1, 4, 4), "wan_vae": "wan21_vae"}
    with pytest.raises(ValueError, match="wan_nano_vae.*Load wan21_vae"):
        call("WanCoreDecode", samples=samples, vae=nano["vae"])
    with pytest.raises(ValueError, match="latent has shape"):
        call("WanCoreDecode", samples={"samples": torch.zeros(1, 4, 8, 8)}, vae=nano["vae"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": torch.zeros(2, 33, 32, 3)}, "even width and height"),
    ({"images": torch.zeros(2, 32, 32)}, "frames have shape"),
    ({"filename_prefix": "../../escaped"}, "leads out of the output folder"),
    ({"filename_prefix": "/tmp/escaped"}, "leads out of the output folder"),
])
def test_save_video_refuses(call, workspace, changes, message):
    """Promise: frames that no video can be made of and names outside the output folder; nothing is written."""
    with pytest.raises(ValueError, match=message):
        call("WanCoreSaveVideo", **{"images": torch.zeros(2, 32, 32, 3), **changes})
    assert not list(workspace.rglob("*.mp4")) and not list(workspace.parent.rglob("escaped*"))


@pytest.mark.parametrize("name", ["missing.safetensors", "../secret.safetensors", "nano/none.safetensors"])
def test_files_that_are_not_there(call, workspace, name):
    """Promise: a name that is not in the list, or leads out of the models folder, is refused."""
    save_weights(workspace / "secret.safetensors", {"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="there is no .*Put it there"):
        call("WanCoreModelLoader", model=name)


def test_wrong_kinds_of_files(call, nano):
    """Promise: a VAE in the model loader, an expert that does not match, an impossible tile are refused by name."""
    with pytest.raises(ValueError, match="wan21_t2v_14b"):
        call("WanCoreModelLoader", preset="wan21_t2v_14b")
    with pytest.raises(ValueError, match="multiple of 8"):
        call("WanCoreVAELoader", tile_size=100)
    with pytest.raises(ValueError, match="more than half of the tile"):
        call("WanCoreVAELoader", tile_size=64, tile_overlap=64)


def test_foreign_file(call, workspace):
    """Promise: a file that is no transformer is refused with what it seems to be."""
    folder = workspace / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save_weights(folder / "odd.safetensors", {"first_stage_model.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="odd.safetensors seems to be a complete Stable Diffusion checkpoint"):
        call("WanCoreModelLoader", model="odd.safetensors")


def test_incomplete_file(call, workspace):
    """Promise: a model that lacks a tensor is refused by its loader, not after the prompt has been encoded."""
    folder = workspace / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    shapes = expected_shapes(TRANSFORMERS["nano_t2v"])
    del shapes["head.head.bias"]
    save_weights(folder / "cut.safetensors", {name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match="cut.safetensors does not fit .*missing tensors: head.head.bias"):
        call("WanCoreModelLoader", model="cut.safetensors")


def test_swapped_experts_are_noticed(call, caplog):
    """Promise: experts whose names say the opposite of where they are plugged in cause a warning."""
    high, low = (f"nano/wan_nano_t2v_{name}_noise.safetensors" for name in ("high", "low"))
    call("WanCoreExpertPairLoader", high_noise=high, low_noise=low)
    assert not caplog.records
    call("WanCoreExpertPairLoader", high_noise=low, low_noise=high)
    assert "seem to be swapped" in caplog.text
