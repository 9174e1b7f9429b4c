"""CONDITIONING to the engine's conditions: ranges, strengths, pictures, controls, and refusals."""

import logging
from types import SimpleNamespace

import pytest
import torch

EMBEDDING = torch.ones(1, 4, 8)
SHAPE = (1, 16, 3, 4, 4)


@pytest.fixture
def convert(module, nano):
    """Converts one entry with these options, for a clip of the given batch."""
    def run(embedding=EMBEDDING, batch=1, shift=5.0, model=nano["model"], **options):
        shape = (batch, *SHAPE[1:])
        return module("nodes.conditioning").text_conditions([[embedding, options]], model, shift, shape, "positive")[0]

    return run


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def vace(count: int, **changes: object) -> dict[str, list]:
    """What a chain of as many WanVaceToVideo nodes puts beside a prompt."""
    return {"vace_frames": [random(1, 32, *SHAPE[2:]) for _ in range(count)],
            "vace_mask": [torch.ones(1, 64, *SHAPE[2:]) for _ in range(count)],
            "vace_strength": [0.5 + index for index in range(count)], **changes}


@pytest.mark.parametrize(("percent", "shift", "sigma"), [
    (0.0, 5.0, 1.0), (1.0, 5.0, 0.0), (0.5, 1.0, 0.5), (0.5, 5.0, 2.5 / 3), (0.25, 8.0, 6 / 6.25)])
def test_percent_to_sigma(module, percent, shift, sigma):
    """Promise: percents become noise levels as in ComfyUI's flow models, shift * t / (1 + (shift - 1) * t)."""
    assert module("nodes.conditioning").percent_to_sigma(percent, shift) == pytest.approx(sigma)


def test_range_and_strength(convert):
    """Promise: start, end and strength reach the engine; without them a prompt holds for the whole run."""
    condition = convert(start_percent=0.5, end_percent=1.0, strength=0.3)
    assert condition.strength == 0.3
    assert (condition.sigmas.start, condition.sigmas.end) == (pytest.approx(2.5 / 3), 0.0)
    assert (convert().sigmas.start, convert().sigmas.end) == (1.0, 0.0)
    assert convert().context is EMBEDDING


@pytest.mark.parametrize("key", ["area", "mask", "control", "hooks", "concat_mask_index", "reference_latents",
                                 "camera_conditions", "audio_embed", "pose_video_latent"])
def test_what_is_not_supported_is_refused(convert, key):
    """Promise: an option that would change the picture and is not supported is an error that names it."""
    with pytest.raises(ValueError, match=rf"\({key}\), which this sampler does not support"):
        convert(**{key: object()})


def test_unknown_options_are_named(convert, caplog):
    """Promise: an option that nobody knows is named in one warning; those without effect on Wan are not."""
    with caplog.at_level(logging.WARNING):
        convert(pooled_output=None, guidance=3.5)
        assert not caplog.records
        convert(strange=1)
    assert "carries strange, which has no effect here" in caplog.text


@pytest.mark.parametrize(("arguments", "message"), [
    ({"start_percent": 0.8, "end_percent": 0.2}, "active from 80% to 20%"),
    ({"strength": 0.0}, "strength is 0"),
    ({"embedding": torch.ones(2, 4, 8), "batch": 3}, "holds 2 embeddings and the latent 3 videos"),
])
def test_bad_values(convert, arguments, message):
    """Promise: values that make no sense are errors that say what came."""
    with pytest.raises(ValueError, match=message):
        convert(**arguments)


def test_empty_conditioning(module, nano):
    """Promise: a conditioning without entries is an error that names the socket."""
    with pytest.raises(ValueError, match="negative is an empty conditioning"):
        module("nodes.conditioning").text_conditions([], nano["model"], 5.0, SHAPE, "negative")


@pytest.mark.parametrize("channels", [1, 4, 2])
def test_picture_channels(convert, nano, channels):
    """Promise: raw latents and a mask that is 0 where they are known, of one channel, four, or others averaged, become
    the model's channels: 1 where known, latents normalised."""
    latents, mask = random(*SHAPE), torch.ones(1, channels, *SHAPE[2:])
    mask[:, :, 0] = 0
    mask[:, -1, 1] = 0
    given = latents.clone(), mask.clone()
    condition, = convert(concat_latent_image=latents, concat_mask=mask).beside
    known = {1: [1, 1, 1, 1], 4: [0, 0, 0, 1], 2: [0.5] * 4}[channels]
    assert condition.channels.shape == (1, 20, *SHAPE[2:])
    assert condition.channels[0, :4, :, 1, 1].t().tolist() == [[1] * 4, known, [0] * 4]
    assert torch.equal(condition.channels[:, 4:], nano["model"].latent_stats.normalise(latents))
    assert torch.equal(latents, given[0]) and torch.equal(mask, given[1]), "what is given is not written to"


