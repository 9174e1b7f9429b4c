"""Guidance: the formula, its scales by expert, and refusals."""

import math

import pytest
import torch

from wan_core.sampling import Guidance, classifier_free_guidance, needs_uncond


def test_guidance_moves_from_uncond_through_cond():
    """Scale 0 gives the negative prompt's velocity, 1 the prompt's, 3 goes three times as far."""
    cond, uncond = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    assert torch.equal(classifier_free_guidance(cond, uncond, 0.0), uncond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 3.0), torch.tensor([[4.0, -5.0]]))


def test_guidance_is_computed_in_fp32_and_writes_to_no_argument():
    """bf16 velocities are widened first: their difference is not rounded to bf16."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 3, 4, generator=generator).bfloat16() for _ in range(2))
    kept = cond.clone(), uncond.clone()
    guided = classifier_free_guidance(cond, uncond, 5.0)
    exact = uncond.double() + 5.0 * (cond.double() - uncond.double())
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(cond, kept[0]) and torch.equal(uncond, kept[1])


def test_only_scale_one_spares_the_uncond_call():
    """needs_uncond is False exactly where the formula has no part of uncond."""
    assert not needs_uncond(1) and not needs_uncond(1.0)
    assert needs_uncond(0.0) and needs_uncond(0.999) and needs_uncond(5.0)


def test_each_expert_has_its_scale():
    """Wan 2.2 T2V's defaults: 4 for the high-noise expert, 3 for the low-noise one."""
    guidance = Guidance(high=4.0, low=3.0)
    assert guidance.scale_for("high") == 4.0 and guidance.scale_for("low") == 3.0
    with pytest.raises(ValueError, match="'middle'"):
        guidance.scale_for("middle")


@pytest.mark.parametrize("scale", [-0.1, math.inf, -math.inf, math.nan])
def test_unfit_scales_are_refused(scale):
    """Negative or infinite scales are errors, for either expert, and the message says which."""
    with pytest.raises(ValueError, match="high noise"):
        Guidance(high=scale, low=1.0)
    with pytest.raises(ValueError, match="low noise"):
        Guidance(high=1.0, low=scale)


def test_shapes_that_would_broadcast_are_refused():
    """One negative velocity for two prompts is an error, not a silent broadcast."""
    with pytest.raises(ValueError, match="one shape"):
        classifier_free_guidance(torch.zeros(2, 4), torch.zeros(1, 4), 5.0)
