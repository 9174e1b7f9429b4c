"""TeaCache: reuses what the blocks added while the time embedding has changed little since it was computed.

The time embedding modulates every block, so its change tells how much the output will change; a polynomial, fitted for
each checkpoint, turns the one into the other. It depends on schedule and checkpoint alone, not on prompt or latents:
all decisions are known beforehand, and the branches of the guidance decide alike.

Reference: Liu et al. 2024 (arXiv:2411.19108) and TeaCache4Wan2.1/teacache_generate.py of ali-vilab/TeaCache, from where
coefficients and thresholds are; sets that others reuse for later models are from VideoX-Fun (videox_fun/models/
cache_utils.py) and LightX2V (configs/caching/teacache).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from .calibration import Calibration, bundled, polynomial
from .plan import RunSteps, check_range, described, of_quality, plan_stretches

# By checkpoint and signal, the highest power first.
_COEFFICIENTS = MappingProxyType({
    "t2v 1.3b": MappingProxyType({
        "e0": (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
        "e": (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1)}),
    "t2v 14b": MappingProxyType({
        "e0": (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
        "e": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404)}),
    "i2v 480p": MappingProxyType({
        "e0": (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
        "e": (-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1)}),
    "i2v 720p": MappingProxyType({
        "e0": (8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
        "e": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683)}),
    "ti2v 5b": MappingProxyType({
        "e": (1.57472669e5, -1.15702395e5, 3.10761669e4, -3.83116651e3, 2.21608777e2, -4.81179567)}),
})

# Thresholds for "quality", "balanced" and "fast". The authors give two with retention steps: the middle is in between.
# For TI2V 5B LightX2V gives the middle one alone. With a polynomial of one's own they are those
# at which the nano models keep their scores.
_THRESHOLDS = MappingProxyType({
    "t2v 1.3b": MappingProxyType({"e0": (0.05, 0.075, 0.10), "e": (0.05, 0.07, 0.08)}),
    "t2v 14b": MappingProxyType({"e0": (0.10, 0.15, 0.20), "e": (0.14, 0.15, 0.20)}),
    "i2v 480p": MappingProxyType({"e0": (0.20, 0.25, 0.30), "e": (0.13, 0.19, 0.26)}),
    "i2v 720p": MappingProxyType({"e0": (0.20, 0.25, 0.30), "e": (0.18, 0.20, 0.30)}),
    "ti2v 5b": MappingProxyType({"e": (0.20, 0.26, 0.30)}),
})
_MEASURED_THRESHOLDS = (0.04, 0.06, 0.10)

# Presets that the authors published a set for, and those to which others carry one over.
_PUBLISHED = MappingProxyType({
    "wan21_t2v_1_3b": "t2v 1.3b", "wan21_t2v_14b": "t2v 14b", "wan21_i2v_14b_480p": "i2v 480p",
    "wan21_i2v_14b_720p": "i2v 720p",
})
_BORROWED = MappingProxyType({
    "wan21_t2i_14b": "t2v 14b", "wan21_vace_1_3b": "t2v 1.3b", "wan22_ti2v_5b": "ti2v 5b",
    **dict.fromkeys(("wan21_vace_14b", "wan21_flf2v_14b", "wan22_t2v_a14b", "wan22_i2v_a14b", "wan22_s2v_14b",
                     "wan22_animate_14b"), "i2v 720p"),
})

# How many steps of an expert are computed before the first one may be reused, with and without retention steps.
_RETENTION_STEPS, _FIRST_STEPS = 5, 1


def is_published(preset: str) -> bool:
    """Whether TeaCache's authors published coefficients for a preset; others are carried over from another model."""
    return preset in _PUBLISHED


@dataclass(frozen=True)
class TeaCache:
    """Reuse while the accumulated change that is expected of the output stays below `threshold`.

    With `retention` the first five steps of an expert are computed and the projected time embedding decides, otherwise
    the first and the run's last step are, and the plain one decides. Without a `measured` polynomial the preset's is
    taken. `start` and `end` are sigmas. Raises ValueError for a range or a threshold that cannot be.
    """

    threshold: float
    retention: bool = True
    start: float = 1.0
    end: float = 0.0
    measured: Calibration | None = None

    def __post_init__(self) -> None:
        check_range(self.start, self.end, self.threshold)

    def __str__(self) -> str:
        details = ["with retention steps" if self.retention else "without retention steps",
                   *(["measured coefficients"] if self.measured else [])]
        return described("TeaCache", self.threshold, details, self.start, self.end)

    @classmethod
    def for_preset(cls, preset: str, quality: str = "balanced", retention: bool | None = None,
                   measured: Calibration | None = None) -> "TeaCache":
        """The thresholds for a preset: published ones where there are any; retention steps unless the authors advise
        against them (1.3B) or no coefficients for them exist (5B).

        Raises ValueError for a preset without coefficients and for an unknown quality.
        """
        name, measured = _set_of(preset), measured or bundled(preset)
        if measured is not None:
            measured.check_preset(preset)
            return cls(of_quality(_MEASURED_THRESHOLDS, quality), retention is not False, measured=measured)
        if name is None:
            raise ValueError(_missing(preset))
        if retention is None:
            retention = name not in ("t2v 1.3b", "ti2v 5b")
        thresholds = _THRESHOLDS[name].get("e0" if retention else "e", _THRESHOLDS["i2v 720p"]["e0"])
        return cls(of_quality(thresholds, quality), retention)

    @property
    def signal(self) -> str:
        """See `PlannedCache`."""
        return "e0" if self.retention else "e"

    def plan(self, steps: RunSteps, expert: str, signals: Sequence[Tensor] | None) -> dict[str, tuple[bool, ...]]:
        """See `PlannedCache.plan`."""
        own = steps.of_expert(expert)
        if len(signals or ()) != len(own):
            raise ValueError(f"{len(signals or ())} time embeddings for the {len(own)} steps of expert {expert!r}; "
                             "expected one for each.")
        expect = self._expectation(steps.preset, expert)
        expected = [0.0] + [expect(relative_change(new, old)) for old, new in zip(signals, signals[1:])]
        position = {index: count for count, index in enumerate(own)}
        first, last = _RETENTION_STEPS if self.retention else _FIRST_STEPS, len(steps.sigmas) - 1
        may_skip = [inside and position.get(index, 0) >= first and (self.retention or index != last)
                    for index, inside in enumerate(steps.inside(self.start, self.end))]

        def decide(_branch: str, stretch: list[int]) -> tuple[bool, ...]:
            return teacache_skips([expected[position[index]] for index in stretch],
                                  [may_skip[index] for index in stretch], self.threshold)

        return plan_stretches(steps, expert, decide)

    def _expectation(self, preset: str, expert: str) -> Callable[[float], float]:
        """From the time embedding's relative change to the one that is expected of the output."""
        if self.measured is not None:
            self.measured.check_preset(preset)
            return self.measured.polynomial(expert, self.signal)
        name = _set_of(preset)
        if name is None:
            raise ValueError(_missing(preset))
        # For the projected embedding of TI2V 5B only VideoX-Fun has an answer: the set that it takes for all of 2.2.
        coefficients = _COEFFICIENTS[name].get(self.signal, _COEFFICIENTS["i2v 720p"]["e0"])
        return lambda change: polynomial(coefficients, change)


def relative_change(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old| over whole tensors of any shape."""
    return float((new - old).abs().mean() / old.abs().mean())


def teacache_skips(expected: Sequence[float], may_skip: Sequence[bool], threshold: float) -> tuple[bool, ...]:
    """TeaCache's rule on the calls of one branch: which of them reuse.

    `expected[i]` is the change that is expected of the output from call i - 1 to call i. It is added up as it is,
    negative values too, from the last computed call on. The first call has nothing to reuse.
    """
    skips, total = [], 0.0
    for index, (change, allowed) in enumerate(zip(expected, may_skip, strict=True)):
        total += change
        # Written so that a sum that is not a number computes.
        skips.append(bool(index) and allowed and total < threshold)
        if not skips[-1]:
            total = 0.0
    return tuple(skips)


def _set_of(preset: str) -> str | None:
    return _PUBLISHED.get(preset) or _BORROWED.get(preset)


def _missing(preset: str) -> str:
    return (f"TeaCache has no coefficients for {preset}. Choose EasyCache, which needs none, or give a calibration "
            "that was measured on this model.")
