"""Bad input: every node says what came, what was expected and what to do, before anything is computed.

Where a model can run without what it was made for, it does, and the log says what happens instead.
"""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.small_models import SMALL, write_halves, write_hollow, write_transformer
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
    ({"latent": {"samples": torch.zeros(1, 48, 2, 4, 4)}}, r"shape \[1, 48, 2, 4, 4\]; Nano T2V takes \[batch, 16,"),
    ({"latent": {"samples": torch.zeros(1, 16, 0, 4, 4)}}, r"latents have shape \[1, 16, 0, 4, 4\]"),
    ({"latent": {"samples": torch.full((1, 16, 2, 4, 4), torch.nan)}}, "the latents hold NaN"),
    ({"latent": {"samples": torch.zeros(1, 16, 2, 5, 4)}}, "multiples of 16"),
    ({"latent": {"samples": torch.zeros(1, 16, 2, 4, 4), "noise_mask": torch.ones(1)}}, "noise mask"),
    ({"steps": 0}, "steps must be a whole number from 1"),
    ({"steps": 3, "start_step": 3}, "hold no step"),
    ({"sigmas": torch.zeros(0)}, "sigmas must be a list of at least 2"),
    ({"positive": [[torch.zeros(1, 4, 4096), {}]]}, "encoded to a width of 4096"),
    ({"positive": [[torch.full((1, 4, 96), torch.nan), {}]]}, "the prompt was encoded to NaN"),
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


@pytest.fixture
def sample(call, nano):
    """Two steps of a model with these options beside both prompts."""
    def run(model, beside=None, latent=None, **changes):
        prompts = {name: [[embedding, {**options, **(beside or {})}] for embedding, options in nano[name]]
                   for name in ("positive", "negative")}
        samples = torch.zeros(1, model.vae_spec.z_dim, 2, 4, 4)
        return call("WanCoreSampler", model=model, latent=latent or {"samples": samples}, steps=2, seed=1, **prompts,
                    **changes)[0]["samples"]

    return run


def picture(frames=2, size=4, mask_size=4) -> dict:
    """What an image-to-video node puts beside a prompt."""
    return {"concat_latent_image": torch.zeros(1, 16, frames, size, size),
            "concat_mask": torch.ones(1, 1, frames, mask_size, mask_size)}


def seen(tokens=17, width=64, value=1.0) -> dict:
    """A CLIP vision output beside a prompt."""
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=torch.full((1, tokens, width), value))}


CLIP = seen()
CONTROL = {"vace_frames": [torch.zeros(1, 32, 2, 4, 4)], "vace_mask": [torch.ones(1, 64, 2, 4, 4)],
           "vace_strength": [1.0]}


@pytest.mark.parametrize(("name", "beside", "message"), [
    ("t2v", picture(), "takes none through its channels. Use an image-to-video model"),
    ("i2v", picture(frames=3), r"shape \[1, 20, 3, 4, 4\].*Make it for the video's width, height and length"),
    ("i2v", picture(size=8, mask_size=8), r"shape \[1, 20, 2, 8, 8\].*Make it for the video's width"),
    ("i2v", picture(mask_size=8), r"mask of known frames has shape \[1, 4, 2, 8, 8\]"),
    ("t2v", CONTROL, "this model has no VACE blocks. Use a VACE model, or add a VACE module"),
    ("i2v", {**picture(), **CONTROL}, "this model has no VACE blocks"),
    ("i2v", {**picture(), "concat_latent_image": torch.zeros(1, 48, 2, 4, 4)}, "Encode it with the model's VAE"),
    ("i2v", {**picture(), "concat_latent_image": torch.full((1, 16, 2, 4, 4), torch.nan)}, "conditioning holds NaN"),
    ("vace", {**CONTROL, "vace_mask": [torch.ones(1, 64, 3, 4, 4)]}, "frames, height and width must be equal"),
    ("vace", {**CONTROL, "vace_frames": [torch.zeros(1, 96, 2, 4, 4)]}, "the frames have 32 channels. Encode them"),
    ("vace", {**CONTROL, "vace_frames": [torch.full((1, 32, 2, 4, 4), torch.inf)]}, "a VACE control holds NaN or inf"),
    ("vace", {"vace_frames": CONTROL["vace_frames"]}, "1 VACE controls, 0 masks.*Make it with Wan VACE"),
])
def test_pictures_and_controls_that_do_not_suit(sample, small, name, beside, message):
    """Promise: pictures for a text-to-video model, a control for one without VACE, parts of another size: refused
    before weights are read."""
    model = small(name)
    with pytest.raises(ValueError, match=message):
        sample(model, beside)
    assert model.placement._held is None


def test_a_picture_for_ti2v_beside_the_prompt(sample, small):
    """Promise: TI2V takes its picture in the latent; beside the prompt it is refused with the node to use."""
    beside = {"concat_latent_image": torch.zeros(1, 48, 2, 4, 4), "concat_mask": torch.ones(1, 1, 2, 4, 4)}
    with pytest.raises(ValueError, match="for TI2V 5B: Wan Image Latent"):
        sample(small("ti2v"), beside)


def test_a_latent_of_the_other_family_for_ti2v(call, nano, sample, small):
    """Promise: a latent made with the VAE of the 14B models is refused by TI2V, before weights are read."""
    latent, = call("WanCoreImageLatent", vae=nano["vae"], start_image=torch.zeros(1, 32, 32, 3), width=32, height=32,
                   length=5)
    model = small("ti2v")
    with pytest.raises(ValueError, match=r"shape \[1, 16, 2, 4, 4\]; Small TI2V takes \[batch, 48,.*same family"):
        sample(model, latent=latent)
    assert model.placement._held is None


def test_no_clip_output_where_the_model_takes_one(sample, listed, caplog):
    """Promise: without CLIP features the model's attention to them is left out, and the log says so; so is a model
    without any picture."""
    model = listed("model")
    assert sample(model, picture()).isfinite().all()
    assert "Nano I2V is given no CLIP vision features; its attention to the picture is left out" in caplog.text
    assert "no start or end image" not in caplog.text
    caplog.clear()
    sample(model, {**picture(), **CLIP})
    assert not caplog.records
    assert sample(model, CLIP).isfinite().all()
    assert "Nano I2V is given no start or end image; it makes one up" in caplog.text


def test_a_clip_output_where_the_model_takes_none(sample, small, caplog):
    """Promise: without a place for CLIP features, as in Wan 2.2 I2V, they are left out, and the log says so."""
    model = small("i2v")
    with_output = sample(model, {**picture(), **CLIP})
    assert "positive carries a CLIP vision output, and Small I2V takes none; it is left out" in caplog.text
    assert torch.equal(with_output, sample(model, picture()))


@pytest.mark.parametrize(("output", "message"), [
    (seen(257, 1024), r"shape \[1, 257, 1024\]; this model takes \[batch, tokens, 64\]. Use the CLIP vision model"),
    (seen(0), r"shape \[1, 0, 64\]"),
    (seen(value=torch.nan), "a CLIP vision output holds NaN"),
    ({"clip_vision_output": {"image_embeds": 0}}, r"without penultimate_hidden_states \(a dict\). Make it with CLIP"),
])
def test_clip_outputs_of_another_kind(sample, listed, output, message):
    """Promise: another width (CLIP ViT-L), none or broken tokens are refused before weights are read."""
    model = listed("model")
    with pytest.raises(ValueError, match=message):
        sample(model, {**picture(), **output})
    assert model.placement._held is None


def test_tokens_of_two_pictures_for_a_model_of_one(sample, listed, caplog):
    """Promise: a model trained on one picture's CLIP tokens takes those of two, as the core does; the log says so."""
    model = listed("model")
    with_two = sample(model, {**picture(), **seen(34)})
    assert "Nano I2V was trained with 17 CLIP vision tokens and is given 34; it attends to all" in caplog.text
    assert with_two.isfinite().all()


def test_vace_weights_without_a_control(sample, call, nano, workspace, caplog):
    """Promise: a model with a VACE module and no control is the text-to-video model, bit for bit; the log says so."""
    folder = workspace / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    write_halves(workspace / "unused.safetensors", folder / "module.safetensors", TRANSFORMERS["nano_vace"])
    joined, = call("WanCoreVaceModule", model=nano["model"], module="module.safetensors")
    with caplog.at_level(logging.INFO):
        result = sample(joined)
    assert "Nano T2V with VACE is given no VACE control; it works as the text-to-video model" in caplog.text
    assert torch.equal(result, sample(nano["model"]))


