"""The denoising loop: one loop for single models and for expert pairs.

At each step the expert is chosen by the timestep (Wan2.2 `wan/text2video.py`: the high-noise expert at or above
boundary * 1000), its velocity is guided away from the negative prompt, and the solver takes the step. What is shown,
saved or stopped from outside enters through callables; the loop knows no host.

A step that fails for want of memory is repeated by experts that need less, one that gives NaN or infinite values with
PyTorch's own attention. So a step writes to nothing that was there before it: sample and solver are replaced when all
of it has been computed.
"""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..cache import CacheRun
from ..conditioning import KnownLatents, TextCondition, active
from ..dit import Attention, AttentionRange, ModelInputs, NegativeText, Radial, Shortcut, TextTokens, WanTransformer
from ..guidance import GuidanceOptions
from .batching import joined
from .guidance import Guidance, StepGuidance, guided_velocity, plan_guidance
from .schedules import Schedule
from .solvers import SOLVERS, Solver

log = logging.getLogger(__name__)

OnBlock = Callable[[int], None]

# The attention that is trusted where another one has given values that are not finite.
TRUSTED = Attention()


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
    [B, C, T, H, W] on the run's device; `index` counts from 0. `branches` are the passes through
    the transformer that the step is made of ("positive", "negative", ...), `reused` those that a cache has spared.
    """

    index: int
    total: int
    sigma: float
    expert: str
    latents: Tensor
    clean: Tensor
    branches: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Progress:
    """A run between two steps: all that is needed to go on from there.

    `index` steps are done, `solver` and `cache` have taken them, and `latents` [B, C, T, H, W] is the sample that they
    made. With `backend` and `chunk` the last one was computed; other ones would round otherwise. `average` is what
    guidance remembers (see `guided_velocity`). With `is_plain`, all other attention was given up.
    """

    index: int
    latents: Tensor
    solver: Solver
    backend: str
    chunk: int | None
    cache: CacheRun | None = None
    average: Tensor | None = None
    is_plain: bool = False


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
            options: GuidanceOptions = GuidanceOptions(), solver: str = "unipc", seed: int = 0, backend: str = "sdpa",
            ranges: Sequence[AttentionRange] = (), radial: Radial | None = None, cache: CacheRun | None = None,
            device: torch.device | None = None, begin: Progress | None = None,
            on_progress: Callable[[Progress], None] | None = None, on_step: Callable[[Step], None] | None = None,
            on_block: OnBlock | None = None) -> Tensor:
    """Carry `latents` (normalised, at the schedule's first noise level) to its last, on `device` (theirs, if None).

    Returns float32 latents of the same shape. `begin`, from an earlier run, takes the place of `latents`, solver,
    backend and cache, and the run goes on from there; `seed` is of the noise that a solver adds. `ranges` and `radial`
    say where attention is another than `backend`. After each step come `on_progress` and `on_step`, before each
    transformer block `on_block`; any of them may raise to stop the run. Raises ValueError for an unknown solver or
    missing conditions, and where a step gives NaN or infinite values even with plain attention.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}.")
    names = [experts.name_at(float(timestep)) for timestep in schedule.timesteps]
    steps = plan_guidance(guidance, options, schedule.sigmas[:-1].tolist(), names)
    if not conditions.negative and any(step.needs_negative for step in steps):
        raise ValueError("guidance above 1 needs a negative prompt (it may be empty), and none was given.")
    at = begin or Progress(0, latents, SOLVERS[solver](schedule, seed), backend, experts.chunk, cache)
    attention = Attention() if at.is_plain else Attention(at.backend, tuple(ranges), radial)
    run = _Run(experts, schedule, conditions, options, steps, names, attention, device or latents.device,
               on_block)
    while at.index < len(names):
        at, step = run.advance(at)
        if on_progress:
            on_progress(at)
        if on_step:
            on_step(step)
    return at.latents


class _Run:
    """What the steps of a run share. Experts and attention are replaced when a step cannot be computed with them."""

    def __init__(self, experts: Experts, schedule: Schedule, conditions: Conditions, options: GuidanceOptions,
                 steps: Sequence[StepGuidance], names: Sequence[str], attention: Attention, device: torch.device,
                 on_block: OnBlock | None) -> None:
        self._experts, self._schedule, self._conditions = experts, schedule, conditions
        self._options, self._steps = options, steps
        self._names, self._attention, self._device, self._on_block = names, attention, device, on_block
        self._known: KnownLatents | None = None
        self._joined: dict[tuple[int, int], TextCondition | None] = {}
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
                if at.cache:
                    at.cache.to_host()
                continue
            if is_finite:
                return after, step
            used = self._attention.at(step.sigma)
            if used == TRUSTED:
                raise NotFinite(step, TRUSTED.backend)
            log.warning("Step %d of %d gave NaN or infinite values with attention %s; it is repeated, and the run goes "
                        "on, with %r.", step.index + 1, step.total, used, TRUSTED.backend)
            self._attention = TRUSTED

    def _compute(self, at: Progress) -> tuple[Progress, Step, bool]:
        """The run after one step, what is told of it, and whether its numbers are finite. Whatever a step needs of
        memory is taken in here, and held by nobody else if it fails: there is room for one expert at a time."""
        index, name, sigma = at.index, self._names[at.index], float(self._schedule.sigmas[at.index])
        model, cache = self._experts.get(name, sigma), copy(at.cache)
        if cache:
            cache.begin(index, lambda steps: model.time_signals(self._schedule.timesteps[list(steps)]))
        self._prepared.hold_for(self._experts.state(name, sigma))
        sample = at.latents.to(self._device, torch.float32)
        # On the host, where the transformer looks at it: a device would have to be waited for.
        timestep = self._schedule.timesteps[index].expand(sample.shape[0])
        if self._conditions.known and self._known is None:
            self._known = self._conditions.known.to(self._device)
        known = self._known
        if known:
            sample, timestep = known.blend(sample, sigma), known.timesteps(timestep)
        velocity, average = self._guided(model, at, sample, timestep, cache)
        if self._names[index + 1:index + 2] not in ([], [name]):
            self._experts.expect(self._names[index + 1], float(self._schedule.sigmas[index + 1]))
        if known:
            velocity = known.steer(velocity, sample, sigma)
        clean = sample - sigma * velocity
        solver = copy(at.solver)
        sample = solver.step(velocity, index, sample)
        if known:
            sample = known.blend(sample, float(self._schedule.sigmas[index + 1]))
        after = Progress(index + 1, sample, solver, self._attention.backend, self._experts.chunk, cache, average,
                         self._attention == TRUSTED)
        step = Step(index, len(self._names), sigma, name, sample, clean, self._steps[index].cached,
                    cache.reused if cache else ())
        return after, step, bool(sample.isfinite().all())

    def _guided(self, model: WanTransformer, at: Progress, sample: Tensor, timestep: Tensor,
                cache: CacheRun | None) -> tuple[Tensor, Tensor | None]:
        """The guided velocity of the step behind `at`, and the average that the next one is given."""
        step, sigma = self._steps[at.index], float(self._schedule.sigmas[at.index])
        # Each expert has an average of its own, and they work one after the other.
        is_same = at.index and self._names[at.index - 1] == self._names[at.index]
        average = at.average if is_same else None
        if step.is_zero:
            return torch.zeros_like(sample), average
        # A cache keeps something for each branch.
        velocities = None if cache else self._both(model, step, sample, timestep, sigma)
        if velocities is None:
            velocities = {branch: self._velocity(model, step, branch, sample, timestep, sigma, cache)
                          for branch in step.branches}
        return guided_velocity(velocities, step, self._options, average)

    def _both(self, model: WanTransformer, step: StepGuidance, sample: Tensor, timestep: Tensor,
              sigma: float) -> dict[str, Tensor] | None:
        """Both prompts' velocities from one call, if that is wanted and only the text differs between them."""
        tokens = sample[:, 0].numel() // math.prod(model.spec.patch_size)
        differ = step.branches != ("positive", "negative") or step.skipped or step.nag
        if differ or not self._options.is_batched(sample.device.type, tokens):
            return None
        pair = [condition for prompts in (self._conditions.positive, self._conditions.negative)
                for condition, _ in active(prompts, sigma)]
        if len(pair) != 2:
            return None
        key = id(pair[0]), id(pair[1])
        if key not in self._joined:
            self._joined[key] = joined(*pair, sample.shape[0])
        both = self._joined[key]
        if both is None:
            return None
        inputs = self._prepared.inputs(model, both, torch.cat([sample, sample]), torch.cat([timestep, timestep]), sigma)
        attention = self._attention.at(sigma)
        velocity = model(inputs, backend=attention.backend, chunk=self._experts.chunk, on_block=self._on_block,
                         radial=attention.radial)
        return dict(zip(("positive", "negative"), velocity.chunk(2)))

    def _velocity(self, model: WanTransformer, step: StepGuidance, branch: str, sample: Tensor, timestep: Tensor,
                  sigma: float, cache: CacheRun | None) -> Tensor:
        """The mean velocity for the prompts of `branch`, one of `step`, that hold at `sigma`."""
        prompts = self._conditions.negative if branch == "negative" else self._conditions.positive
        attention, away = self._attention.at(sigma), None
        if step.nag and branch != "negative":
            strongest, _ = max(active(self._conditions.negative, sigma), key=lambda holding: holding[1])
            away = NegativeText(self._prepared.text(model, strongest, sample.shape[0]), step.nag)

        def compute(shortcut: Callable[[int], Shortcut | None]) -> Tensor:
            total = 0.0
            for condition, share in active(prompts, sigma):
                inputs = self._prepared.inputs(model, condition, sample, timestep, sigma)
                if away:
                    inputs = replace(inputs, text=replace(inputs.text, away=away))
                velocity = model(inputs, backend=attention.backend, chunk=self._experts.chunk, on_block=self._on_block,
                                 shortcut=shortcut(prompts.index(condition)), without=step.without(branch),
                                 radial=attention.radial)
                total = velocity if share == 1 else total + velocity * share
            return total

        return cache.velocity(step.cached_as(branch), sample, compute) if cache else compute(lambda _prompt: None)


class _Prepared:
    """What the conditions of a run have prepared, once for each state of the weights."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, int], TextTokens | Tensor] = {}
        self._state: Hashable = None

    def hold_for(self, state: Hashable) -> None:
        """Forget what was prepared by weights in another state."""
        if state != self._state:
            self._done, self._state = {}, state

    def inputs(self, model: WanTransformer, condition: TextCondition, sample: Tensor, timestep: Tensor,
               sigma: float) -> ModelInputs:
        """The inputs of `model` for one prompt and what holds beside it."""
        batch = sample.shape[0]
        inputs = ModelInputs(sample, timestep, self.text(model, condition, batch))
        for other in condition.beside:
            prepared = self._once(other, batch, lambda other=other: other.prepare(model, sample))
            inputs = other.add(inputs, prepared, sigma)
        return inputs

    def text(self, model: WanTransformer, condition: TextCondition, batch: int) -> TextTokens:
        """A prompt's text for a batch."""
        return self._once(condition, batch, lambda: model.prepare_text(condition.context.expand(batch, -1, -1)))

    def _once(self, condition: object, batch: int, prepare: Callable[[], TextTokens | Tensor]) -> TextTokens | Tensor:
        key = id(condition), batch
        if key not in self._done:
            self._done[key] = prepare()
        return self._done[key]
