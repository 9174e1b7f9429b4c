"""Noise schedules: which noise levels a sampling run visits and which timesteps the transformer sees there.

Flow matching mixes a clean latent and noise as `x = (1 - sigma) * clean + sigma * noise`. A run of n steps walks n + 1
sigmas from (nearly) 1 down to 0, and at each of the first n the transformer is told the timestep `1000 * sigma`. The
shift bends an evenly spaced grid towards high noise, `shift * s / (1 + (shift - 1) * s)` (Esser et al. 2024,
arXiv:2403.03206, section 5.3.2), because large videos need more of their steps there.

The official code gives each solver its own grid, and they are not interchangeable: UniPC begins at sigma 0.999 and
DPM++ at exactly 1, both with timesteps cut to whole numbers; Euler (the distilled few-step models) begins at 1 with
fractional timesteps. References: `wan/utils/fm_solvers_unipc.py` and `fm_solvers.py` of Wan 2.1 and 2.2,
`wan/utils/fm_solvers_euler.py` of Wan2.2-Lightning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
MAX_STEPS = 1_000_000

# The noisiest of the 1000 training levels, which the official UniPC keeps as fp32 and starts from.
_UNIPC_SIGMA_MAX = float(np.float32(1 - 1 / TRAIN_TIMESTEPS))

# ComfyUI computes shifted sigmas in fp32, where about 1 % of all shifts give a first sigma one rounding error above 1.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of one run of n steps.

    sigmas: fp32 [n + 1] on the CPU, strictly decreasing, within 0..1; step i goes from sigmas[i] to sigmas[i + 1].
    timesteps: fp32 [n] on the CPU, 0..1000, what the transformer is told in step i.
    Raises ValueError where these do not hold.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __post_init__(self):
        for name, values in (("sigmas", self.sigmas), ("timesteps", self.timesteps)):
            if values.ndim != 1 or values.dtype != torch.float32 or values.device.type != "cpu":
                raise ValueError(
                    f"{name} of a schedule must be a one-dimensional fp32 tensor on the CPU, got {values.dtype} "
                    f"of shape {tuple(values.shape)} on {values.device}; convert it first"
                )
        if len(self.sigmas) < 2:
            raise ValueError(f"a schedule needs at least 2 sigmas (1 step), got {len(self.sigmas)}; ask for more steps")
        if len(self.timesteps) != len(self.sigmas) - 1:
            raise ValueError(
                f"{len(self.sigmas)} sigmas need {len(self.sigmas) - 1} timesteps, got {len(self.timesteps)}; "
                "give one timestep for each sigma but the last"
            )
        _check_sigmas(self.sigmas)
        if not bool(((self.timesteps >= 0) & (self.timesteps <= TRAIN_TIMESTEPS)).all()):
            raise ValueError(f"timesteps must be within 0..{TRAIN_TIMESTEPS}, got {self.timesteps.tolist()}")

    @property
    def steps(self) -> int:
        """The number of steps, n."""
        return len(self.timesteps)


def unipc_schedule(steps: int, shift: float) -> Schedule:
    """The official grid of UniPC: from sigma 0.999 (before the shift) to 0, timesteps cut to whole numbers.

    steps: 1 or more. shift: greater than 0; 1 leaves the grid even. Raises ValueError for anything else.
    """
    _check_request(steps, shift)
    return _truncated_schedule(np.linspace(_UNIPC_SIGMA_MAX, 0, steps + 1)[:-1], shift)


def dpmpp_schedule(steps: int, shift: float) -> Schedule:
    """The official grid of DPM++: from sigma exactly 1 to 0, timesteps cut to whole numbers.

    steps: 1 or more. shift: greater than 0; 1 leaves the grid even. Raises ValueError for anything else.
    """
    _check_request(steps, shift)
    return _truncated_schedule(np.linspace(1, 0, steps + 1)[:-1], shift)


def euler_schedule(steps: int, shift: float) -> Schedule:
    """The grid of the distilled models' Euler solver: from sigma 1 to 0, fractional timesteps, computed in fp32.

    steps: 1 or more. shift: greater than 0; 1 leaves the grid even. Raises ValueError for anything else.
    """
    _check_request(steps, shift)
    even = torch.from_numpy(np.linspace(TRAIN_TIMESTEPS, 0, steps + 1, dtype=np.float32)) / TRAIN_TIMESTEPS
    return schedule_from_sigmas(shifted(even, shift))


# The official code has no grid for other solvers than its own; these are made for sigma 1 and fractional timesteps.
_BUILDERS = {"unipc": unipc_schedule, "dpm++": dpmpp_schedule, "euler": euler_schedule, "lcm": euler_schedule,
             "res_multistep": euler_schedule, "deis": euler_schedule, "sa_ode": euler_schedule}


def make_schedule(solver: str, steps: int, shift: float, denoise: float = 1.0) -> Schedule:
    """The official schedule of a solver (Euler's for those that have none), or the end of a longer one.

    solver: a name in SOLVERS. steps: the steps that will be run. denoise: greater than 0, at most 1. Below 1
    the schedule is made for int(steps / denoise) steps and its last `steps` are returned, as ComfyUI's BasicScheduler
    does: the run then begins with a partly noised latent. Raises ValueError for anything else.
    """
    if solver not in _BUILDERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(_BUILDERS)}")
    _check_request(steps, shift)
    _check_denoise(denoise)
    if steps / denoise > MAX_STEPS:
        raise ValueError(f"steps / denoise must be at most {MAX_STEPS}, got {steps} / {denoise}; raise denoise")
    total = int(steps / denoise)
    return partial(_BUILDERS[solver](total, shift), total - steps)


def schedule_from_sigmas(sigmas: Tensor | Sequence[float]) -> Schedule:
    """A schedule from sigmas made elsewhere, ComfyUI's SIGMAS for one.

    sigmas: one-dimensional, at least 2, strictly decreasing, within 0..1; the last need not be 0. The timesteps are
    1000 * sigma, not cut to whole numbers whichever solver follows: that is what ComfyUI's own samplers tell the
    transformer, so the same SIGMAS mean the same here and there. Raises ValueError for sigmas that do not fit.
    """
    sigmas = torch.as_tensor(sigmas).detach().to("cpu", torch.float32)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must be a list of at least 2 numbers, got shape {tuple(sigmas.shape)}; "
            "check the node that made them (a denoise of 0 gives an empty list)"
        )
    rounded_up = (sigmas > 1) & (sigmas <= 1 + _ROUNDING)
    sigmas = torch.where(rounded_up, torch.ones_like(sigmas), sigmas)
    _check_sigmas(sigmas)
    return Schedule(sigmas, sigmas[:-1] * TRAIN_TIMESTEPS)


def partial(schedule: Schedule, start_step: int = 0, end_step: int | None = None) -> Schedule:
    """The steps start_step .. end_step - 1 of a schedule, to run a part of it.

    end_step: None or anything beyond the last step means the end, as in ComfyUI's KSamplerAdvanced. The sigmas of two
    parts that share a step number join without a gap. Raises ValueError where no step is left.
    """
    end = schedule.steps if end_step is None else min(end_step, schedule.steps)
    if not 0 <= start_step < end:
        raise ValueError(
            f"steps {start_step} to {end} of a schedule of {schedule.steps} steps hold no step; "
            "the start must be 0 or more and lie before the end"
        )
    return Schedule(schedule.sigmas[start_step : end + 1].clone(), schedule.timesteps[start_step:end].clone())


def last_part(schedule: Schedule, denoise: float) -> Schedule:
    """The last steps of a schedule, `denoise` (greater than 0, at most 1) of all, at least one.

    For models that know few noise levels, to which `make_schedule` would add others. Raises ValueError for another
    `denoise`.
    """
    _check_denoise(denoise)
    return partial(schedule, min(schedule.steps - 1, round((1 - denoise) * schedule.steps)))


def _truncated_schedule(even: np.ndarray, shift: float) -> Schedule:
    """even: float64 [n] without the final 0. The timesteps are cut from the float64 sigmas, before they become fp32."""
    sigmas = shifted(even, shift)
    timesteps = (sigmas * TRAIN_TIMESTEPS).astype(np.int64)
    return Schedule(
        torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32)),
        torch.from_numpy(timesteps.astype(np.float32)),
    )


def shifted(sigmas, shift: float):
    """Even noise levels, a number, an array or a tensor, moved towards high noise."""
    # Operation by operation in the official order: a timestep next to a whole number would else be cut differently.
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _check_request(steps: int, shift: float):
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be a whole number from 1 to {MAX_STEPS}, got {steps!r}")
    check_shift(shift)


def check_shift(shift: float):
    """Raise ValueError unless `shift` is a number above 0."""
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a number greater than 0, got {shift}; Wan's own values are 3 to 16")


def _check_denoise(denoise: float):
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be greater than 0 and at most 1, got {denoise}")


def _check_sigmas(sigmas: Tensor):
    """sigmas: fp32 [n + 1], n of 1 or more."""
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        raise ValueError(
            f"sigmas must be numbers within 0..1, got {sigmas.tolist()}; make them for a flow-matching model"
        )
    stalled = (sigmas[1:] >= sigmas[:-1]).nonzero()
    if len(stalled):
        i = int(stalled[0])
        raise ValueError(
            f"sigmas must decrease at every step, got {float(sigmas[i])} followed by {float(sigmas[i + 1])} "
            f"at step {i}; use fewer steps, a smaller shift, or other sigmas"
        )
