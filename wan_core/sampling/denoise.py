"""The denoising loop: one loop for single models and for expert pairs.

At each step the expert is chosen by the timestep (Wan2.2 `wan/text2video.py`: the high-noise expert at or above
boundary * 1000), its velocity is guided away from the negative prompt, and the solver takes the step. What is shown,
saved or stopped from outside enters through callables; the loop knows no host.

A step that fails for want of memory is repeated by experts that need less, one that gives NaN or infinite values with
PyTorch's own attention. So a step writes to nothing that was there before it: sample and solver are replaced when all
of it has been computed.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..conditioning import KnownLatents, TextCondition, active
from ..dit import ModelInputs, TextTokens, WanTransformer
from .guidance import Guidance, classifier_free_guidance, needs_uncond
from .schedules import Schedule
from .solvers import SOLVERS, Solver

log = logging.getLogger(__name__)

OnBlock = Callable[[int], None]

# The attention that is trusted where another one has given values that are not finite.
TRUSTED_BACKEND = "sdpa"


class Experts(Protocol):
    """The transformers of a run. `name_at` is 'high' or 'low'; `get` makes that one ready on the run's device, and
    `expect` says that it will be asked for next. `chunk` bounds the tokens that are worked on at a time."""

    @property
    def chunk(self) -> int | None: ...

    def name_at(self, timestep: float) -> str: ...

    def get(self, name: str, sigma: float) -> WanTransformer: ...

    def state(self, name: str, sigma: float) -> Hashable: ...

    def expect(self, name: str, sigma: float) -> None: ...

    def recover(self, error: Exception, shape: tuple[int, ...]) -> "Experts | None":
        """What a step on latents of `shape` [B, C, T, H, W] that failed with `error` is to be repeated with: the same
        experts with less memory, nothing of theirs being on the device. None where repeating would not help."""


@dataclass(frozen=True, eq=False)
class Step:
    """What `on_step` is told after a step.

    `latents` is the sample after the step and `clean` the model's estimate of the noise-free result, both normalised
    [B, C, T, H, W] on the run's device; `index` counts from 0.
    """

    index: int
    total: int
    sigma: float
    expert: str
    latents: Tensor
    clean: Tensor


@dataclass(frozen=True, eq=False)
class Progress:
    """A run between two steps: all that is needed to go on from there.

    `index` steps are done, `solver` has taken them, and `latents` [B, C, T, H, W] is the sample that they made. With
    `backend` and `chunk` the last one was computed; other ones would round otherwise.
    """

    index: int
    latents: Tensor
    solver: Solver
    backend: str
    chunk: int | None


@dataclass(frozen=True, eq=False)
class Conditions:
    """What a run is guided by: prompts to move towards and, unless all guidance scales are 1, to move away from, with
    what holds beside each of them; and the part of the result that is known already, if any."""

    positive: Sequence[TextCondition]
    negative: Sequence[TextCondition] = ()
    known: KnownLatents | None = None


class NotFinite(ValueError):
    """A step gave NaN or infinite values, with the attention that is trusted too; `expert` computed it."""

    def __init__(self, step: Step, backend: str) -> None:
        self.expert = step.expert
        super().__init__(f"step {step.index + 1} of {step.total} (sigma {step.sigma:.4f}, expert {step.expert!r}, "
                         f"attention {backend!r}) gave NaN or infinite values")


@torch.no_grad()
def denoise(experts: Experts, latents: Tensor, schedule: Schedule, conditions: Conditions, guidance: Guidance, *,
            solver: str = "unipc", backend: str = "sdpa", device: torch.device | None = None,
            begin: Progress | None = None, on_progress: Callable[[Progress], None] | None = None,
            on_step: Callable[[Step], None] | None = None, on_block: OnBlock | None = None) -> Tensor:
    """Carry `latents` (normalised, at the schedule's first noise level) to its last, on `device` (theirs, if None).

    Returns float32 latents of the same shape. `begin`, from an earlier run, takes the place of `latents`, solver and
    backend, and the run goes on from there. After each step come `on_progress` and `on_step`, before each transformer
    block `on_block`; any of them may raise to stop the run. Raises ValueError for an unknown solver or missing
    conditions, and where a step gives NaN or infinite values even with plain attention.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}.")
    names = [experts.name_at(float(timestep)) for timestep in schedule.timesteps]
    if not conditions.negative and any(needs_uncond(guidance.scale_for(name)) for name in names):
        raise ValueError("guidance above 1 needs a negative prompt (it may be empty), and none was given.")
    at = begin or Progress(0, latents, SOLVERS[solver](schedule), backend, experts.chunk)
    run = _Run(experts, schedule, conditions, guidance, names, at.backend, device or latents.device, on_block)
    while at.index < len(names):
        at, step = run.advance(at)
        if on_progress:
            on_progress(at)
        if on_step:
            on_step(step)
    return at.latents


