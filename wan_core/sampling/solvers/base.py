"""What all solvers share: the order of the steps, what is remembered of them, saving and going on, and checks."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..schedules import Schedule


class Solver(ABC):
    """One run through a schedule, and what it remembers of its earlier steps; make a new one for every run.

    Subclasses say what they need from how many earlier steps (`remembers` of what `keeps` names), how to advance one
    step, and whether they add noise on the way (`draws_noise`), the same for the same `seed`, which has up to 64 bits.
    What is remembered is replaced and never written to, so `copy.copy` of a solver is its state at that moment.
    """

    name: str
    remembers: int
    keeps: str = "clean"
    draws_noise: bool = False

    def __init__(self, schedule: Schedule, seed: int = 0):
        self._sigmas: list[float] = schedule.sigmas.tolist()
        self._seed = seed
        self._next_index = 0
        self._past: list[Tensor] = []  # clean estimates (or what `keeps` says) of the steps done, the latest first

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """Take step `index`, from sigma[index] to sigma[index + 1].

        velocity: the transformer's output for `sample`, same shape, any floating dtype. index: 0, 1, 2 ... in order.
        sample: fp32 latents at sigma[index], any shape. Returns new fp32 latents at sigma[index + 1]; neither argument
        is written to. Raises ValueError for a step out of order or tensors that do not fit. A step that fails, for want
        of memory too, leaves the solver as it was, and can be taken again.
        """
        self._check_step(velocity, index, sample)
        velocity = velocity.float()
        # A state loaded from a file lies on the CPU.
        self._to(sample.device)
        advanced = self._advance(velocity, index, sample)
        self._next_index = index + 1
        return advanced

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a run needs to go on from here, as tensors under names that begin with the solver's.

        The tensors are not changed by later steps. Load them into a new solver made with the same schedule and seed.
        """
        state = {"index": torch.tensor(self._next_index), "sigmas": torch.tensor(self._sigmas, dtype=torch.float32)}
        state |= {f"{self.keeps}.{age}": past.detach() for age, past in enumerate(self._past)}
        return {f"{self.name}.{key}": value for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]):
        """Go on where the run that made `state` stood; the remaining steps are then the same bit for bit.

        Raises ValueError where the state is of another solver or schedule, or incomplete.
        """
        for key in ("index", "sigmas"):
            if f"{self.name}.{key}" not in state:
                raise ValueError(
                    f"this is no saved state of the {self.name} solver: no {self.name}.{key} among "
                    f"{sorted(state)[:5]}; resume with the solver that the run began with"
                )
        sigmas = state[f"{self.name}.sigmas"].tolist()
        if sigmas != self._sigmas:
            raise ValueError(
                f"the saved run has {len(sigmas) - 1} steps from sigma {sigmas[0]:.4f} to {sigmas[-1]:.4f}, this one "
                f"{len(self._sigmas) - 1} from {self._sigmas[0]:.4f} to {self._sigmas[-1]:.4f}, and they differ; "
                "resume with the same steps, shift and denoise"
            )
        index = int(state[f"{self.name}.index"])
        expected = {f"{self.name}.{key}" for key in ("index", "sigmas", *self._tensor_keys(index))}
        if not 0 <= index < len(sigmas) or set(state) != expected:
            raise ValueError(
                f"the saved state of step {index} holds {sorted(state)} where {sorted(expected)} are needed; "
                "it is damaged, start the run again"
            )
        self._restore(index, {key: state[f"{self.name}.{key}"] for key in self._tensor_keys(index)})

    @abstractmethod
    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """The sample after step `index`; all arguments are checked, velocity is fp32. Nothing is remembered before all
        is computed."""

    def _tensor_keys(self, index: int) -> list[str]:
        """What the state holds besides index and sigmas when `index` steps are done."""
        return [f"{self.keeps}.{age}" for age in range(min(index, self.remembers))]

    def _restore(self, index: int, tensors: dict[str, Tensor]):
        self._next_index = index
        self._past = [tensors[f"{self.keeps}.{age}"].clone() for age in range(min(index, self.remembers))]

    def _to(self, device: torch.device):
        self._past = [past.to(device) for past in self._past]

    def _remember(self, latest: Tensor):
        self._past = [latest, *self._past][: self.remembers]

    def _check_step(self, velocity: Tensor, index: int, sample: Tensor):
        steps = len(self._sigmas) - 1
        if index != self._next_index or index >= steps:
            due = f"step {self._next_index}" if self._next_index < steps else "none, the run is done"
            raise ValueError(f"step {index} of {steps} was asked for, but due is {due}; make a new solver for each run")
        if sample.dtype != torch.float32:
            raise ValueError(f"the sample must be fp32, got {sample.dtype}; convert it with .float()")
        if velocity.shape != sample.shape or not velocity.is_floating_point():
            raise ValueError(
                f"the velocity must be a floating tensor of the sample's shape {tuple(sample.shape)}, got "
                f"{velocity.dtype} of shape {tuple(velocity.shape)}; crop or unpack the transformer's output first"
            )
        if velocity.device != sample.device:
            raise ValueError(
                f"the velocity is on {velocity.device}, the sample on {sample.device}; move both to one device"
            )
        if self._past and self._past[0].shape != sample.shape:
            raise ValueError(
                f"the sample has shape {tuple(sample.shape)}, in earlier steps of this run it had "
                f"{tuple(self._past[0].shape)}; make a new solver for each run"
            )


def blend(sample: Tensor, mean: Tensor, ratio: float) -> Tensor:
    """Where a step of `ratio` = next sigma / sigma ends if `mean` is the mean clean estimate on its way."""
    return ratio * sample + (1 - ratio) * mean
