"""TeaCache against the published rule, call by call as its authors count them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cache.runs import run_of
from wan_core.cache import Calibration, Polynomial, TeaCache, relative_change
from wan_core.cache.teacache import _COEFFICIENTS, polynomial, teacache_skips
from wan_core.dit.time import sinusoidal_embedding
from wan_core.presets import PRESETS

MODELS = {"wan21_t2v_1_3b": "t2v 1.3b", "wan21_t2v_14b": "t2v 14b", "wan21_i2v_14b_480p": "i2v 480p",
          "wan21_i2v_14b_720p": "i2v 720p"}


class Published:
    """The published rule in its own terms: a counter over calls, even ones positive and odd ones negative."""

    def __init__(self, steps: int, threshold: float, coefficients: tuple[float, ...], retention: bool) -> None:
        self.calls, self.threshold, self.rescale = 0, threshold, np.poly1d(coefficients)
        self.begin, self.cutoff = (10, 2 * steps) if retention else (2, 2 * steps - 2)
        self.sums: list = [0.0, 0.0]
        self.previous: list = [None, None]

    def call(self, signal: Tensor) -> bool:
        side = self.calls % 2
        if self.calls < self.begin or self.calls >= self.cutoff:
            skip, self.sums[side] = False, 0.0
        else:
            before = self.previous[side]
            self.sums[side] += self.rescale(((signal - before).abs().mean() / before.abs().mean()).item())
            skip = self.sums[side] < self.threshold
            if not skip:
                self.sums[side] = 0.0
        self.previous[side] = signal
        self.calls += 1
        return skip


def embedded(steps: int, shift: float) -> dict[str, list[Tensor]]:
    """Time embeddings "e" [1, 96] and "e0" [1, 6, 96] of a schedule, by a time network with random weights."""
    torch.manual_seed(steps)
    first = nn.Sequential(nn.Linear(256, 96), nn.SiLU(), nn.Linear(96, 96))
    second = nn.Sequential(nn.SiLU(), nn.Linear(96, 6 * 96))
    even = torch.linspace(1, 1 / steps, steps)
    times = (1000 * shift * even / (1 + (shift - 1) * even)).floor()
    with torch.no_grad():
        e = [first(sinusoidal_embedding(time[None], 256)) for time in times]
        return {"e": e, "e0": [second(one).unflatten(1, (6, -1)) for one in e]}


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("retention", [True, False])
def test_published_decisions(preset, retention):
    """Promise: with each of the eight published sets, real time embeddings and any threshold, both branches reuse the
    steps that the published rule does."""
    seen = set()
    for steps, shift in ((6, 5.0), (20, 3.0), (50, 8.0)):
        signals = embedded(steps, shift)["e0" if retention else "e"]
        coefficients = _COEFFICIENTS[MODELS[preset]]["e0" if retention else "e"]
        typical = float(np.median([abs(polynomial(coefficients, relative_change(new, old)))
                                   for old, new in zip(signals, signals[1:])]))
        thresholds = [TeaCache.for_preset(preset, quality, retention).threshold for quality in ("quality", "fast")]
        for threshold in (*thresholds, 1.5 * typical, 3.5 * typical):
            published = Published(steps, threshold, coefficients, retention)
            expected = [(published.call(signal), published.call(signal)) for signal in signals]
            plan = TeaCache(threshold, retention).plan(run_of(steps, preset), "low", signals)
            assert list(zip(plan["positive"], plan["negative"])) == expected
            seen |= set(expected)
    assert seen == {(True, True), (False, False)}


def test_synthetic_changes():
    """Promise: changes that are negative, zero or large are added up as they are, as in the published rule."""
    torch.manual_seed(1)
    signals = [torch.ones(1, 4)]
    for change in (torch.rand(59) * 0.3).tolist():
        signals.append(signals[-1] * (1 + change))
    falling = 0
    for trial in range(16):
        coefficients = tuple((torch.randn(5) * torch.tensor([20.0, 10.0, 5.0, 2.0, 0.1])).tolist())
        threshold, retention = 0.02 + 0.05 * trial, bool(trial % 2)
        published = Published(60, threshold, coefficients, retention)
        expected = [(published.call(signal), published.call(signal))[0] for signal in signals]
        changes = [0.0] + [polynomial(coefficients, relative_change(new, old))
                           for old, new in zip(signals, signals[1:])]
        may_skip = [index >= (5 if retention else 1) and (retention or index < 59) for index in range(60)]
        assert list(teacache_skips(changes, may_skip, threshold)) == expected
        falling += min(changes) < 0
    assert falling > 3


def test_window():
    """Promise: outside the range of sigmas the sum stays zero, so a run enters the range with nothing added up."""
    may_skip = [index >= 4 for index in range(8)]
    assert teacache_skips([0.4] * 8, may_skip, 1.0) == (False,) * 4 + (True, True, False, True)
    assert teacache_skips([float("nan")] * 3, [True] * 3, 1.0) == (False,) * 3


def test_a_measured_polynomial_says_nothing_beyond_its_range():
    """Promise: within the range it is the polynomial, never below 0; outside the output changes in proportion, so that
    more and smaller steps than were measured do not look like none."""
    measured = Polynomial("low", "e0", (1.0, -0.1, 0.0), (0.2, 0.4))
    assert measured(0.3) == pytest.approx(0.3 * 0.3 - 0.1 * 0.3)
    assert measured(0.1) == pytest.approx(measured(0.2) / 2) and measured(0.8) == pytest.approx(2 * measured(0.4))
    assert Polynomial("low", "e0", (1.0, -0.5), (0.2, 0.9))(0.3) == 0.0


def test_an_expert_pair():
    """Promise: each expert's steps are a run of their own: its first ones are computed, and only the last of all."""
    signals = [torch.full((1, 4), 1 + index / 1000) for index in range(40)]
    flat = Calibration("x", polynomials=tuple(Polynomial(expert, signal, (0.0, 0.001), (1e-6, 1.0))
                                              for expert in ("high", "low") for signal in ("e", "e0")))
    run = run_of(40, "x", high=25)
    for retention, first, end in ((True, 5, 40), (False, 1, 39)):
        cache = TeaCache(1.0, retention, measured=flat)
        high, low = cache.plan(run, "high", signals[:25]), cache.plan(run, "low", signals[25:])
        assert high["negative"] == (False,) * first + (True,) * (25 - first) + (False,) * 15
        assert low["negative"] == tuple(25 + first <= index < end for index in range(40))


def test_every_released_model_has_an_answer():
    """Promise: all presets but nano have coefficients of five or six numbers for both kinds, published or another
    model's."""
    signals = [torch.full((1, 4), 1 + index / 100) for index in range(10)]
    for name in PRESETS:
        if not name.startswith("nano"):
            for retention in (None, True, False):
                cache = TeaCache.for_preset(name, "fast", retention)
                assert len(cache.plan(run_of(10, name), "low", signals)["positive"]) == 10
    assert not TeaCache.for_preset("wan21_t2v_1_3b").retention and TeaCache.for_preset("wan21_t2v_14b").retention
    assert TeaCache.for_preset("wan22_ti2v_5b") == TeaCache(0.26, retention=False)
