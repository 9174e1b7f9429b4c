"""What the step caches know of a run before it begins, what they decide from it, and the report of what was reused.

A step cache saves transformer calls: where little has changed since the last one, what the blocks (TeaCache, MagCache)
or the whole transformer (EasyCache) added then is added again. All are lossy; each says by a threshold how much so.

Steps are counted over the whole schedule. Where a run takes only a part of it, or a branch of the guidance is not
computed at some steps, `RunSteps.branches` leaves it out there, and nothing is reused over such a gap: it would be
too old, or not exist.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

# How much a cache may change the result, from the least to the most, and so how much it saves.
QUALITIES = ("quality", "balanced", "fast")

# How many runs of steps a report names before it breaks off.
_SHOWN = 10

T = TypeVar("T")


@dataclass(frozen=True)
class RunSteps:
    """The steps of a run: the preset's name, and for each of the n steps sigma, expert and the branches that run.

    `sigmas` are without the last 0, `experts` are "high" or "low", `branches` such as ("positive", "negative"); no
    branch runs at a step that is not a part of this run. `known_frames` says that frames are given at timestep 0, as in
    TI2V image to video. Raises ValueError for lists of different lengths.
    """

    preset: str
    sigmas: tuple[float, ...]
    experts: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]
    known_frames: bool = False

    def __post_init__(self) -> None:
        if not len(self.sigmas) == len(self.experts) == len(self.branches):
            raise ValueError(f"{len(self.sigmas)} noise levels, {len(self.experts)} experts and {len(self.branches)} "
                             "lists of branches; expected one of each for every step.")

    @property
    def branch_names(self) -> tuple[str, ...]:
        """All branches, in the order in which they first run."""
        return tuple(dict.fromkeys(name for names in self.branches for name in names))

    def of_expert(self, expert: str) -> tuple[int, ...]:
        """The steps of one expert."""
        return tuple(index for index, name in enumerate(self.experts) if name == expert)

    def inside(self, start: float, end: float) -> tuple[bool, ...]:
        """For each step, whether start >= sigma >= end."""
        return tuple(start >= sigma >= end for sigma in self.sigmas)

    def stretches(self, expert: str, branch: str) -> list[list[int]]:
        """The steps of one expert at which a branch runs, each list without a gap."""
        found: list[list[int]] = []
        for index in self.of_expert(expert):
            if branch not in self.branches[index]:
                continue
            if found and found[-1][-1] == index - 1:
                found[-1].append(index)
            else:
                found.append([index])
        return found


class PlannedCache(Protocol):
    """A cache whose decisions are known before an expert's first step.

    Only steps with start >= sigma >= end may be reused. `signal` names the time embedding that decides: "e" [B, D]
    (behind the time embedding), "e0" [B, 6, D] (behind the time projection), or None.
    """

    start: float
    end: float

    @property
    def signal(self) -> str | None: ...

    def plan(self, steps: RunSteps, expert: str, signals: Sequence[Tensor] | None) -> dict[str, tuple[bool, ...]]:
        """For each branch and each of the n steps, whether what the blocks added last time is added again; False at the
        other expert's steps.

        `signals` are the time embeddings of all steps of this expert in their order (float32), where `signal` asks for
        one; with frames that are known, of the other frames' timestep alone. Raises ValueError where the cache has no
        numbers for the run's model.
        """


def plan_stretches(steps: RunSteps, expert: str,
                   decide: Callable[[str, list[int]], Sequence[bool]]) -> dict[str, tuple[bool, ...]]:
    """The decisions of all branches, `decide(branch, its steps without a gap)` being those of one stretch."""
    plan = {}
    for branch in steps.branch_names:
        reused = [False] * len(steps.sigmas)
        for stretch in steps.stretches(expert, branch):
            for index, reuse in zip(stretch, decide(branch, stretch), strict=True):
                reused[index] = reuse
        plan[branch] = tuple(reused)
    return plan


def check_range(start: float, end: float, threshold: float) -> None:
    """Raise ValueError unless 1 >= start >= end >= 0 and the threshold is above 0."""
    if not 1 >= start >= end >= 0:
        raise ValueError(f"a step cache from sigma {start} to {end}; expected 1 >= start >= end >= 0.")
    if not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"a step cache with threshold {threshold}; expected a number above 0. Use no cache to compute "
                         "every step.")


def described(name: str, threshold: float, details: Sequence[str], start: float, end: float) -> str:
    """Words for people: 'MagCache, threshold 0.12, at most 4 in a row', and the range of sigmas if it is not all."""
    span = [] if (start, end) == (1, 0) else [f"sigma {start:g} to {end:g}"]
    return ", ".join([name, f"threshold {threshold:g}", *details, *span])


def of_quality(values: Sequence[T], quality: str) -> T:
    """The one of three values that belongs to "quality", "balanced" or "fast". Raises ValueError for another name."""
    if quality not in QUALITIES:
        raise ValueError(f"unknown quality {quality!r} of a step cache; choose one of {', '.join(QUALITIES)}.")
    return values[QUALITIES.index(quality)]


@dataclass(frozen=True)
class Report:
    """Which steps reuse: for each branch, at how many steps it runs and at which of them (from 0) it reuses."""

    branches: tuple[tuple[str, int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, steps: Mapping[int, tuple[Sequence[str], Sequence[str]]]) -> "Report":
        """Of steps by index: the branches of each, and those of them that were reused."""
        names = dict.fromkeys(name for branches, _ in steps.values() for name in branches)
        return cls(tuple((name, sum(name in branches for branches, _ in steps.values()),
                          tuple(index for index, (_, reused) in sorted(steps.items()) if name in reused))
                         for name in names))

    @property
    def share(self) -> float:
        """The share of transformer calls that are saved, 0..1."""
        calls = sum(count for _, count, _ in self.branches)
        return sum(len(reused) for *_, reused in self.branches) / calls if calls else 0.0

    def __str__(self) -> str:
        """A line for people, steps counted from 1: '18 of 50 steps reused: 7-9, 11-13'."""
        lines = {branch: _line(count, reused) for branch, count, reused in self.branches}
        if len(set(lines.values())) == 1:
            return next(iter(lines.values()))
        return "; ".join(f"{branch} {line}" for branch, line in lines.items()) or "no step reused"


def _line(count: int, reused: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for index in reused:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index + 1, index + 1])
    names = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    where = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    return f"{len(reused)} of {count} steps reused" + (f": {where}" if where else "")
