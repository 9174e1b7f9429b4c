"""VACE controls: what is encoded, the layout of the mask, reference frames, strengths and ranges, refusals."""

import math

import pytest
import torch

from wan_core.conditioning import ControlLatents, SigmaRange, VaceCondition, encode_control
from wan_core.dit import ModelInputs, VaceControl
from wan_core.presets import TRANSFORMERS, VAES
from wan_core.vae import LatentStats

STATS = LatentStats.of(VAES["wan21_vae"])
VACE = TRANSFORMERS["wan21_vace_1_3b"]
SHAPE = (1, 16, 3, 2, 4)


class Recorder:
    """An encoder that remembers its videos and gives latents that hold their number."""

    def __init__(self):
        self.videos = []

    def __call__(self, video):
        self.videos.append(video[0])
        _, _, frames, height, width = video.shape
        return torch.full((1, 16, 1 + (frames - 1) // 4, height // 8, width // 8), float(len(self.videos)))


def clip() -> torch.Tensor:
    """A control video [3, 9, 16, 32] in [-1, 1]."""
    return torch.rand(3, 9, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def condition(frames: int = 3, strength: float = 1.0, sigmas: SigmaRange | None = None, batch: int = 1):
    latents = ControlLatents(torch.zeros(batch, 32, frames, 2, 4), torch.ones(1, 64, frames, 2, 4))
    return VaceCondition.of(latents, STATS, strength, sigmas)


def test_two_parts_are_encoded():
    """Inactive is the video where the mask is 0, reactive where it is 1, both grey elsewhere; a mask between counts
    as the nearer of the two for the frames, and reaches its own channels as it is."""
    encode, mask = Recorder(), torch.zeros(1, 9, 16, 32)
    mask[..., :8], mask[..., 8:16] = 1, 0.3
    control = encode_control(encode, STATS, 8, clip(), mask)
    inactive, reactive = encode.videos
    assert torch.equal(inactive[..., 8:], clip()[..., 8:]) and not inactive[..., :8].any()
    assert torch.equal(reactive[..., :8], clip()[..., :8]) and not reactive[..., 8:].any()
    assert control.frames.shape == (1, 32, 3, 2, 4) and control.references == 0
    assert control.frames[0, :, 0, 0, 0].tolist() == [1.0] * 16 + [2.0] * 16
    torch.testing.assert_close(control.mask[0, 0, 0, 0], torch.tensor([1, 0.3, 0, 0]))


def test_mask_channels_are_the_pixels_of_a_latent_pixel():
    """Channel 8 * row + column is that pixel of each 8x8 square; frames are the nearest ones in time."""
    mask = torch.rand(1, 9, 16, 32, generator=torch.Generator().manual_seed(1))
    channels = encode_control(Recorder(), STATS, 8, clip(), mask).mask
    assert channels.shape == (1, 64, 3, 2, 4)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        expected = mask[0, :, row::8, column::8][[1, 4, 7]]
        assert torch.equal(channels[0, 8 * row + column], expected)


def test_without_a_mask_everything_is_made_anew():
    """No mask is a mask of ones: the inactive part is grey."""
    encode = Recorder()
    control = encode_control(encode, STATS, 8, clip())
    assert not encode.videos[0].any() and torch.equal(encode.videos[1], clip())
    assert torch.equal(control.mask, torch.ones(1, 64, 3, 2, 4))


def test_references_are_frames_in_front():
    """Each reference is one latent frame: itself, then a part that is zero when normalised; its mask is 0."""
    encode, pictures = Recorder(), [torch.ones(3, 1, 16, 32), -torch.ones(3, 1, 16, 32)]
    control = encode_control(encode, STATS, 8, clip(), None, pictures)
    assert control.references == 2 and control.frames.shape == (1, 32, 5, 2, 4)
    assert [video.shape[1] for video in encode.videos] == [9, 9, 1, 1]
    assert control.frames[0, 0, :, 0, 0].tolist() == [3, 4, 1, 1, 1]
    normalised = VaceCondition.of(control, STATS).control
    torch.testing.assert_close(normalised[:, 16:32, :2], torch.zeros(1, 16, 2, 2, 4))
    assert control.mask[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(("mask", "reference", "message"), [
    (torch.ones(1, 5, 16, 32), None, r"the mask has shape \[1, 5, 16, 32\].*must be \[1, 9, 16, 32\]"),
    (torch.ones(9, 16, 32), None, r"the mask has shape \[9, 16, 32\]"),
    (None, torch.ones(3, 1, 16, 16), r"a reference image has shape \[3, 1, 16, 16\].*must be \[3, 1, 16, 32\]"),
])
def test_parts_of_another_size(mask, reference, message):
    """A mask or a reference of another size is refused before anything is encoded."""
    encode = Recorder()
    with pytest.raises(ValueError, match=message):
        encode_control(encode, STATS, 8, clip(), mask, [] if reference is None else [reference])
    assert encode.videos == []


def test_control_is_normalised_frames_and_mask():
    """Both halves are brought to the model's range on their own, the mask behind them as it is, for a whole batch."""
    frames, mask = torch.randn(2, 32, *SHAPE[2:]), torch.rand(1, 64, *SHAPE[2:])
    control = VaceCondition.of(ControlLatents(frames, mask), STATS).control
    assert torch.equal(control[:, :16], STATS.normalise(frames[:, :16]))
    assert torch.equal(control[:, 16:32], STATS.normalise(frames[:, 16:]))
    assert torch.equal(control[1, 32:], mask[0])
    with pytest.raises(ValueError, match=r"frames have shape \[2, 32, 3, 2, 4\] and their mask \[1, 64, 2, 2, 4\]"):
        VaceCondition.of(ControlLatents(frames, mask[:, :, 1:]), STATS)


def test_controls_are_added_in_their_range():
    """Each control of a chain goes beside the others with its strength, and only at the noise levels of its range."""
    early, late = condition(strength=0.5, sigmas=SigmaRange(1.0, 0.6)), condition(sigmas=SigmaRange(0.6, 0.0))
    sample = torch.zeros(2, *SHAPE[1:])

    def strengths(sigma: float) -> list[float]:
        inputs = ModelInputs(sample, torch.zeros(2), None)
        for one in (early, late):
            inputs = one.add(inputs, one.prepare(None, sample), sigma)
        assert all(isinstance(control, VaceControl) and control.latents.shape == (2, 96, 3, 2, 4)
                   for control in inputs.controls)
        return [control.strength for control in inputs.controls]

    assert [strengths(sigma) for sigma in (1.0, 0.6, 0.59)] == [[0.5], [0.5, 1.0], [1.0]]


@pytest.mark.parametrize(("spec", "changes", "message"), [
    ("wan21_t2v_1_3b", {}, "this model has no VACE blocks. Use a VACE model, or add a VACE module"),
    ("wan21_vace_1_3b", {"frames": 4}, r"\[1, 96, 4, 2, 4\].*\[batch, 96, 3, 2, 4\]. Its frames, the reference images"),
    ("wan21_vace_1_3b", {"batch": 2}, "a VACE control is a batch of 2 and the latents are a batch of 1"),
])
def test_controls_that_do_not_suit(spec, changes, message):
    """A model without VACE blocks, a clip of another length, another batch: the error says what to do."""
    condition().check(VACE, SHAPE)
    with pytest.raises(ValueError, match=message):
        condition(**changes).check(TRANSFORMERS[spec], SHAPE)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_strengths_that_are_no_numbers(strength):
    """A strength that would make everything NaN is refused; 0 and negative ones are the user's affair."""
    with pytest.raises(ValueError, match=f"strength of a VACE control is {strength}"):
        condition(strength=strength)
    assert condition(strength=0.0).strength == 0
