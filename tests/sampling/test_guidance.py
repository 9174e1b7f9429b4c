"""Guidance: the formulas, against diffusers' guiders too, what each step computes, scales by expert, and refusals."""

import math

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance, SkipLayerGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from wan_core.guidance import GuidanceOptions, NormalisedAttention, Projection, SigmaRange, SkippedBlocks
from wan_core.sampling import (
    Guidance,
    StepGuidance,
    classifier_free_guidance,
    guided_velocity,
    needs_uncond,
    plan_guidance,
)

SCALE = 4.0


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


def velocities(*branches, seed=0):
    """Velocities of two samples that are alike to a degree, as those of a model are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(2, 4, 3, 6, 5, generator=generator)
    return {branch: common + 0.4 * torch.randn(common.shape, generator=generator) for branch in branches}


def at_step(guider, step=5):
    """A guider of diffusers in the middle of a run of ten steps."""
    guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(500))
    return guider


def test_cfg_zero_star_is_that_of_diffusers():
    """Promise: the negative prompt's velocity is scaled for each sample by itself, over all other dimensions."""
    both = velocities("positive", "negative")
    guided, _ = guided_velocity(both, StepGuidance(SCALE), GuidanceOptions(zero_star=True))
    expected = at_step(ClassifierFreeZeroStarGuidance(SCALE)).forward(*both.values()).pred
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(guided, classifier_free_guidance(*both.values(), SCALE), atol=1e-3)
    alone = {name: value[:1] for name, value in both.items()}
    torch.testing.assert_close(guided_velocity(alone, StepGuidance(SCALE), GuidanceOptions(zero_star=True))[0],
                               guided[:1])


def test_cfg_zero_star_worked_out_by_hand():
    """Promise: <(4, 2), (1, 1)> / <(1, 1), (1, 1)> = 3, and 3u + 2 * (c - 3u) = (5, 1)."""
    both = {"positive": torch.tensor([[4.0, 2.0]]), "negative": torch.tensor([[1.0, 1.0]])}
    guided, _ = guided_velocity(both, StepGuidance(2.0), GuidanceOptions(zero_star=True))
    torch.testing.assert_close(guided, torch.tensor([[5.0, 1.0]]))


@pytest.mark.parametrize("momentum", [0.0, -0.75, 0.5])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_projected_guidance_is_that_of_diffusers(eta, threshold, momentum):
    """Promise: over three steps, with momentum, limit and projection; scale - 1 is what diffusers' original form calls
    the scale."""
    theirs = AdaptiveProjectedGuidance(SCALE - 1, momentum or None, threshold, eta=eta, use_original_formulation=True)
    theirs.momentum_buffer = MomentumBuffer(momentum) if momentum else None
    options, average = GuidanceOptions(projection=Projection(eta, momentum, threshold, per_element=False)), None
    for seed in range(3):
        both = velocities("positive", "negative", seed=seed)
        kept = None if average is None else average.clone()
        guided, following = guided_velocity(both, StepGuidance(SCALE), options, average)
        expected = at_step(theirs).forward(*both.values()).pred
        torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
        assert (following is None) == (momentum == 0) and (kept is None or torch.equal(kept, average))
        average = following


def test_projected_guidance_without_effect_is_plain():
    """Promise: eta 1 without momentum and limit is classifier-free guidance."""
    both = velocities("positive", "negative")
    guided, _ = guided_velocity(both, StepGuidance(SCALE), GuidanceOptions(projection=Projection(1.0, 0.0, 0.0)))
    torch.testing.assert_close(guided, classifier_free_guidance(*both.values(), SCALE), atol=1e-5, rtol=1e-5)


def test_a_threshold_per_element_means_the_same_at_every_size():
    """Promise: it is the root mean square that the difference is held to; 55 for 480p and 81 frames is 0.038."""
    for shape in ((1, 4, 2, 2, 2), (1, 4, 4, 8, 8)):
        both = {"positive": torch.zeros(shape), "negative": torch.full(shape, 3.0)}
        guided, _ = guided_velocity(both, StepGuidance(2.0), GuidanceOptions(projection=Projection(1.0, 0.0, 0.5)))
        torch.testing.assert_close(guided, torch.full(shape, -0.5))
    assert round(55 / math.sqrt(16 * 21 * 60 * 104), 3) == Projection().threshold


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_skip_layer_guidance_is_that_of_diffusers(scale):
    """Promise: a third pass without some blocks is moved away from, with and without a negative prompt."""
    step = StepGuidance(scale, skipped=SkippedBlocks((1,), 2.8))
    given = velocities("positive", "negative", "skipped")
    if scale == 1:
        del given["negative"]
    assert tuple(given) == step.branches
    guided, _ = guided_velocity(given, step, GuidanceOptions())
    theirs = SkipLayerGuidance(scale, 2.8, 0.1, 0.9, [1])
    if scale == 1:
        # In this case their guider has no term for the prompt itself.
        expected = given["positive"] + 2.8 * (given["positive"] - given["skipped"])
    else:
        expected = at_step(theirs).forward(*given.values()).pred
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


