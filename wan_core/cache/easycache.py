"""EasyCache: reuses the difference between velocity and latents while the velocity would have changed little.

Between neighbouring steps the velocity changes about as much as the latents do, times a rate that is measured at the
last two computed steps. The changes that this predicts are added up, relative to the velocity, until they pass a
threshold. It needs no numbers of the model, and skips the whole transformer, not its blocks alone.

Decided while a run goes on, by the first branch of each step; the others follow. Latents are the noisy video alone,
[B, 16 or 48, T, H, W], without the channels that image to video adds. All is float32.

Reference: Zhou et al. 2025 (arXiv:2507.02860) and easycache_generate.py for Wan 2.1 of H-EmbodVis/EasyCache. Their code
for expert pairs goes on over the switch; here an expert never reuses what the other one gave.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import RunSteps, check_range, described, of_quality

# For "quality", "balanced" and "fast": the middle is the authors' default, the last what they name as about twice as
# fast; the first is ours.
_THRESHOLDS = (0.03, 0.05, 0.1)

# State that is kept under its own name, see `EasyState.state_dict`.
_TENSORS = ("last_latents", "computed_latents", "computed_velocity")


@dataclass(frozen=True)
class EasyCache:
    """Reuse while the accumulated relative change that is expected of the velocity stays below `threshold`.

    The first `warm_up` (0..1) of the steps and the last one are computed; published are 10 of 50 steps. `start` and
    `end` are sigmas. Raises ValueError for settings that cannot be.
    """

    threshold: float = 0.05
    warm_up: float = 0.2
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_range(self.start, self.end, self.threshold)
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"an EasyCache that computes the first {self.warm_up} of the steps; expected 0 to 1.")

    def __str__(self) -> str:
        return described("EasyCache", self.threshold, [f"warm-up {self.warm_up:g}"], self.start, self.end)

    @classmethod
    def of_quality(cls, quality: str) -> "EasyCache":
        """The threshold for "quality", "balanced" or "fast". Raises ValueError for another name."""
        return cls(of_quality(_THRESHOLDS, quality))

    def begin(self, steps: RunSteps) -> "EasyState":
        """What the cache knows before the first step of a run."""
        return EasyState(self, steps)


class EasyState:
    """What EasyCache remembers of one run. `copy.copy` is its state at that moment: tensors are replaced and never
    written to, and none of them is the caller's.

    At each step: `decide`, then for each branch `reused`, and where that gives nothing `computed` with what the
    transformer gave.
    """

    def __init__(self, options: EasyCache, steps: RunSteps) -> None:
        self._options, self._steps = options, steps
        last, inside = len(steps.sigmas) - 1, steps.inside(options.start, options.end)
        # Half of a step rounds up.
        first = int(options.warm_up * len(steps.sigmas) + 0.5)
        self._may_skip = tuple(inside[index] and first <= index < last for index in range(len(inside)))
        self._index = -1
        self._forget()

    def decide(self, index: int, latents: Tensor) -> bool:
        """Whether step `index` reuses, `latents` [B, C, T, H, W] being the noisy sample that it begins with.

        To be called once at every step of the run, in their order.
        """
        if self._last_latents is not None and (self._last_latents.shape != latents.shape
                                               or self._steps.experts[index] != self._steps.experts[self._index]):
            self._forget()
        self.to(latents.device)
        self._index, previous = index, self._last_latents
        # A copy: the sample may be changed in place by whoever has it.
        self._last_latents = latents.detach().to(torch.float32, copy=True)
        self._skips = False
        if not self._may_skip[index]:
            self._total = 0.0
        elif previous is not None and self._computed_velocity is not None and self._rate is not None:
            change = (self._last_latents - previous).abs().mean() / self._computed_velocity.abs().mean()
            self._total += self._rate * float(change)
            self._skips = self._total < self._options.threshold
            if not self._skips:
                self._total = 0.0
        return self._skips

    def reused(self, branch: str, latents: Tensor) -> Tensor | None:
        """The velocity of `branch` from what it gave earlier, float32 of the latents' shape.

        None where it has to be computed: at a step that does not reuse, and in a branch that was not computed since
        the one that decides was.
        """
        decider = self._steps.branches[self._index][0]
        if not self._skips or self._computed_at.get(branch, -1) < self._computed_at[decider]:
            return None
        return latents.detach().float() + self._differences[branch]

    def computed(self, branch: str, latents: Tensor, velocity: Tensor) -> None:
        """Remember what the transformer gave for `branch` at this step: its velocity for the latents, same shape."""
        latents, velocity = latents.detach().float(), velocity.detach().to(torch.float32, copy=True)
        self._differences = {**self._differences, branch: velocity - latents}
        self._computed_at = {**self._computed_at, branch: self._index}
        if branch != self._steps.branches[self._index][0]:
            return
        if self._computed_velocity is not None:
            changes = ((one - other).abs().mean() for one, other in ((velocity, self._computed_velocity),
                                                                    (latents, self._computed_latents)))
            self._rate = float(next(changes) / next(changes))
        # The copy that `decide` made of the same latents.
        self._computed_latents, self._computed_velocity = self._last_latents, velocity

    def state_dict(self) -> dict[str, Tensor]:
        """All that the rest of the run needs, as tensors under names that begin with "easycache."; they are not
        changed by later steps. Load them into the new state of a run with the same steps."""
        state = {"index": torch.tensor(self._index), "total": torch.tensor(self._total, dtype=torch.float64)}
        if self._rate is not None:
            state["rate"] = torch.tensor(self._rate, dtype=torch.float64)
        state |= {name: tensor for name in _TENSORS if (tensor := getattr(self, f"_{name}")) is not None}
        if self._computed_latents is self._last_latents:
            # Behind a computed step they are one tensor, which a safetensors file takes once.
            state.pop("computed_latents", None)
        state |= {f"difference.{branch}": tensor for branch, tensor in self._differences.items()}
        state |= {f"computed_at.{branch}": torch.tensor(index) for branch, index in self._computed_at.items()}
        return {f"easycache.{name}": tensor for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the run that made `state` stood, with the same bits; tensors of others in it are left alone.

        Raises ValueError where it is incomplete, or of a run with other steps.
        """
        own = {name.removeprefix("easycache."): tensor for name, tensor in state.items()
               if name.startswith("easycache.")}

        def named(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{kind}."): tensor for name, tensor in own.items()
                    if name.startswith(f"{kind}.")}

        if not {"index", "total"} <= own.keys() or named("difference").keys() != named("computed_at").keys():
            raise ValueError("this is no whole saved state of EasyCache; begin the run anew.")
        if not -1 <= int(own["index"]) < len(self._may_skip):
            raise ValueError(f"the saved state of EasyCache stands at step {int(own['index']) + 1}, and this run has "
                             f"{len(self._may_skip)}; resume with the steps that the run began with.")
        self._index, self._skips, self._total = int(own["index"]), False, float(own["total"])
        self._rate = float(own["rate"]) if "rate" in own else None
        self._last_latents, self._computed_latents, self._computed_velocity = (
            tensor.clone() if (tensor := own.get(name)) is not None else None for name in _TENSORS)
        if self._computed_velocity is not None and self._computed_latents is None:
            self._computed_latents = self._last_latents
        self._differences = {branch: tensor.clone() for branch, tensor in named("difference").items()}
        self._computed_at = {branch: int(index) for branch, index in named("computed_at").items()}

    def to(self, device: torch.device) -> None:
        """Bring what is remembered to a device. `decide` does it, too: a state loaded from a file lies on the CPU."""
        self._last_latents, self._computed_latents, self._computed_velocity = (
            tensor if tensor is None else tensor.to(device)
            for tensor in (self._last_latents, self._computed_latents, self._computed_velocity))
        self._differences = {branch: tensor.to(device) for branch, tensor in self._differences.items()}

    def _forget(self) -> None:
        """As before the first step."""
        self._rate: float | None = None
        self._total, self._skips = 0.0, False
        self._last_latents: Tensor | None = None
        self._computed_latents: Tensor | None = None
        self._computed_velocity: Tensor | None = None
        self._differences: dict[str, Tensor] = {}
        self._computed_at: dict[str, int] = {}
