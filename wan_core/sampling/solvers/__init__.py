"""Solvers of the sampling ODE `dx / dsigma = velocity(x, sigma)`, from noise at sigma 1 to a latent at sigma 0.

A transformer call at sigma s gives the velocity v and with it an estimate of the clean latent, `x - s * v`. With
`lambda = log((1 - sigma) / sigma)` the exact solution from s to t is

    x(t) = (t / s) * x(s) + (1 - t / s) * mean of the clean estimate over lambda(s)..lambda(t), weighted by e^lambda

so solvers differ only in how they extrapolate from earlier calls. Held constant, the estimate gives Euler's step.
Written this way nothing overflows at sigma 1 (lambda minus infinity) or 0. Coefficients are float64 numbers, tensors
are fp32.
"""

from types import MappingProxyType

from .base import Solver
from .multistep import DEIS, SAODE, ResMultistep
from .official import DPMpp2M, Euler, UniPC
from .stochastic import LCM

# In the order in which nodes list them; new ones at the end.
SOLVERS: MappingProxyType[str, type[Solver]] = MappingProxyType(
    {solver.name: solver for solver in (UniPC, DPMpp2M, Euler, LCM, ResMultistep, DEIS, SAODE)})

__all__ = ["DEIS", "LCM", "SAODE", "SOLVERS", "DPMpp2M", "Euler", "ResMultistep", "Solver", "UniPC"]
