"""From noise to latent: schedules, solvers, guidance and the denoising loop."""

from .denoise import Conditions, NotFinite, Progress, Step, denoise
from .guidance import Guidance, classifier_free_guidance, needs_uncond
from .schedules import (
    Schedule,
    dpmpp_schedule,
    euler_schedule,
    make_schedule,
    partial,
    schedule_from_sigmas,
    unipc_schedule,
)
from .solvers import SOLVERS, DPMpp2M, Euler, Solver, UniPC

__all__ = [
    "SOLVERS",
    "Conditions",
    "DPMpp2M",
    "Euler",
    "Guidance",
    "NotFinite",
    "Progress",
    "Schedule",
    "Solver",
    "Step",
    "UniPC",
    "classifier_free_guidance",
    "denoise",
    "dpmpp_schedule",
    "euler_schedule",
    "make_schedule",
    "needs_uncond",
    "partial",
    "schedule_from_sigmas",
    "unipc_schedule",
]