@pytest.mark.parametrize(("frames", "mask_frames"), [(1, 1), (2, 3), (3, 2)])
def test_pictures_shorter_than_the_clip(convert, nano, frames, mask_frames):
    """Promise: frames beyond the given ones are unknown, as in the core: mask 0, latents zero when normalised."""
    latents = random(1, 16, frames, 4, 4)
    condition, = convert(concat_latent_image=latents, concat_mask=torch.zeros(1, 1, mask_frames, 4, 4)).beside
    assert condition.channels[0, 0, :, 0, 0].tolist() == [1.0] * mask_frames + [0.0] * (3 - mask_frames)
    torch.testing.assert_close(condition.channels[:, 4:, frames:], torch.zeros(1, 16, 3 - frames, 4, 4))
    assert torch.equal(condition.channels[:, 4:, :frames], nano["model"].latent_stats.normalise(latents))


@pytest.mark.parametrize(("latents", "mask", "message"), [
    (SHAPE, None, "a picture without a mask .concat_latent_image without concat_mask."),
    (SHAPE, (1, 1, 3, 2, 4), r"mask of known frames has shape \[1, 4, 3, 2, 4\]; expected \[batch, 4, 3, 4, 4\]"),
    (SHAPE, (1, 1, 4, 4), r"its mask \[1, 1, 4, 4\]; expected \[batch, 16, frames"),
    ((1, 48, 3, 4, 4), (1, 1, 3, 4, 4), r"has shape \[1, 48, 3, 4, 4\].*Encode it with the model's VAE"),
])
def test_pictures_that_do_not_fit(convert, latents, mask, message):
    """Promise: a missing mask, one of another size, the latents of another VAE: errors that show the shapes."""
    options = {"concat_latent_image": torch.zeros(latents)}
    with pytest.raises(ValueError, match=message):
        convert(**options, **({} if mask is None else {"concat_mask": torch.zeros(mask)}))


def test_clip_vision_output_where_there_is_no_place_for_it(convert, caplog):
    """Promise: a model without image tokens leaves a CLIP vision output out and says so."""
    output = SimpleNamespace(penultimate_hidden_states=torch.ones(1, 17, 64))
    assert convert(clip_vision_output=output).beside == ()
    assert "positive carries a CLIP vision output, and Nano T2V takes none; it is left out" in caplog.text


def test_controls_of_a_chain(convert, nano):
    """Promise: each control of a chain keeps its strength, and the range that our node gave it; the core's hold for the
    whole run."""
    chain = vace(2, wan_vace_percents=[(0.0, 0.5)])
    first, second = convert(**chain).beside
    assert (first.strength, second.strength) == (0.5, 1.5)
    assert (first.sigmas.start, first.sigmas.end) == (1.0, pytest.approx(2.5 / 3))
    assert (second.sigmas.start, second.sigmas.end) == (1.0, 0.0)
    stats, frames = nano["model"].latent_stats, chain["vace_frames"][0]
    assert torch.equal(first.control[:, :16], stats.normalise(frames[:, :16]))
    assert torch.equal(first.control[:, 32:], chain["vace_mask"][0])
    assert convert().beside == ()


@pytest.mark.parametrize(("changes", "message"), [
    ({"vace_mask": []}, "carries 1 VACE controls, 0 masks and 1 strengths"),
    ({"vace_strength": [1.0, 1.0]}, "carries 1 VACE controls, 1 masks and 2 strengths"),
    ({"vace_mask": [torch.ones(1, 64, 2, 4, 4)]}, r"and their mask \[1, 64, 2, 4, 4\]"),
    ({"wan_vace_percents": [(0.7, 0.2)]}, "a VACE control is active from 70% to 20% of the run"),
])
def test_controls_that_do_not_fit(convert, changes, message):
    """Promise: controls, masks and strengths of different number or size are errors that show them."""
    with pytest.raises(ValueError, match=message):
        convert(**vace(1, **changes))