def test_neutral_options_are_plain_guidance_bit_for_bit():
    """Promise: without options the result is that of the plain formula, and the prompt's own at scale 1."""
    both = velocities("positive", "negative")
    guided, average = guided_velocity(both, StepGuidance(SCALE), GuidanceOptions())
    assert torch.equal(guided, classifier_free_guidance(*both.values(), SCALE)) and average is None
    assert guided_velocity({"positive": both["positive"]}, StepGuidance(1.0), GuidanceOptions())[0] is both["positive"]


SIGMAS, EXPERTS = (1.0, 0.8, 0.6, 0.4, 0.2), ("high", "high", "low", "low", "low")


def planned(**options):
    return plan_guidance(Guidance(SCALE, 3.0), GuidanceOptions(**options), SIGMAS, EXPERTS)


def test_what_each_step_computes():
    """Promise: scales by expert, range, list and zero steps decide the passes of each step."""
    assert [step.scale for step in planned()] == [4, 4, 3, 3, 3]
    ranged = planned(sigmas=SigmaRange(0.8, 0.4))
    assert [step.scale for step in ranged] == [1, 4, 3, 3, 1]
    assert [len(step.branches) for step in ranged] == [1, 2, 2, 2, 1]
    assert [step.scale for step in planned(scales=(6.0, 1.0, 5.0))] == [6, 1, 5, 5, 5]
    assert [step.scale for step in planned(scales=(6.0,) * 9, sigmas=SigmaRange(0.5))] == [1, 1, 1, 6, 6]
    assert [step.branches for step in planned(zero_steps=2)][:3] == [(), (), ("positive", "negative")]


def test_zero_steps_are_for_runs_from_pure_noise():
    """Promise: a run that begins lower, the second half of a split one or a video to start from, computes all of its
    steps."""
    steps = plan_guidance(Guidance(SCALE, 3.0), GuidanceOptions(zero_steps=2), SIGMAS[1:], EXPERTS[1:])
    assert not any(step.is_zero for step in steps)


def test_skipped_blocks_and_their_passes():
    """Promise: with scale 0 they are left out of the negative prompt's pass, else of a third one, in their range."""
    free = planned(skipped=SkippedBlocks((9, 10), 0.0, SigmaRange(0.6, 0.3)))
    assert [step.without("negative") for step in free] == [(), (), (9, 10), (9, 10), ()]
    assert {step.branches for step in free} == {("positive", "negative")}
    third = planned(skipped=SkippedBlocks((9, 10), 3.0, SigmaRange(0.6, 0.3)))
    assert [step.branches[2:] for step in third] == [(), (), ("skipped",), ("skipped",), ()]
    assert third[2].without("skipped") == (9, 10) and not third[2].without("negative")
    assert not any(step.without("positive") for step in (*free, *third))


def test_branches_have_another_name_where_other_blocks_compute_them():
    """Promise: what blocks have added is used again only by a step that would add it by the same rule."""
    names = [[step.cached_as(branch) for branch in step.branches] for step in planned(
        skipped=SkippedBlocks((9,), 0.0, SigmaRange(0.6)), nag=NormalisedAttention(), nag_end=0.7)]
    assert names == [["positive with NAG", "negative"]] * 2 + [["positive", "negative without 9"]] * 3


def test_a_negative_prompt_is_needed_for_cfg_and_nag():
    """Promise: and for nothing else, nor at steps at which nothing is computed."""
    unguided = Guidance(1.0, 1.0)
    for options, needed in (
            (GuidanceOptions(), False), (GuidanceOptions(nag=NormalisedAttention(), nag_end=0.7), True),
            (GuidanceOptions(scales=(1.0, 2.0)), True), (GuidanceOptions(skipped=SkippedBlocks((1,), 3.0)), False),
            (GuidanceOptions(nag=NormalisedAttention(), nag_end=0.7, zero_steps=2), False)):
        steps = plan_guidance(unguided, options, SIGMAS, EXPERTS)
        assert any(step.needs_negative for step in steps) == needed