class _Run:
    """What the steps of a run share. Experts and attention are replaced when a step cannot be computed with them."""

    def __init__(self, experts: Experts, schedule: Schedule, conditions: Conditions, guidance: Guidance,
                 names: Sequence[str], backend: str, device: torch.device, on_block: OnBlock | None) -> None:
        self._experts, self._schedule, self._conditions, self._guidance = experts, schedule, conditions, guidance
        self._names, self._backend, self._device, self._on_block = names, backend, device, on_block
        self._known: KnownLatents | None = None
        self._prepared = _Prepared()

    def advance(self, at: Progress) -> tuple[Progress, Step]:
        """The run one step on; the step is computed as often as it takes, always from `at`, which is not written to."""
        while True:
            try:
                after, step, is_finite = self._compute(at)
            except Exception as error:
                # What was prepared lies on the device, and came from weights that will not be there any more.
                self._prepared = _Prepared()
                recovered = self._experts.recover(error, tuple(at.latents.shape))
                if recovered is None:
                    raise
                self._experts = recovered
                continue
            if is_finite:
                return after, step
            if self._backend == TRUSTED_BACKEND:
                raise NotFinite(step, self._backend)
            log.warning("Step %d of %d gave NaN or infinite values with attention %r; it is repeated, and the run goes "
                        "on, with %r.", step.index + 1, step.total, self._backend, TRUSTED_BACKEND)
            self._backend = TRUSTED_BACKEND

    def _compute(self, at: Progress) -> tuple[Progress, Step, bool]:
        """The run after one step, what is told of it, and whether its numbers are finite. Whatever a step needs of
        memory is taken in here, and held by nobody else if it fails: there is room for one expert at a time."""
        index, name, sigma = at.index, self._names[at.index], float(self._schedule.sigmas[at.index])
        model = self._experts.get(name, sigma)
        self._prepared.hold_for(self._experts.state(name, sigma))
        sample = at.latents.to(self._device, torch.float32)
        # On the host, where the transformer looks at it: a device would have to be waited for.
        timestep = self._schedule.timesteps[index].expand(sample.shape[0])
        if self._conditions.known and self._known is None:
            self._known = self._conditions.known.to(self._device)
        known = self._known
        if known:
            sample, timestep = known.blend(sample, sigma), known.timesteps(timestep)
        velocity = self._guided(model, name, sample, timestep, sigma)
        if self._names[index + 1:index + 2] not in ([], [name]):
            self._experts.expect(self._names[index + 1], float(self._schedule.sigmas[index + 1]))
        if known:
            velocity = known.steer(velocity, sample, sigma)
        clean = sample - sigma * velocity
        solver = copy(at.solver)
        sample = solver.step(velocity, index, sample)
        if known:
            sample = known.blend(sample, float(self._schedule.sigmas[index + 1]))
        after = Progress(index + 1, sample, solver, self._backend, self._experts.chunk)
        return after, Step(index, len(self._names), sigma, name, sample, clean), bool(sample.isfinite().all())

    def _guided(self, model: WanTransformer, name: str, sample: Tensor, timestep: Tensor, sigma: float) -> Tensor:
        scale = self._guidance.scale_for(name)
        velocity = self._velocity(model, self._conditions.positive, sample, timestep, sigma)
        if not needs_uncond(scale):
            return velocity
        uncond = self._velocity(model, self._conditions.negative, sample, timestep, sigma)
        return classifier_free_guidance(velocity, uncond, scale)

    def _velocity(self, model: WanTransformer, branch: Sequence[TextCondition], sample: Tensor, timestep: Tensor,
                  sigma: float) -> Tensor:
        """The mean velocity for the prompts of `branch` that hold at `sigma`."""
        total = 0.0
        for condition, share in active(branch, sigma):
            inputs = self._prepared.inputs(model, condition, sample, timestep, sigma)
            velocity = model(inputs, backend=self._backend, chunk=self._experts.chunk, on_block=self._on_block)
            total = velocity if share == 1 else total + velocity * share
        return total


class _Prepared:
    """What the conditions of a run have prepared, once for each state of the weights."""

    def __init__(self) -> None:
        self._done: dict[int, TextTokens | Tensor] = {}
        self._state: Hashable = None

    def hold_for(self, state: Hashable) -> None:
        """Forget what was prepared by weights in another state."""
        if state != self._state:
            self._done, self._state = {}, state

    def inputs(self, model: WanTransformer, condition: TextCondition, sample: Tensor, timestep: Tensor,
               sigma: float) -> ModelInputs:
        """The inputs of `model` for one prompt and what holds beside it."""
        def text() -> TextTokens:
            return model.prepare_text(condition.context.expand(sample.shape[0], -1, -1))

        inputs = ModelInputs(sample, timestep, self._once(condition, text))
        for other in condition.beside:
            prepared = self._once(other, lambda other=other: other.prepare(model, sample))
            inputs = other.add(inputs, prepared, sigma)
        return inputs

    def _once(self, condition: object, prepare: Callable[[], TextTokens | Tensor]) -> TextTokens | Tensor:
        if id(condition) not in self._done:
            self._done[id(condition)] = prepare()
        return self._done[id(condition)]
