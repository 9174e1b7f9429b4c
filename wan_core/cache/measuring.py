"""Measures on whole runs what the rules of MagCache and TeaCache have to know of a model.

Takes a cache's place in a run and reuses nothing. From step to step it compares what the blocks added to the tokens,
the velocities, and the embedded times. What is made of the numbers is `Calibration`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .calibration import SIGNALS, magnitude_ratio
from .plan import RunSteps
from .teacache import relative_change


@dataclass(frozen=True)
class Measured:
    """How a branch of step `index`, computed by `expert`, compares with that of the step before.

    `magnitude` is the ratio of what the blocks have added (see `magnitude_ratio`), `output` the relative L1 change of
    the velocity, `signals` those of the embedded times, by name. None and empty at the first step, and the last two at
    an expert's first step.
    """

    index: int
    expert: str
    branch: str
    magnitude: float | None
    output: float | None
    signals: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Measuring:
    """In place of a step cache: tells `on_measured` of every branch of every step. A step that is repeated is told
    again."""

    on_measured: Callable[[Measured], None]


class MeasuringRun:
    """A run that is measured, see `CacheRun`. What it remembers is replaced and never written to."""

    def __init__(self, measuring: Measuring, steps: RunSteps) -> None:
        self._measuring, self._steps = measuring, steps
        self._index = -1
        self._signals: dict[str, Tensor] = {}
        self._changes: dict[str, float] = {}
        self._added: dict[str, Tensor] = {}
        self._velocities: dict[str, Tensor] = {}
        self.reused: tuple[str, ...] = ()

    def begin(self, index: int, signals: Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]) -> None:
        """See `CacheRun.begin`."""
        if index and self._steps.experts[index] != self._steps.experts[index - 1]:
            self._signals, self._velocities = {}, {}
        embedded = dict(zip(SIGNALS, signals((index,))))
        self._changes = {name: relative_change(signal, self._signals[name]) for name, signal in embedded.items()
                         if name in self._signals}
        self._index, self._signals = index, embedded

    def velocity(self, branch: str, latents: Tensor, compute: Callable) -> Tensor:
        """See `CacheRun.velocity`. Of several prompts of a branch the first one is measured."""
        probe = _Probe(self._added.get(branch))
        velocity = compute(lambda prompt: None if prompt else probe)
        before = self._velocities.get(branch)
        self._measuring.on_measured(Measured(
            self._index, self._steps.experts[self._index], branch, probe.magnitude,
            None if before is None else relative_change(velocity, before), self._changes))
        if probe.added is not None:
            self._added = {**self._added, branch: probe.added}
        self._velocities = {**self._velocities, branch: velocity}
        return velocity

    def to_host(self) -> None:
        """See `CacheRun.to_host`."""
        self._added = {branch: added.cpu() for branch, added in self._added.items()}

    def state_dict(self) -> None:
        """See `CacheRun.state_dict`: a run that is measured is not taken up again."""
        return None

    def load_state_dict(self, state: dict[str, Tensor], index: int) -> None:
        """See `CacheRun.load_state_dict`."""
        raise ValueError("a run that is measured cannot go on from a saved one; begin it anew.")


class _Probe:
    """A way around the blocks that is never taken, and sees what they add."""

    def __init__(self, before: Tensor | None) -> None:
        self._before = before
        self.added: Tensor | None = None
        self.magnitude: float | None = None

    def reused(self) -> None:
        return None

    def keep(self, added: Callable[[], Tensor]) -> None:
        self.added = added()
        if self._before is not None:
            self.magnitude = magnitude_ratio(self.added, self._before.to(self.added.device))[0]
