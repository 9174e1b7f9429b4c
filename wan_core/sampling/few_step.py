"""Named schedules: the noise levels that distilled models were trained to be sampled at, and two common ones.

A model distilled to few steps knows the levels that it was trained on and few others, so each family publishes its own
list, the kind of step that goes with it, and guidance 1, which is distilled into the weights. "Warped" lists name even
levels and mean the shifted ones, `shift * t / (1 + (shift - 1) * t)`. Timesteps are 1000 * sigma with their fractions.

Sources: LightX2V `configs/distill` and its Wan schedulers; Wan2.2-Lightning `wan/utils/fm_solvers_euler.py`; CausVid
and Self-Forcing `configs/*.yaml`; FastVideo `DmdDenoisingStage`, which does not warp its list; rCM and TurboDiffusion
`inference/wan2.1_t2v_infer.py`, `wan2.2_i2v_infer.py`; AccVideo `README.md`; ComfyUI `comfy/samplers.py`. Left out is
MeanFlow, whose model is also told the next timestep.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ..presets import Sampling
from .schedules import (
    TRAIN_TIMESTEPS,
    Schedule,
    check_shift,
    euler_schedule,
    schedule_from_sigmas,
    shifted,
    unipc_schedule,
)

Build = Callable[[int, float], Schedule]


@dataclass(frozen=True, kw_only=True)
class NamedSchedule:
    """How a model is to be sampled, under a name.

    `build` makes the schedule of a number of steps, within `least` and `most`, at a shift. `steps` and `shift` are the
    published ones, None for the model's own; `fixed` levels know no shift. `solver` and `guidance` go with it, None for
    the model's own. Of an expert pair the high-noise one takes the first `high_steps` steps; None leaves that to the
    model's boundary. `about` says in a few words what it is for.
    """

    about: str
    build: Build
    least: int = 1
    most: int
    steps: int | None = None
    shift: float | None = None
    fixed: bool = False
    solver: str | None = "euler"
    guidance: float | None = 1.0
    high_steps: int | None = None


def schedule_named(name: str, steps: int | None = None, shift: float | None = None) -> Schedule:
    """The schedule called `name` in NAMED_SCHEDULES, with the published steps and shift where none are given.

    Raises ValueError for an unknown name, a number of steps or a shift that it cannot have, and where one is missing
    that it leaves to the model.
    """
    named = _named(name)
    if named.fixed and shift is not None:
        raise ValueError(f"the noise levels of {name!r} are fixed, and a shift of {shift:g} was asked for; give none")
    steps, shift = named.steps if steps is None else steps, named.shift if shift is None else shift
    if steps is None or (shift is None and not named.fixed):
        raise ValueError(f"{name!r} has no {'steps' if steps is None else 'shift'} of its own; give the model's")
    if isinstance(steps, bool) or not isinstance(steps, int) or not named.least <= steps <= named.most:
        allowed = f"{named.least}" if named.least == named.most else f"{named.least} to {named.most}"
        raise ValueError(f"{name!r} is made for {allowed} steps, and {steps!r} were asked for")
    if not named.fixed:
        check_shift(shift)
    return named.build(steps, shift)


def sampling_named(name: str, own: Sampling, steps: int | None = None,
                   shift: float | None = None) -> tuple[Schedule, Sampling]:
    """The schedule called `name` for a model with the defaults `own`, and the defaults that take their place.

    The boundary between experts is moved only where the schedule says after how many steps they change, and the
    model's own boundary gives another number. Raises the errors of `schedule_named`.
    """
    named = _named(name)
    if steps is None and named.steps is None:
        steps = own.steps
    if shift is None and named.shift is None and not named.fixed:
        shift = own.shift
    schedule, boundary = schedule_named(name, steps, shift), own.boundary
    if boundary is not None and named.high_steps is not None:
        last_high, first_low = schedule.sigmas[named.high_steps - 1 : named.high_steps + 1].tolist()
        if not first_low < boundary <= last_high:
            boundary = (first_low + last_high) / 2
    guidance = {} if named.guidance is None else {"guidance_low": named.guidance, "guidance_high": named.guidance}
    return schedule, replace(own, steps=schedule.steps, shift=shift or named.shift or own.shift, boundary=boundary,
                             solver=named.solver or own.solver, **guidance)


def _named(name: str) -> NamedSchedule:
    if name not in NAMED_SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(NAMED_SCHEDULES)}")
    return NAMED_SCHEDULES[name]


def _listed(*timesteps: int) -> Build:
    """The first timesteps of a list, then 0."""
    return lambda steps, shift: schedule_from_sigmas([t / TRAIN_TIMESTEPS for t in timesteps[:steps]] + [0.0])


def _warped(*timesteps: int) -> Build:
    """A list of even levels, shifted, then 0."""
    def build(steps: int, shift: float) -> Schedule:
        even = torch.tensor([*timesteps[:steps], 0], dtype=torch.float64) / TRAIN_TIMESTEPS
        return schedule_from_sigmas(shifted(even, shift))

    return build


def _trig(sigma_max: float) -> Build:
    """rCM's angles, from that of the variance-exploding sigma `sigma_max`: an angle mixes cos * clean + sin * noise,
    which scaled to the sum of one is flow matching's mixture. Fewer steps leave away the last angles."""
    def build(steps: int, shift: float) -> Schedule:
        angles = torch.tensor([math.atan(sigma_max), 1.5, 1.4, 1.0][:steps] + [0.0], dtype=torch.float64)
        return schedule_from_sigmas(angles.sin() / (angles.cos() + angles.sin()))

    return build


def _simple(steps: int, shift: float) -> Schedule:
    """Of the 1000 trained levels evenly many, as ComfyUI's "simple"."""
    table, apart = _trained(shift), TRAIN_TIMESTEPS / steps
    return schedule_from_sigmas([float(table[-1 - int(i * apart)]) for i in range(steps)] + [0.0])


def _beta(steps: int, shift: float) -> Schedule:
    """More of the levels at both ends: quantiles of the distribution Beta(0.6, 0.6), as ComfyUI's "beta" (Lee et al.
    2024, arXiv:2407.12173). Levels that would come twice are taken once, so there may be fewer steps."""
    quantiles = _beta_quantiles(1 - np.linspace(0, 1, steps, endpoint=False), 0.6)
    # The median lies half way between two levels; scipy's, which ComfyUI uses, a rounding error above.
    indices = dict.fromkeys(np.floor(quantiles * (TRAIN_TIMESTEPS - 1) + 0.5 + 1e-9).astype(int).tolist())
    table = _trained(shift)
    return schedule_from_sigmas([float(table[index]) for index in indices] + [0.0])


def _trained(shift: float) -> Tensor:
    """The 1000 levels that ComfyUI chooses from, rising, in the order of its fp32 operations."""
    even = torch.arange(1, TRAIN_TIMESTEPS + 1) / TRAIN_TIMESTEPS * TRAIN_TIMESTEPS / TRAIN_TIMESTEPS
    return shifted(even, shift)


def _beta_quantiles(shares: np.ndarray, a: float) -> np.ndarray:
    """Where the distribution Beta(a, a) reaches `shares`, float64 in 0..1: bisection of its power series, which below
    one half converges like 2^-n (Abramowitz and Stegun 26.5.4); the other half mirrors it."""
    orders = np.arange(1, 60)
    terms = np.concatenate([[1.0], np.cumprod((orders - a) / orders)]) / (a + np.arange(60))
    total = math.gamma(a) ** 2 / math.gamma(2 * a)
    wanted = np.minimum(shares, 1 - shares) * total
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle ** a * np.polynomial.polynomial.polyval(middle, terms) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.5, high, 1 - high)


_FOUR = _warped(1000, 750, 500, 250)

NAMED_SCHEDULES: MappingProxyType[str, NamedSchedule] = MappingProxyType({
    "lightx2v": NamedSchedule(
        about="LightX2V's 4-step LoRAs and models of Wan 2.1 and 2.2, Wan2.2-Lightning",
        build=_FOUR, least=4, most=4, steps=4, shift=5.0, high_steps=2),
    "lightx2v_flf2v": NamedSchedule(
        about="LightX2V's 4-step first-last-frame models of Wan 2.2",
        build=_FOUR, least=4, most=4, steps=4, shift=16.0, high_steps=2),
    "lightning": NamedSchedule(
        about="the same LoRAs at other numbers of steps: evenly many shifted levels",
        build=euler_schedule, most=100, steps=4, shift=5.0),
    "self_forcing": NamedSchedule(
        about="Self-Forcing 1.3B and models trained like it",
        build=_FOUR, least=4, most=4, steps=4, shift=5.0, solver="lcm"),
    "causvid_14b": NamedSchedule(
        about="CausVid's LoRA for Wan 2.1 14B at full strength, up to 9 steps",
        build=_listed(999, 934, 862, 756, 603, 410, 250, 140, 74), most=9, steps=9, fixed=True),
    "causvid_warp": NamedSchedule(
        about="CausVid 1.3B of 4 warped steps",
        build=_FOUR, least=4, most=4, steps=4, shift=8.0, solver="lcm"),
    "fastwan": NamedSchedule(
        about="FastWan 2.1 and 2.2 5B, CausVid 1.3B of 3 steps",
        build=_listed(1000, 757, 522), least=3, most=3, steps=3, fixed=True, solver="lcm"),
    "rcm": NamedSchedule(
        about="rCM and TurboDiffusion, Wan 2.1 at 480p",
        build=_trig(80.0), most=4, steps=4, fixed=True, solver="lcm"),
    "rcm_720p": NamedSchedule(
        about="rCM and TurboDiffusion, Wan 2.1 at 720p",
        build=_trig(120.0), most=4, steps=4, fixed=True, solver="lcm"),
    "rcm_i2v": NamedSchedule(
        about="TurboDiffusion, Wan 2.2 I2V",
        build=_trig(200.0), most=4, steps=4, fixed=True, solver="lcm"),
    "accvideo": NamedSchedule(
        about="AccVideo, Wan 2.1 14B",
        build=unipc_schedule, most=1000, steps=10, shift=5.0, solver="unipc", guidance=None),
    "simple": NamedSchedule(
        about="any model, as ComfyUI's scheduler of that name", build=_simple, most=1000, solver=None, guidance=None),
    "beta": NamedSchedule(
        about="any model, as ComfyUI's scheduler of that name", build=_beta, most=1000, solver=None, guidance=None),
})