@pytest.mark.parametrize(("mask", "changes", "message"), [
    (torch.ones(1, 4, 4), {"add_noise": False}, "a mask of what is kept needs noise to be added in the same run"),
    (torch.ones(3, 1, 2, 4, 4), {}, "there are 3 noise masks and 1 videos in the latent"),
    (torch.ones(0, 4, 4), {}, r"the noise mask has shape \[0, 4, 4\]"),
    (torch.ones(4), {}, r"the noise mask has shape \[4\]"),
    (torch.full((1, 4, 4), 255.0), {}, "the noise mask holds values from 255 to 255; expected numbers from 0 to 1"),
    (torch.full((1, 4, 4), torch.nan), {}, "the noise mask holds values from nan to nan"),
])
def test_noise_masks_that_cannot_be_used(sample, small, mask, changes, message):
    """Promise: a mask with latents whose noise is not known (but for TI2V), or for another batch, is refused."""
    model = small("t2v")
    with pytest.raises(ValueError, match=message):
        sample(model, latent={"samples": torch.ones(1, 16, 2, 4, 4), "noise_mask": mask}, **changes)
    assert model.placement._held is None
    if "add_noise" in changes:
        latent = {"samples": torch.ones(1, 48, 2, 4, 4), "noise_mask": mask}
        assert sample(small("ti2v"), latent=latent, **changes).isfinite().all()


def test_a_range_that_ends_before_it_starts(call, nano, sample, small):
    """Promise: a VACE control from late to early is refused by the sampler."""
    positive, negative, latent, _ = call(
        "WanCoreVace", positive=nano["positive"], negative=nano["negative"], vae=nano["vae"], width=32, height=32,
        length=5, start_percent=0.8, end_percent=0.3)
    with pytest.raises(ValueError, match="a VACE control is active from 80% to 30% of the run"):
        call("WanCoreSampler", model=small("vace"), positive=positive, negative=negative, latent=latent)


def test_modules_that_do_not_belong(call, nano, small, workspace):
    """Promise: a file that is no VACE module, or one for another model, and a second one for a single model."""
    folder = workspace / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    write_transformer(folder / "whole.safetensors", spec=SMALL["vace"])
    write_halves(workspace / "unused.safetensors", folder / "module.safetensors", TRANSFORMERS["nano_vace"])
    wide = replace(SMALL["vace"], dim=256, num_heads=2)
    write_halves(workspace / "unused.safetensors", folder / "wide.safetensors", wide)
    for changes, message in (({"module": "whole.safetensors"}, "whole.safetensors seems to be .* whole VACE model is"),
                             ({"module": "nano/wan_nano_t2v.safetensors"}, "wan_nano_t2v.safetensors seems to be"),
                             ({"model": small("i2v"), "module": "module.safetensors"}, "one of type i2v and width 128. "
                              "Add it to a text-to-video model"),
                             ({"module": "wide.safetensors"}, "of width 256, .* width 128. Choose the module of"),
                             ({"module": "absent.safetensors"}, "there is no 'absent.safetensors'"),
                             ({"module": "module.safetensors", "module_low": "module.safetensors"},
                              "a second VACE module was given, and Nano T2V is a single model")):
        with pytest.raises(ValueError, match=message):
            call("WanCoreVaceModule", **{"model": nano["model"], **changes})


def test_trimming_leaves_a_frame(call, nano):
    """Promise: Wan Decode refuses to trim away everything, with both numbers."""
    with pytest.raises(ValueError, match="trim_latent is 2, and the latent has 2 frames; at least one must be left"):
        call("WanCoreDecode", samples={"samples": torch.zeros(1, 16, 2, 4, 4)}, vae=nano["vae"], trim_latent=2)


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


def test_experts_that_are_no_pair(call, workspace):
    """Promise: an image- and a text-to-video expert, or the same single model twice, are refused with what they are;
    so is one expert alone."""
    folder = workspace / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    for name in ("wan22_i2v_a14b", "wan22_t2v_a14b", "wan21_flf2v_14b"):
        write_hollow(folder / name, expected_shapes(TRANSFORMERS[name]))
    for high, low, message in (
            ("wan22_i2v_a14b", "wan22_t2v_a14b", "of different architectures: wan22_i2v_a14b fits wan22_i2v_a14b, wan22"
                                                 "_t2v_a14b fits .*the high- and the low-noise file of one model"),
            ("wan21_flf2v_14b", "wan21_flf2v_14b", "fits wan21_flf2v_14b; .*no pair.*Open it as a single model")):
        with pytest.raises(ValueError, match=message):
            call("WanCoreExpertPairLoader", high_noise=high, low_noise=low)
    with pytest.raises(ValueError, match="fits wan22_i2v_a14b; .*no single model.*Open the files of both experts as a"):
        call("WanCoreModelLoader", model="wan22_i2v_a14b")


def test_swapped_experts_are_noticed(call, caplog):
    """Promise: experts whose names say the opposite of where they are plugged in cause a warning."""
    high, low = (f"nano/wan_nano_t2v_{name}_noise.safetensors" for name in ("high", "low"))
    call("WanCoreExpertPairLoader", high_noise=high, low_noise=low)
    assert not caplog.records
    call("WanCoreExpertPairLoader", high_noise=low, low_noise=high)
    assert "seem to be swapped" in caplog.text
