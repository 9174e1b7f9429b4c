"""From noise to latent: schedules, solvers, guidance and the denoising loop."""

from .denoise import Conditions, NotFinite, Progress, Step, denoise
from .few_step import NAMED_SCHEDULES, NamedSchedule, sampling_named, schedule_named
from .guidance import (
    PURE_NOISE_SIGMA,
    Guidance,
    StepGuidance,
    classifier_free_guidance,
    guided_velocity,
    needs_uncond,
    plan_guidance,
)
from .schedules import (
    Schedule,
    dpmpp_schedule,
    euler_schedule,
    last_part,
    make_schedule,
    partial,
    schedule_from_sigmas,
    unipc_schedule,
)
from .solvers import DEIS, LCM, SAODE, SOLVERS, DPMpp2M, Euler, ResMultistep, Solver, UniPC

__all__ = [
    "DEIS",
    "LCM",
    "NAMED_SCHEDULES",
    "PURE_NOISE_SIGMA",
    "SAODE",
    "SOLVERS",
    "Conditions",
    "DPMpp2M",
    "Euler",
    "Guidance",
    "NamedSchedule",
    "NotFinite",
    "Progress",
    "ResMultistep",
    "Schedule",
    "Solver",
    "Step",
    "StepGuidance",
    "UniPC",
    "classifier_free_guidance",
    "denoise",
    "dpmpp_schedule",
    "euler_schedule",
    "guided_velocity",
    "last_part",
    "make_schedule",
    "needs_uncond",
    "partial",
    "plan_guidance",
    "sampling_named",
    "schedule_from_sigmas",
    "schedule_named",
    "unipc_schedule",
]
