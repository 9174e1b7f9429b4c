"""Text conditions: sigma ranges, shares of combined prompts, refusals."""

import math

import pytest
import torch

from wan_core.conditioning import SigmaRange, TextCondition, active


def condition(start=math.inf, end=0.0, strength=1.0):
    return TextCondition(torch.zeros(1, 3, 4), SigmaRange(start, end), strength)


def test_a_range_includes_both_ends():
    """A range from 0.9 down to 0.4 holds at 0.9 and 0.4 and between, and nowhere else; the default one everywhere."""
    part = SigmaRange(0.9, 0.4)
    assert [part.holds(sigma) for sigma in (1.0, 0.9, 0.6, 0.4, 0.39)] == [False, True, True, True, False]
    assert all(SigmaRange().holds(sigma) for sigma in (0.0, 0.5, 1.0, 80.0))
    assert SigmaRange(0.5, 0.5).holds(0.5)


@pytest.mark.parametrize(("start", "end"), [(0.3, 0.4), (math.nan, 0.0), (1.0, math.nan)])
def test_ranges_from_low_to_high_noise_are_refused(start, end):
    """A range that could never hold is an error that shows both ends."""
    with pytest.raises(ValueError, match=f"start {start} and end {end}"):
        SigmaRange(start, end)


def test_one_prompt_has_the_whole_share():
    """Whatever its strength, a prompt alone counts as one."""
    alone = condition(strength=0.2)
    assert active([alone], 0.5) == [(alone, 1.0)]


def test_shares_are_strengths_and_sum_to_one():
    """Strengths 1 and 3 give a quarter and three quarters, in the given order."""
    first, second = condition(), condition(strength=3.0)
    assert active([first, second], 0.5) == [(first, 0.25), (second, 0.75)]


def test_only_prompts_in_range_share():
    """Outside its range a prompt leaves its share to the others."""
    early, late, always = condition(end=0.7), condition(start=0.3), condition(strength=1.0)
    assert active([early, late, always], 0.9) == [(early, 0.5), (always, 0.5)]
    assert active([early, late, always], 0.5) == [(always, 1.0)]
    assert active([early, late, always], 0.1) == [(late, 0.5), (always, 0.5)]


@pytest.mark.parametrize("conditions", [[], [condition(end=0.7), condition(start=0.3)]])
def test_a_gap_is_refused(conditions):
    """A noise level at which no prompt holds is an error that names the level."""
    with pytest.raises(ValueError, match="no prompt is active at sigma 0.500"):
        active(conditions, 0.5)


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, math.inf])
def test_unfit_strengths_are_refused(strength):
    """A strength of zero or less would divide by zero or push away; the error shows it."""
    with pytest.raises(ValueError, match=f"strength is {strength}"):
        condition(strength=strength)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1, 3, 4)])
def test_embeddings_without_a_batch_are_refused(shape):
    """A text condition is [batch, tokens, width]; the error shows what came."""
    with pytest.raises(ValueError, match=r"expected \[batch, tokens, width\]"):
        TextCondition(torch.zeros(shape))
