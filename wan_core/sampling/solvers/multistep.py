"""Multistep solvers of the wider field: RES, DEIS and SA-ODE, deterministic and at one transformer call a step.

RES holds on to clean estimates as DPM++ does and draws its line over -log sigma; DEIS holds on to velocities and
integrates the line through the last two over sigma itself. For flow matching `dx / dsigma = velocity` is the whole ODE,
so this integral is exact and DEIS is Adams-Bashforth with the real step lengths. (ComfyUI's mode 'rhoab' is this one;
its 'tab' integrates over the time of a variance-preserving diffusion, with constants of other models.) SA-ODE does so
as if all steps were as long as the last one; shifted steps grow, so its line bends less.

References: RES (Zhang et al. 2023, arXiv:2308.02157, the multistep solver of order 2), DEIS (Zhang and Chen 2022,
arXiv:2204.13902, section 3.3, rho AB), SA-ODE ("sa_ode_stable" of ComfyUI-WanVideoWrapper).
"""

import math

from torch import Tensor

from .base import Solver, blend

# How many times as long as the step before the last step to sigma 0 may be for DEIS to draw its line there.
LONG = 1.5


class ResMultistep(Solver):
    """RES of order 2; first order in the first step and in the one that ends at sigma 0."""

    name = "res_multistep"
    remembers = 1

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        sigma, after = self._sigmas[index : index + 2]
        mean = clean = sample - sigma * velocity
        if self._past and after > 0:
            # The line through both estimates over t = -log sigma, averaged over the step with weight e^t.
            length = math.log(sigma / after)
            ratio = length / math.log(self._sigmas[index - 1] / sigma)
            weight = -1 / math.expm1(-length) - 1 / length
            mean = clean + (weight * ratio) * (clean - self._past[0])
        advanced = blend(sample, mean, after / sigma)
        self._remember(clean)
        return advanced


class DEIS(Solver):
    """DEIS of order 2; first order in the first step and, where it is a long one, in the one that ends at sigma 0.

    Order 3 bends a run of few steps too far: on the nano models it is mostly behind Euler at 6 to 12 steps, and gains
    little, if anything, at 20.
    """

    name = "deis"
    remembers = 1
    keeps = "velocity"

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        sigma, after = self._sigmas[index : index + 2]
        advanced = sample + (after - sigma) * velocity
        if self._past:
            before = self._sigmas[index - 1] - sigma
            # Euler's last step gives the clean estimate itself. A line drawn over a long way to it would do harm.
            if after > 0 or sigma <= LONG * before:
                advanced = advanced + ((after - sigma) ** 2 / (2 * before)) * (self._past[0] - velocity)
        # A copy: the caller owns the tensor and may write to it.
        self._remember(velocity.clone())
        return advanced


class SAODE(Solver):
    """SA-ODE of order 2, Adams-Bashforth with the weights of even steps; first order in the first step.

    What else "sa_ode_stable" has is left out: order 3 in the middle gains or loses a decibel or two on the nano models,
    and its smaller steps near sigma 0 never arrive there, so that noise remains.
    """

    name = "sa_ode"
    remembers = 1
    keeps = "velocity"

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        step = self._sigmas[index + 1] - self._sigmas[index]
        advanced = sample + step * velocity
        if self._past:
            advanced = advanced + (0.5 * step) * (velocity - self._past[0])
        # A copy: the caller owns the tensor and may write to it.
        self._remember(velocity.clone())
        return advanced
