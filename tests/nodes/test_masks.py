"""Noise masks: 0 is kept, 1 made anew; of pixels or latents, one frame or many, as in the core's samplers."""

import pytest
import torch

LATENT = (1, 16, 3, 4, 8)
QUICK = {"steps": 3, "seed": 7, "guidance": 2.0}


def given() -> torch.Tensor:
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masked(call, nano):
    """Samples a given latent with this noise mask."""
    def run(mask, samples=None, **changes):
        latent = {"samples": given() if samples is None else samples, "noise_mask": mask}
        inputs = {"model": nano["model"], "positive": nano["positive"], "negative": nano["negative"], **QUICK}
        return call("WanCoreSampler", latent=latent, **{**inputs, **changes})[0]["samples"]

    return run


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_what_is_masked_out_is_kept(masked, solver):
    """Promise: the kept half comes out as it went in, whatever the solver; the other half is made anew."""
    mask = torch.ones(1, 32, 64)
    mask[..., :32] = 0
    result = masked(mask, solver=solver)
    torch.testing.assert_close(result[..., :4], given()[..., :4], atol=1e-4, rtol=0)
    assert (result[..., 4:] - given()[..., 4:]).abs().mean() > 0.1


def test_masks_of_all_sizes(masked):
    """Promise: a mask of pixels or latents, one for all frames or one for each, and with or without batch and channel
    means the same."""
    mask = torch.ones(4, 8)
    mask[:, :4] = 0
    pixels = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    expected = masked(mask[None, None, None].expand(1, 1, 3, 4, 8))
    for same in (mask, mask[None], pixels[None], pixels.expand(9, 32, 64), pixels[None, None], mask.bool(),
                 pixels.expand(1, 1, 9, 32, 64), pixels.half().expand(4, 1, 32, 64)):
        torch.testing.assert_close(masked(same), expected, atol=1e-4, rtol=0)


def test_masks_in_time(masked):
    """Promise: masks for each frame of the video keep its first frame and no other."""
    mask = torch.ones(9, 32, 64)
    mask[:4] = 0
    result = masked(mask)
    torch.testing.assert_close(result[:, :, 0], given()[:, :, 0], atol=1e-4, rtol=0)
    assert (result[:, :, 2] - given()[:, :, 2]).abs().mean() > 0.1


def test_masks_of_ones_change_nothing(masked, call, nano):
    """Promise: a mask that keeps nothing is as good as none, one that keeps all gives back what it was given."""
    plain, = call("WanCoreSampler", model=nano["model"], positive=nano["positive"], negative=nano["negative"],
                  latent={"samples": given()}, **QUICK)
    torch.testing.assert_close(masked(torch.ones(1, 4, 8)), plain["samples"], atol=1e-4, rtol=0)
    torch.testing.assert_close(masked(torch.zeros(1, 4, 8)), given(), atol=1e-4, rtol=0)


def test_one_mask_for_each_video(masked):
    """Promise: a batch takes one mask for all or one for each."""
    samples = given().expand(2, -1, -1, -1, -1)
    masks = torch.ones(2, 1, 3, 4, 8)
    masks[1] = 0
    result = masked(masks, samples)
    torch.testing.assert_close(result[1:], given(), atol=1e-4, rtol=0)
    assert (result[0] - given()[0]).abs().mean() > 0.1
    torch.testing.assert_close(masked(torch.zeros(1, 4, 8), samples), samples.contiguous(), atol=1e-4, rtol=0)


def test_the_model_sees_what_is_kept_clean_in_ti2v(small, masked):
    """Promise: TI2V keeps a given frame in a run that another sampler began, too."""
    samples = torch.randn(1, 48, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 3, 4, 4)
    mask[:, :, 0] = 0
    settings = {"model": small("ti2v"), "solver": "euler", "steps": 4}
    whole = masked(mask, samples, **settings)
    first = masked(mask, samples, **settings, end_step=2)
    second = masked(mask, first, **settings, start_step=2, add_noise=False)
    torch.testing.assert_close(second, whole, atol=2e-4, rtol=0)
    torch.testing.assert_close(second[:, :, 0], samples[:, :, 0], atol=1e-4, rtol=0)
