"""MagCache: reuses what the blocks added while the magnitude of that would have changed little.

From step to step the residual of the block stack shrinks by a factor that hardly depends on prompt or seed. The product
of these factors since the last computed step tells how wrong it is to add the same residual again; the errors are
added up until they pass a threshold. A table of factors belongs to a checkpoint and, more loosely, to the schedule it
was measured with; other step counts take the nearest entries.

Reference: Ma et al. 2025 (arXiv:2506.09045) and MagCache4Wan2.1/, MagCache4Wan2.2/magcache_generate.py of
Zehong-Ma/MagCache, from where the tables (magcache_ratios.json), thresholds and retention ratios are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from .calibration import Calibration, bundled, read_tables
from .plan import RunSteps, check_range, described, of_quality, plan_stretches

# Threshold and longest run of reused steps for "quality", "balanced" and "fast". All are the authors' for one model or
# the other: 0.12 and 2 is the command line's default, 0.12 and 4 from the README for 1.3B and I2V, 0.24 and 6 for 14B.
_WAN21 = ((0.12, 2), (0.12, 4), (0.24, 6))
# The README's is the middle; for 2.2 the first is the command line's default. The others are more and less of the same.
_VACE = ((0.01, 2), (0.02, 3), (0.04, 4))
_WAN22 = ((0.04, 2), (0.06, 2), (0.12, 4))
# With ratios of one's own: what the nano models keep their scores at. Of an expert pair the high-noise expert is
# computed throughout and the low-noise one after a tenth of its steps, as the authors have it for I2V A14B.
_MEASURED = ((0.03, 2), (0.06, 3), (0.12, 4))
_MEASURED_PAIR = ((0.06, 3), (0.12, 4), (0.24, 6))


@dataclass(frozen=True)
class _Published:
    table: str
    settings: tuple[tuple[float, int], ...]
    retention: float = 0.2
    high_noise: bool = True


_PRESETS = MappingProxyType({
    "wan21_t2v_1_3b": _Published("wan21_t2v_1_3b", _WAN21),
    "wan21_t2v_14b": _Published("wan21_t2v_14b", _WAN21),
    "wan21_i2v_14b_480p": _Published("wan21_i2v_14b_480p", _WAN21),
    "wan21_i2v_14b_720p": _Published("wan21_i2v_14b_720p", _WAN21),
    "wan21_vace_1_3b": _Published("wan21_vace_1_3b", _VACE),
    # The authors take T2V 14B's numbers for it.
    "wan21_vace_14b": _Published("wan21_t2v_14b", _VACE),
    "wan22_ti2v_5b": _Published("wan22_ti2v_5b", _WAN22),
    "wan22_t2v_a14b": _Published("wan22_t2v_a14b", _WAN22, retention=0.4),
    "wan22_i2v_a14b": _Published("wan22_i2v_a14b", _WAN22, retention=0.1, high_noise=False),
})


def is_published(preset: str) -> bool:
    """Whether MagCache's authors published ratios for a preset."""
    return preset in _PRESETS


def published_ratios() -> Mapping[str, Calibration]:
    """The published tables by name: presets, and wan22_ti2v_5b_i2v for TI2V 5B with a first frame."""
    return read_tables(Path(__file__).with_name("magcache_ratios.json"))


@dataclass(frozen=True)
class MagCache:
    """Reuse at most `longest` steps in a row, while their accumulated error stays below `threshold`.

    The first part of a run, `retention` (0..1) of its steps, and with an expert pair of each expert's, is computed.
    With `high_noise` False the high-noise expert of a pair is never reused. Without `measured` ratios the preset's
    table is taken. `start` and `end` are sigmas. Raises ValueError for settings that cannot be.
    """

    threshold: float
    longest: int
    retention: float = 0.2
    high_noise: bool = True
    start: float = 1.0
    end: float = 0.0
    measured: Calibration | None = None

    # See `PlannedCache`: the table says it all.
    signal = None

    def __post_init__(self) -> None:
        check_range(self.start, self.end, self.threshold)
        if not 0 <= self.retention <= 1:
            raise ValueError(f"a MagCache that computes the first {self.retention} of the steps; expected 0 to 1.")
        if self.longest < 1:
            raise ValueError(f"a MagCache that reuses at most {self.longest} steps in a row; expected 1 or more.")

    def __str__(self) -> str:
        details = [f"at most {self.longest} in a row", f"retention {self.retention:g}",
                   *(["measured ratios"] if self.measured else [])]
        return described("MagCache", self.threshold, details, self.start, self.end)

    @classmethod
    def for_preset(cls, preset: str, quality: str = "balanced", measured: Calibration | None = None) -> "MagCache":
        """The settings for a preset. Raises ValueError for one without ratios and for an unknown quality."""
        published, measured = _PRESETS.get(preset), measured or bundled(preset)
        if published is None and measured is None:
            raise ValueError(_missing(preset))
        if measured is not None:
            measured.check_preset(preset)
        settings = published.settings if measured is None else _MEASURED_PAIR if measured.is_pair else _MEASURED
        threshold, longest = of_quality(settings, quality)
        if published is None:
            pair = {"retention": 0.1, "high_noise": False} if measured.is_pair else {}
            return cls(threshold, longest, **pair, measured=measured)
        return cls(threshold, longest, published.retention, published.high_noise, measured=measured)

    def plan(self, steps: RunSteps, expert: str,
             signals: Sequence[Tensor] | None = None) -> dict[str, tuple[bool, ...]]:
        """See `PlannedCache.plan`."""
        table, inside = self._table(steps), steps.inside(self.start, self.end)

        def decide(branch: str, stretch: list[int]) -> tuple[bool, ...]:
            ratios = table.ratios(branch, len(steps.sigmas))
            may_skip = [inside[index] and self._past_retention(steps, expert, branch, index) for index in stretch]
            return magcache_skips([ratios[index] for index in stretch], may_skip, self.threshold, self.longest)

        return plan_stretches(steps, expert, decide)

    def _table(self, steps: RunSteps) -> Calibration:
        if self.measured is not None:
            self.measured.check_preset(steps.preset)
            return self.measured
        if steps.preset not in _PRESETS:
            raise ValueError(_missing(steps.preset))
        name = _PRESETS[steps.preset].table
        return published_ratios()[f"{name}_i2v" if steps.known_frames and name == "wan22_ti2v_5b" else name]

    def _past_retention(self, steps: RunSteps, expert: str, branch: str, index: int) -> bool:
        """Whether a step lies behind the part of its expert that is always computed.

        The authors count calls, two to a step. Their code for T2V A14B computes one call more of the low-noise expert
        than that for I2V A14B; both are kept to.
        """
        call = 2 * index + (not branch.startswith("positive"))
        high, low = (2 * steps.experts.count(name) for name in ("high", "low"))
        if not high or expert == "high":
            return (self.high_noise or not high) and call >= int((high or low) * self.retention)
        boundary = high + low * self.retention
        return call > boundary if self.high_noise else call >= int(boundary)


def magcache_skips(ratios: Sequence[float], may_skip: Sequence[bool], threshold: float,
                   longest: int) -> tuple[bool, ...]:
    """MagCache's rule on the calls of one branch: which of them reuse.

    `ratios[i]` is the magnitude of the residual at call i over that at call i - 1. Calls that may not be reused leave
    what has been added up as it is: the published rule has these at the beginning only, where it is nothing. The first
    call has nothing to reuse.
    """
    skips, product, count, error = [], 1.0, 0, 0.0
    for index, (ratio, allowed) in enumerate(zip(ratios, may_skip, strict=True)):
        skip = False
        if allowed:
            product *= ratio
            count += 1
            error += abs(1 - product)
            skip = bool(index) and error < threshold and count <= longest
            if not skip:
                product, count, error = 1.0, 0, 0.0
        skips.append(skip)
    return tuple(skips)


def _missing(preset: str) -> str:
    return (f"MagCache has no ratios for {preset}. Choose EasyCache, which needs none, or give a calibration that was "
            "measured on this model.")
