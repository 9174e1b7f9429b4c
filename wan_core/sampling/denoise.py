"""The denoising loop: one loop for single models and for expert pairs.

At each step the expert is chosen by the timestep (Wan2.2 `wan/text2video.py`: the high-noise expert at or above
boundary * 1000), its velocity is guided away from the negative prompt, and the solver takes the step. What is shown,
saved or stopped from outside enters through two callables; the loop knows no host.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..conditioning import KnownLatents, TextCondition, active
from ..dit import ModelInputs, TextTokens, WanTransformer
from .guidance import Guidance, classifier_free_guidance, needs_uncond
from .schedules import Schedule
from .solvers import SOLVERS

OnBlock = Callable[[int], None]


class Experts(Protocol):
    """The transformers of a run. `name_at` is 'high' or 'low'; `get` makes that one ready on the run's device, and
    `expect` says that it will be asked for next. `chunk` bounds the tokens that are worked on at a time."""

    @property
    def chunk(self) -> int | None: ...

    def name_at(self, timestep: float) -> str: ...

    def get(self, name: str, sigma: float) -> WanTransformer: ...

    def state(self, name: str, sigma: float) -> Hashable: ...

    def expect(self, name: str) -> None: ...


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
class Conditions:
    """What a run is guided by: prompts to move towards and, unless all guidance scales are 1, to move away from, with
    what holds beside each of them; and the part of the result that is known already, if any."""

    positive: Sequence[TextCondition]
    negative: Sequence[TextCondition] = ()
    known: KnownLatents | None = None


@torch.no_grad()
def denoise(experts: Experts, latents: Tensor, schedule: Schedule, conditions: Conditions, guidance: Guidance, *,
            solver: str = "unipc", backend: str = "sdpa", on_step: Callable[[Step], None] | None = None,
            on_block: OnBlock | None = None) -> Tensor:
    """Carry `latents` (normalised, at the schedule's first noise level, on the run's device) to its last.

    Returns float32 latents of the same shape. `on_step` is called after each step, `on_block` before each transformer
    block; either may raise to stop the run. Raises ValueError for an unknown solver or missing conditions.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}.")
    names = [experts.name_at(float(timestep)) for timestep in schedule.timesteps]
    if not conditions.negative and any(needs_uncond(guidance.scale_for(name)) for name in names):
        raise ValueError("guidance above 1 needs a negative prompt (it may be empty), and none was given.")
    run, sample = SOLVERS[solver](schedule), latents.float()
    known = conditions.known and conditions.known.to(sample.device)
    prepared = _Prepared()
    for index, name in enumerate(names):
        # The last step's expert must not be held here while the next one is made ready: there is room for one.
        model = None
        sigma = float(schedule.sigmas[index])
        model = experts.get(name, sigma)
        prepared.hold_for(experts.state(name, sigma))
        timestep = schedule.timesteps[index].to(sample.device).expand(sample.shape[0])
        if known:
            sample, timestep = known.blend(sample, sigma), known.timesteps(timestep)

        def velocity_for(branch: Sequence[TextCondition]) -> Tensor:
            total = 0.0
            for condition, share in active(branch, sigma):
                inputs = prepared.inputs(model, condition, sample, timestep, sigma)
                velocity = model(inputs, backend=backend, chunk=experts.chunk, on_block=on_block)
                total = velocity if share == 1 else total + velocity * share
            return total

        scale = guidance.scale_for(name)
        velocity = velocity_for(conditions.positive)
        if needs_uncond(scale):
            velocity = classifier_free_guidance(velocity, velocity_for(conditions.negative), scale)
        if names[index + 1:index + 2] not in ([], [name]):
            experts.expect(names[index + 1])
        if known:
            velocity = known.steer(velocity, sample, sigma)
        clean = sample - sigma * velocity
        sample = run.step(velocity, index, sample)
        if known:
            sample = known.blend(sample, float(schedule.sigmas[index + 1]))
        if on_step:
            on_step(Step(index, len(names), sigma, name, sample, clean))
    return sample


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
