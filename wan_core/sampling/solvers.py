"""Solvers of the sampling ODE `dx / dsigma = velocity(x, sigma)`, from noise at sigma 1 to a latent at sigma 0.

A transformer call at sigma s gives the velocity v and with it an estimate of the clean latent, `x - s * v`. With
`lambda = log((1 - sigma) / sigma)` the exact solution from s to t is

    x(t) = (t / s) * x(s) + (1 - t / s) * mean of the clean estimate over lambda(s)..lambda(t), weighted by e^lambda

so solvers differ only in how they extrapolate the clean estimate from earlier calls. Held constant, this is Euler's
step. A line through the last two estimates gives a second order step: DPM-Solver++(2M) puts half its slope for the
mean; UniPC takes the same predictor, and once the next estimate is known it redoes the step with it (the corrector),
at no extra transformer call. Written this way nothing overflows at sigma 1 (lambda minus infinity) or 0.

References: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 2), UniPC with B2(h) and data prediction
(Zhao et al. 2023, arXiv:2302.04867), and `wan/utils/fm_solvers.py`, `fm_solvers_unipc.py` of Wan 2.1 and 2.2, whose
results these reproduce. Coefficients are float64 numbers, tensors are fp32.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .schedules import Schedule


class Solver(ABC):
    """One run through a schedule, and what it remembers of its earlier steps; make a new one for every run.

    Subclasses say how many clean estimates they need from earlier steps (`remembers`) and how to advance one step.
    What is remembered is replaced and never written to, so `copy.copy` of a solver is its state at that moment.
    """

    name: str
    remembers: int

    def __init__(self, schedule: Schedule):
        self._sigmas: list[float] = schedule.sigmas.tolist()
        self._next_index = 0
        self._clean: list[Tensor] = []  # clean estimates of the steps done, the latest first

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

        The tensors are not changed by later steps. Load them into a new solver made with the same schedule.
        """
        state = {"index": torch.tensor(self._next_index), "sigmas": torch.tensor(self._sigmas, dtype=torch.float32)}
        state |= {f"clean.{age}": clean.detach() for age, clean in enumerate(self._clean)}
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
        return [f"clean.{age}" for age in range(min(index, self.remembers))]

    def _restore(self, index: int, tensors: dict[str, Tensor]):
        self._next_index = index
        self._clean = [tensors[f"clean.{age}"].clone() for age in range(min(index, self.remembers))]

    def _to(self, device: torch.device):
        self._clean = [clean.to(device) for clean in self._clean]

    def _remember(self, clean: Tensor):
        self._clean = [clean, *self._clean][: self.remembers]

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
        if self._clean and self._clean[0].shape != sample.shape:
            raise ValueError(
                f"the sample has shape {tuple(sample.shape)}, in earlier steps of this run it had "
                f"{tuple(self._clean[0].shape)}; make a new solver for each run"
            )

    def _predict(self, clean: Tensor, previous: Tensor | None, index: int, sample: Tensor) -> Tensor:
        """Second order step from sigma[index] with the slope of the last two clean estimates, first order without."""
        mean = clean
        # At sigma 0 lambda is infinite and a slope over it has no meaning. A schedule that ends above 0 keeps its
        # order to the end, so that its steps are the first steps of the longer run.
        if previous is not None and self._sigmas[index + 1] > 0:
            mean = clean + (0.5 * self._step_ratio(index)) * (clean - previous)
        return _blend(sample, mean, self._sigmas[index + 1] / self._sigmas[index])

    def _step_ratio(self, index: int) -> float:
        """Length in lambda of step `index` over that of the one before; 0 where that one began at sigma 1."""
        before, now, after = (_log_snr(sigma) for sigma in self._sigmas[index - 1 : index + 2])
        return (after - now) / (now - before)


class Euler(Solver):
    """First order, no memory; the solver of the step-distilled models."""

    name = "euler"
    remembers = 0

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        return sample + (self._sigmas[index + 1] - self._sigmas[index]) * velocity


class DPMpp2M(Solver):
    """DPM-Solver++(2M), midpoint form; first order in the first step and in the one that ends at sigma 0."""

    name = "dpm++"
    remembers = 1

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean = sample - self._sigmas[index] * velocity
        advanced = self._predict(clean, self._clean[0] if self._clean else None, index, sample)
        self._remember(clean)
        return advanced


class UniPC(Solver):
    """UniPC of order 2, B2(h): DPM++'s predictor, and from the second step on a corrector; Wan's default solver."""

    name = "unipc"
    remembers = 2

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        self._last_sample: Tensor | None = None  # where the last step began, after its own correction

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean = sample - self._sigmas[index] * velocity
        if self._last_sample is None:
            # A copy: the caller owns the tensor and may write to it before the next step corrects from it.
            corrected = sample.clone()
        else:
            corrected = self._correct(clean, index)
        advanced = self._predict(clean, self._clean[0] if self._clean else None, index, corrected)
        self._remember(clean)
        self._last_sample = corrected
        return advanced

    def _correct(self, clean: Tensor, index: int) -> Tensor:
        """The step before this one again, now that the clean estimate at its end is known."""
        begin = self._clean[0]
        if len(self._clean) == 1:
            mean = begin + 0.5 * (clean - begin)
        else:
            # Over the step, with u from 0 to 1 along lambda: the parabola through the estimates at u = -1 / ratio, 0
            # and 1, averaged with weight e^lambda, under which u has the mean `first` and u^2 the mean `second`.
            length = _log_snr(self._sigmas[index]) - _log_snr(self._sigmas[index - 1])
            ratio = self._step_ratio(index - 1)
            first = -1 / math.expm1(-length) - 1 / length
            second = -1 / math.expm1(-length) - 2 * first / length
            bend = (first - second) * ratio / (1 + ratio)
            mean = begin + (first - bend) * (clean - begin) + (bend * ratio) * (begin - self._clean[1])
        return _blend(self._last_sample, mean, self._sigmas[index] / self._sigmas[index - 1])

    def _tensor_keys(self, index: int) -> list[str]:
        return super()._tensor_keys(index) + ["sample"] * (index > 0)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        if self._last_sample is not None:
            state[f"{self.name}.sample"] = self._last_sample.detach()
        return state

    def _restore(self, index: int, tensors: dict[str, Tensor]):
        super()._restore(index, tensors)
        self._last_sample = tensors["sample"].clone() if index else None

    def _to(self, device: torch.device):
        super()._to(device)
        if self._last_sample is not None:
            self._last_sample = self._last_sample.to(device)


SOLVERS: dict[str, type[Solver]] = {"unipc": UniPC, "dpm++": DPMpp2M, "euler": Euler}


def _blend(sample: Tensor, mean: Tensor, ratio: float) -> Tensor:
    return ratio * sample + (1 - ratio) * mean


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf
