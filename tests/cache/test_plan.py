"""What a run's steps are to a cache, and the report."""

import pytest
import torch

from tests.cache.runs import BOTH, run_of
from wan_core.cache import AutoCache, Calibration, EasyCache, MagCache, Report, TeaCache
from wan_core.cache.plan import plan_stretches
from wan_core.presets import PRESETS


def test_stretches():
    """Promise: steps at which a branch does not run, or another expert does, part those that may reuse each other."""
    steps = run_of(8, high=3, branches=(BOTH, BOTH, BOTH, BOTH, ("positive",), BOTH, BOTH, ()))
    assert steps.stretches("high", "negative") == [[0, 1, 2]]
    assert steps.stretches("low", "negative") == [[3], [5, 6]]
    assert steps.stretches("low", "positive") == [[3, 4, 5, 6]]
    plan = plan_stretches(steps, "low", lambda branch, stretch: [index > stretch[0] for index in stretch])
    assert plan["positive"] == (False,) * 4 + (True, True, True, False)
    assert plan["negative"] == (False,) * 6 + (True, False)


@pytest.mark.parametrize("cache", [MagCache(0.24, 6), TeaCache(100.0, retention=False)])
def test_a_gap_is_computed_after(cache):
    """Promise: a branch that did not run at a step computes at the next one, and a part of a run its first step."""
    signals = [torch.full((1, 4), 1 + index / 100) for index in range(50)]
    whole = cache.plan(run_of(50), "low", signals)
    gap = run_of(50, branches=tuple(("positive",) if 20 <= index < 25 else BOTH for index in range(50)))
    plan = cache.plan(gap, "low", signals)
    assert plan["positive"] == whole["positive"] and plan["negative"][:20] == whole["negative"][:20]
    assert not any(plan["negative"][20:26]) and any(plan["negative"][26:])
    part = cache.plan(run_of(50, branches=((),) * 24 + (BOTH,) * 26), "low", signals)
    assert not any(part["positive"][:25]) and part["positive"][25]


def test_range_of_sigmas():
    """Promise: only steps with start >= sigma >= end are reused."""
    for start, end in ((1, 0), (0.8, 0.3), (0.5, 0.5)):
        steps = run_of(50)
        plan = MagCache(0.24, 6, retention=0.0, start=start, end=end).plan(steps, "low")
        assert all(start >= steps.sigmas[index] >= end for index, reuse in enumerate(plan["positive"]) if reuse)
        assert any(plan["positive"])


def test_report():
    """Promise: the report counts what is reused of what runs, in steps from 1, and tells unlike branches apart."""
    report = Report.of({index: (BOTH, BOTH if index in (1, 2, 7) else ()) for index in range(12)})
    assert str(report) == "3 of 12 steps reused: 2-3, 8" and report.share == pytest.approx(0.25)
    other = {index: (BOTH, BOTH[:1] if index in (1, 2, 7) else BOTH[1:] if index == 8 else ()) for index in range(12)}
    assert str(Report.of(other)) == "positive 3 of 12 steps reused: 2-3, 8; negative 1 of 12 steps reused: 9"
    assert str(Report.of({index: (BOTH, ()) for index in range(12)})) == "0 of 12 steps reused"
    many = {index: (BOTH, BOTH if index % 2 else ()) for index in range(40)}
    assert str(Report.of(many)).endswith("18, 20 …")


@pytest.mark.parametrize("make, message", [
    (lambda: TeaCache(0.0), "threshold 0.0; expected a number above 0"),
    (lambda: MagCache(float("nan"), 2), "threshold nan"),
    (lambda: EasyCache(start=0.2, end=0.5), "from sigma 0.2 to 0.5; expected 1 >= start >= end >= 0"),
    (lambda: EasyCache(warm_up=1.5), "the first 1.5 of the steps; expected 0 to 1"),
    (lambda: MagCache(0.1, 0), "at most 0 steps in a row; expected 1 or more"),
    (lambda: MagCache(0.1, 1, retention=-1), "the first -1 of the steps"),
    (lambda: AutoCache("best"), "unknown quality 'best' of a step cache; choose one of quality, balanced, fast"),
    (lambda: TeaCache.for_preset("nano_i2v"), "TeaCache has no coefficients for nano_i2v. Choose EasyCache"),
    (lambda: MagCache.for_preset("nano_i2v"), "MagCache has no ratios for nano_i2v. Choose EasyCache"),
    (lambda: run_of(5, sigmas=(1.0,)), "1 noise levels, 5 experts and 5 lists of branches"),
    (lambda: TeaCache(0.1).plan(run_of(5), "low", None), "0 time embeddings for the 5 steps"),
])
def test_bad_options(make, message):
    """Promise: settings that cannot be are refused with what came and what was expected."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_auto():
    """Promise: the automatic choice works for every preset, takes published numbers where there are any and EasyCache
    for Wan 2.2 and nano, and no cache in runs of few steps; it says why."""
    chosen = {}
    for name, preset in PRESETS.items():
        steps = run_of(preset.sampling.steps, name, high=5 if preset.experts else 0)
        cache, why = AutoCache().choose(steps)
        chosen[name] = type(cache)
        assert type(cache).__name__ in why
    assert {name for name, kind in chosen.items() if kind is TeaCache} == {
        "wan21_t2v_1_3b", "wan21_t2v_14b", "wan21_i2v_14b_480p", "wan21_i2v_14b_720p"}
    assert {name for name, kind in chosen.items() if kind is MagCache} == {"wan21_vace_1_3b", "wan21_vace_14b"}
    assert AutoCache().choose(run_of(8)) == (None, "no step cache: 8 steps are too few to reuse any")
    # What counts is what is run of a schedule.
    assert AutoCache().choose(run_of(30, branches=((),) * 24 + (BOTH,) * 6))[0] is None


def test_words():
    """Promise: a choice is described for people without the tables that it holds."""
    measured = Calibration("x", (1.0, 0.9))
    assert str(TeaCache(0.1, start=0.9)) == "TeaCache, threshold 0.1, with retention steps, sigma 0.9 to 0"
    assert str(MagCache(0.12, 4, measured=measured)) == (
        "MagCache, threshold 0.12, at most 4 in a row, retention 0.2, measured ratios")
    assert str(EasyCache()) == "EasyCache, threshold 0.05, warm-up 0.2"
    assert str(AutoCache("fast")) == "automatic step cache, fast"


def test_qualities():
    """Promise: for every preset with numbers, a faster quality reuses at least as many steps, and some."""
    for name in PRESETS:
        counts = []
        for quality in ("quality", "balanced", "fast"):
            try:
                cache = MagCache.for_preset(name, quality)
            except ValueError:
                break
            high = 20 if PRESETS[name].experts else 0
            plans = [cache.plan(run_of(50, name, high), expert) for expert in ("high", "low")]
            counts.append(sum(sum(plan["positive"]) for plan in plans))
        assert counts == sorted(counts) and 0 not in counts
    thresholds = [EasyCache.of_quality(quality).threshold for quality in ("quality", "balanced", "fast")]
    assert thresholds == sorted(thresholds) and thresholds[1] == 0.05, "the authors' default"
