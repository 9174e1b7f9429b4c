"""The solvers of the official code: Euler, DPM-Solver++(2M) and UniPC.

A line through the last two clean estimates gives a second order step: DPM-Solver++(2M) puts half its slope for the
mean; UniPC takes the same predictor, and once the next estimate is known it redoes the step with it (the corrector),
at no extra transformer call.

References: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 2), UniPC with B2(h) and data prediction
(Zhao et al. 2023, arXiv:2302.04867), and `wan/utils/fm_solvers.py`, `fm_solvers_unipc.py` of Wan 2.1 and 2.2, whose
results these reproduce.
"""

import math

import torch
from torch import Tensor

from ..schedules import Schedule
from .base import Solver, blend


class Euler(Solver):
    """First order, no memory; the solver of the step-distilled models."""

    name = "euler"
    remembers = 0

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        return sample + (self._sigmas[index + 1] - self._sigmas[index]) * velocity


class _SecondOrder(Solver):
    """The predictor that both second order solvers share."""

    def _predict(self, clean: Tensor, previous: Tensor | None, index: int, sample: Tensor) -> Tensor:
        """Second order step from sigma[index] with the slope of the last two clean estimates, first order without."""
        mean = clean
        # At sigma 0 lambda is infinite and a slope over it has no meaning. A schedule that ends above 0 keeps its
        # order to the end, so that its steps are the first steps of the longer run.
        if previous is not None and self._sigmas[index + 1] > 0:
            mean = clean + (0.5 * self._step_ratio(index)) * (clean - previous)
        return blend(sample, mean, self._sigmas[index + 1] / self._sigmas[index])

    def _step_ratio(self, index: int) -> float:
        """Length in lambda of step `index` over that of the one before; 0 where that one began at sigma 1."""
        before, now, after = (_log_snr(sigma) for sigma in self._sigmas[index - 1 : index + 2])
        return (after - now) / (now - before)


class DPMpp2M(_SecondOrder):
    """DPM-Solver++(2M), midpoint form; first order in the first step and in the one that ends at sigma 0."""

    name = "dpm++"
    remembers = 1

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean = sample - self._sigmas[index] * velocity
        advanced = self._predict(clean, self._past[0] if self._past else None, index, sample)
        self._remember(clean)
        return advanced


class UniPC(_SecondOrder):
    """UniPC of order 2, B2(h): DPM++'s predictor, and from the second step on a corrector; Wan's default solver."""

    name = "unipc"
    remembers = 2

    def __init__(self, schedule: Schedule, seed: int = 0):
        super().__init__(schedule, seed)
        self._last_sample: Tensor | None = None  # where the last step began, after its own correction

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean = sample - self._sigmas[index] * velocity
        if self._last_sample is None:
            # A copy: the caller owns the tensor and may write to it before the next step corrects from it.
            corrected = sample.clone()
        else:
            corrected = self._correct(clean, index)
        advanced = self._predict(clean, self._past[0] if self._past else None, index, corrected)
        self._remember(clean)
        self._last_sample = corrected
        return advanced

    def _correct(self, clean: Tensor, index: int) -> Tensor:
        """The step before this one again, now that the clean estimate at its end is known."""
        begin = self._past[0]
        if len(self._past) == 1:
            mean = begin + 0.5 * (clean - begin)
        else:
            # Over the step, with u from 0 to 1 along lambda: the parabola through the estimates at u = -1 / ratio, 0
            # and 1, averaged with weight e^lambda, under which u has the mean `first` and u^2 the mean `second`.
            length = _log_snr(self._sigmas[index]) - _log_snr(self._sigmas[index - 1])
            ratio = self._step_ratio(index - 1)
            first = -1 / math.expm1(-length) - 1 / length
            second = -1 / math.expm1(-length) - 2 * first / length
            bend = (first - second) * ratio / (1 + ratio)
            mean = begin + (first - bend) * (clean - begin) + (bend * ratio) * (begin - self._past[1])
        return blend(self._last_sample, mean, self._sigmas[index] / self._sigmas[index - 1])

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


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf
