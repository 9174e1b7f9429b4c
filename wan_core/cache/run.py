"""The state of a cache in one run: what is kept from step to step, and what is reused of it.

A step that fails is repeated, so a run's state is copied before a step and the copy takes its place behind it. What
blocks have added to the tokens, most of a gigabyte for each prompt at full size, is held once by all copies: whether a
step reuses it is known before, so a repeated step finds what it needs, or replaces it again.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Protocol

from torch import Tensor

from .auto import AutoCache, StepCache
from .calibration import SIGNALS
from .easycache import EasyCache, EasyState
from .measuring import Measuring, MeasuringRun
from .plan import PlannedCache, RunSteps

# The embedded times [N, D] and modulations [N, 6, D] of steps, given their indices.
Signals = Callable[[Sequence[int]], tuple[Tensor, Tensor]]


class Shortcut(Protocol):
    """What a transformer is given to skip its blocks with, see `wan_core.dit`."""

    def reused(self) -> Tensor | None: ...

    def keep(self, added: Callable[[], Tensor]) -> None: ...


# Computes a velocity with shortcuts for each of a branch's prompts, by number; None for none.
Compute = Callable[[Callable[[int], Shortcut | None]], Tensor]


class CacheRun(Protocol):
    """The state of a cache in one run. `copy.copy` gives its state at that moment."""

    # The branches that were reused in the step that began last.
    reused: tuple[str, ...]

    def begin(self, index: int, signals: Signals) -> None:
        """Step `index` begins. `signals` embeds the times of steps of the same expert."""

    def velocity(self, branch: str, latents: Tensor, compute: Compute) -> Tensor:
        """The velocity of the noisy `latents` for a branch, computed or reused, of the same shape and type."""

    def to_host(self) -> None:
        """Hold what is large on the host from now on: memory has run out."""

    def state_dict(self) -> dict[str, Tensor] | None:
        """What the next step needs; None where that is too much to be saved, a few steps long."""

    def load_state_dict(self, state: dict[str, Tensor], index: int) -> None:
        """Go on behind `index` steps. Raises ValueError where `state` is not that of such a run."""


def begin_cache(cache: StepCache | Measuring | None, steps: RunSteps) -> tuple[CacheRun | None, str]:
    """The state of `cache` before a run of `steps`, None where nothing will be reused, and a line for people.

    Raises ValueError where the cache has no numbers for the run's model.
    """
    if cache is None:
        return None, ""
    told = ""
    if isinstance(cache, AutoCache):
        cache, told = cache.choose(steps)
    if cache is None:
        return None, told
    if isinstance(cache, Measuring):
        return MeasuringRun(cache, steps), "every step is computed and measured"
    told = told or str(cache)
    return (EasyRun(cache.begin(steps)) if isinstance(cache, EasyCache) else PlannedRun(cache, steps)), told


class EasyRun:
    """A run of EasyCache, which decides at each step and keeps nothing that is larger than latents."""

    def __init__(self, state: EasyState) -> None:
        self._state = state
        self._index = self._decided = -1
        self.reused: tuple[str, ...] = ()

    def __copy__(self) -> "EasyRun":
        run = EasyRun(copy(self._state))
        run._index, run._decided, run.reused = self._index, self._decided, self.reused
        return run

    def begin(self, index: int, signals: Signals) -> None:
        self._index, self.reused = index, ()

    def velocity(self, branch: str, latents: Tensor, compute: Compute) -> Tensor:
        if self._decided != self._index:
            self._decided = self._index
            self._state.decide(self._index, latents)
        velocity = self._state.reused(branch, latents)
        if velocity is None:
            velocity = compute(lambda _prompt: None)
            self._state.computed(branch, latents, velocity)
        else:
            self.reused += (branch,)
        return velocity

    def to_host(self) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor] | None:
        return self._state.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], index: int) -> None:
        self._state.load_state_dict(state)


class PlannedRun:
    """A run of a cache that decides from times alone; it keeps what the blocks add to the tokens."""

    def __init__(self, cache: PlannedCache, steps: RunSteps) -> None:
        self._cache, self._steps = cache, steps
        self._plans: dict[str, dict[str, tuple[bool, ...]]] = {}
        self._held = _Held()
        self._index = -1
        self.reused: tuple[str, ...] = ()

    def begin(self, index: int, signals: Signals) -> None:
        expert = self._steps.experts[index]
        if expert not in self._plans:
            embedded = None
            if self._cache.signal is not None:
                embedded = signals(self._steps.of_expert(expert))[SIGNALS.index(self._cache.signal)].unbind()
            self._plans[expert] = self._cache.plan(self._steps, expert, embedded)
        self._index, self.reused = index, ()

    def velocity(self, branch: str, latents: Tensor, compute: Compute) -> Tensor:
        skips = self._is_reused(branch, self._index)
        is_next = self._is_reused(branch, self._index + 1)
        shortcuts: list[_Shortcut] = []

        def shortcut(prompt: int) -> Shortcut:
            shortcuts.append(_Shortcut(self._held, (branch, prompt), skips, is_next))
            return shortcuts[-1]

        velocity = compute(shortcut)
        if shortcuts and all(one.taken for one in shortcuts):
            self.reused += (branch,)
        return velocity

    def to_host(self) -> None:
        self._held.to_host()

    def state_dict(self) -> dict[str, Tensor] | None:
        following = self._index + 1
        branches = self._steps.branches[following] if following < len(self._steps.branches) else ()
        return None if any(self._is_reused(branch, following) for branch in branches) else {}

    def load_state_dict(self, state: dict[str, Tensor], index: int) -> None:
        if state:
            raise ValueError(f"the cache of this run saves nothing, and {sorted(state)[:3]} was saved")
        self._index = index - 1

    def _is_reused(self, branch: str, index: int) -> bool:
        """Whether step `index` is planned to be reused; another expert's steps, planned later, begin with computing."""
        if index >= len(self._steps.experts):
            return False
        plan = self._plans.get(self._steps.experts[index], {}).get(branch)
        return plan is not None and plan[index]


class _Held:
    """What blocks have added, by branch and prompt."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._on_host = False

    def get(self, key: tuple[str, int]) -> Tensor | None:
        return self._tensors.get(key)

    def put(self, key: tuple[str, int], added: Tensor) -> None:
        self._tensors[key] = added.cpu() if self._on_host else added

    def drop(self, key: tuple[str, int]) -> None:
        self._tensors.pop(key, None)

    def to_host(self) -> None:
        self._on_host = True
        self._tensors = {key: added.cpu() for key, added in self._tensors.items()}


class _Shortcut:
    """The way around the blocks for one prompt of a branch at one step."""

    def __init__(self, held: _Held, key: tuple[str, int], skips: bool, is_next: bool) -> None:
        self._held, self._key, self._skips, self._is_next = held, key, skips, is_next
        self.taken = False

    def reused(self) -> Tensor | None:
        added = self._held.get(self._key) if self._skips else None
        if added is None:
            # Nobody needs it any more, and the blocks have more room.
            self._held.drop(self._key)
        self.taken = added is not None
        return added

    def keep(self, added: Callable[[], Tensor]) -> None:
        if self._is_next:
            self._held.put(self._key, added())
