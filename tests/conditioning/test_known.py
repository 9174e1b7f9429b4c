"""Latents known in part: blending at a noise level, timesteps of frames, the way straight to what is known."""

import pytest
import torch

from wan_core.conditioning import KnownLatents, known_start

SHAPE = (2, 4, 3, 2, 2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def known(mask: torch.Tensor, noise: torch.Tensor | None = None) -> KnownLatents:
    return KnownLatents(random(*SHAPE), mask, noise)


def frame_mask(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(SHAPE[0], 1, -1, *SHAPE[3:])


@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.0])
def test_blending_at_a_noise_level(sigma):
    """With noise the known part is (1 - sigma) of itself and sigma of the noise; at sigma 0 it is itself, exactly."""
    noise, sample, mask = random(*SHAPE, seed=1), random(*SHAPE, seed=2), frame_mask(0, 1, 0)
    part = known(mask, noise)
    result = part.blend(sample, sigma)
    assert torch.equal(result[:, :, 1], sample[:, :, 1])
    expected = (1 - sigma) * part.latents + sigma * noise
    torch.testing.assert_close(result[:, :, ::2], expected[:, :, ::2])
    if sigma == 0:
        assert torch.equal(result[:, :, ::2], part.latents[:, :, ::2])


def test_blending_without_noise_is_clean():
    """The first frame of TI2V is put in clean at every noise level."""
    sample, part = random(*SHAPE, seed=2), known(frame_mask(0, 1, 1))
    for sigma in (1.0, 0.5, 0.0):
        result = part.blend(sample, sigma)
        assert torch.equal(result[:, :, 0], part.latents[:, :, 0])
        assert torch.equal(result[:, :, 1:], sample[:, :, 1:])


def test_a_mask_between_blends():
    """A mask of a quarter takes a quarter of the sample."""
    sample, part = random(*SHAPE, seed=2), known(torch.full((2, 1, 3, 2, 2), 0.25))
    torch.testing.assert_close(part.blend(sample, 0.0), 0.75 * part.latents + 0.25 * sample)


def test_timesteps_of_frames():
    """A clean known part has timestep 0 and a frame known by half half of it; with noise all have the step's."""
    timestep, mask = torch.tensor([800.0, 800.0]), frame_mask(0, 1, 1).clone()
    mask[1, 0, 1, 0] = 0
    assert known(mask).timesteps(timestep).tolist() == [[0, 800, 800], [0, 400, 800]]
    assert known(mask, random(*SHAPE)).timesteps(timestep) is timestep


def test_steered_velocity_ends_at_what_is_known():
    """One Euler step of any length from any noise level with the steered velocity aims the known part at itself."""
    sample, velocity, part = random(*SHAPE, seed=2), random(*SHAPE, seed=3), known(frame_mask(0, 1, 1))
    for sigma in (0.9, 0.2):
        steered = part.steer(velocity, sample, sigma)
        clean = sample - sigma * steered
        torch.testing.assert_close(clean[:, :, 0], part.latents[:, :, 0])
        assert torch.equal(steered[:, :, 1:], velocity[:, :, 1:])


@pytest.mark.parametrize(("mask", "message"), [
    (torch.ones(2, 1, 2, 2, 2), r"has shape \[2, 1, 2, 2, 2\]; expected \[2, 1, 3, 2, 2\]"),
    (torch.ones(1, 1, 3, 2, 2), r"has shape \[1, 1, 3, 2, 2\]"),
    (torch.ones(2, 4, 3, 2, 2), r"has shape \[2, 4, 3, 2, 2\]"),
    (torch.full((2, 1, 3, 2, 2), 1.5), "from 0 .kept. to 1 .made anew., got 1.5 to 1.5"),
    (torch.full((2, 1, 3, 2, 2), -1.0), "got -1 to -1"),
    (torch.full((2, 1, 3, 2, 2), torch.nan), "got nan to nan"),
])
def test_masks_that_do_not_fit(mask, message):
    """A mask of another size or with other values is an error that shows it."""
    with pytest.raises(ValueError, match=message):
        known(mask)


@pytest.mark.parametrize(("given", "kept"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_start_of_a_clip(given, kept):
    """Whole latent frames of the given start are kept, for every video of a batch; the rest is as it was."""
    seen = []

    def encode(video):
        seen.append(video.shape[2])
        return torch.full((1, 4, 1 + (video.shape[2] - 1) // 4, 2, 2), 7.0)

    latents = random(*SHAPE)
    result, mask = known_start(encode, latents, torch.zeros(given, 3, 16, 16))
    assert seen == [1 + (kept - 1) * 4]
    assert mask.shape == (2, 1, 3, 2, 2) and mask[1, 0, :, 0, 0].tolist() == [0] * kept + [1] * (3 - kept)
    assert (result[:, :, :kept] == 7).all() and torch.equal(result[:, :, kept:], latents[:, :, kept:])
    assert torch.equal(latents, random(*SHAPE)), "what is given is not written to"


def test_a_start_without_room():
    """More start frames than the clip has are refused before anything is encoded."""
    with pytest.raises(ValueError, match="10 start frames do not fit into a clip of 9 frames"):
        known_start(None, random(*SHAPE), torch.zeros(10, 3, 16, 16))
