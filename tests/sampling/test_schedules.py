"""Schedules: the official grids to the last bit, ComfyUI's conventions for parts and foreign sigmas, and refusals."""

import math

import pytest
import torch

from tests.golden_cases import load_case
from wan_core.sampling import (
    SOLVERS,
    Schedule,
    dpmpp_schedule,
    euler_schedule,
    make_schedule,
    partial,
    schedule_from_sigmas,
    unipc_schedule,
)

GOLDEN = load_case("schedules")


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


@pytest.mark.parametrize("solver,steps,shift", GOLDEN.config["cases"])
def test_sigmas_and_timesteps_are_the_official_ones(solver, steps, shift):
    key = f"{solver.replace('++', 'pp')}_{steps}_{shift:g}"
    schedule = make_schedule(solver, steps, shift)
    torch.testing.assert_close(schedule.sigmas, GOLDEN.outputs[f"{key}.sigmas"], rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps, GOLDEN.outputs[f"{key}.timesteps"], rtol=0, atol=1e-6)


def test_euler_schedule_is_the_shifted_even_grid_with_fractional_timesteps():
    """Four distilled steps at shift 5 have the published timesteps 1000, 937.5, 833.3, 625."""
    schedule = euler_schedule(4, 5.0)
    torch.testing.assert_close(schedule.sigmas, torch.tensor([1, 15 / 16, 5 / 6, 5 / 8, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps, torch.tensor([1000, 937.5, 2500 / 3, 625]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.32, 3.0, 8.3, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_every_grid_follows_the_shift_formula(steps, shift):
    """Sigma i is the shifted point i of an even grid, also for shifts that fp32 rounding would lift above 1."""
    for build, first in ((unipc_schedule, 0.999), (dpmpp_schedule, 1.0), (euler_schedule, 1.0)):
        expected = [shifted(first * (1 - i / steps), shift) for i in range(steps + 1)]
        torch.testing.assert_close(build(steps, shift).sigmas, torch.tensor(expected), rtol=0, atol=3e-7)


def test_unipc_and_dpmpp_cut_timesteps_and_begin_apart():
    """UniPC's first timestep is 999 and DPM++'s 1000, and both are whole numbers below 1000 * sigma."""
    for build, first in ((unipc_schedule, 999), (dpmpp_schedule, 1000)):
        schedule = build(40, 5.0)
        assert schedule.timesteps[0] == first
        below = 1000 * schedule.sigmas[:-1] - schedule.timesteps
        assert torch.equal(schedule.timesteps, schedule.timesteps.floor())
        assert (below > -1e-3).all() and (below < 1).all() and below.max() > 0.5


def test_make_schedule_knows_every_solver():
    """A solver that can be chosen has a schedule, and the names agree."""
    for solver in SOLVERS:
        assert make_schedule(solver, 3, 5.0).steps == 3


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("steps,denoise", [(20, 0.5), (7, 0.3), (10, 0.99), (1, 0.4)])
def test_denoise_runs_the_end_of_a_longer_schedule(solver, steps, denoise):
    """Below 1, denoise keeps the last steps + 1 sigmas of int(steps / denoise) steps, as ComfyUI does."""
    whole = make_schedule(solver, int(steps / denoise), 5.0)
    part = make_schedule(solver, steps, 5.0, denoise)
    assert torch.equal(part.sigmas, whole.sigmas[-(steps + 1) :])
    assert torch.equal(part.timesteps, whole.timesteps[-steps:])


def test_parts_join_to_the_whole():
    """Two parts that share a step number cover the schedule without a gap; an end beyond the last step is the end."""
    whole = unipc_schedule(10, 5.0)
    head, tail = partial(whole, 0, 4), partial(whole, 4, 10_000)
    assert head.steps == 4 and tail.steps == 6 and head.sigmas[-1] == tail.sigmas[0]
    assert torch.equal(torch.cat([head.sigmas, tail.sigmas[1:]]), whole.sigmas)
    assert torch.equal(torch.cat([head.timesteps, tail.timesteps]), whole.timesteps)
    assert torch.equal(partial(whole, 9).sigmas, whole.sigmas[9:])


def test_a_part_shares_no_memory_with_the_whole():
    """Writing into a part leaves the schedule it came from alone."""
    whole = unipc_schedule(5, 5.0)
    before = whole.sigmas.clone()
    partial(whole, 1, 3).sigmas.zero_()
    assert torch.equal(whole.sigmas, before)


def test_foreign_sigmas_keep_fractional_timesteps():
    """Sigmas from elsewhere are taken as they are, with timesteps 1000 * sigma, also when they stop above 0."""
    given = torch.tensor([0.91234, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    schedule = schedule_from_sigmas(given)
    assert torch.equal(schedule.sigmas, given.detach().float())
    assert schedule.timesteps.tolist() == pytest.approx([912.34, 500.0], abs=1e-3)
    assert schedule_from_sigmas([1, 0]).timesteps.tolist() == [1000.0]


def test_foreign_sigmas_one_rounding_error_above_one_are_one():
    """ComfyUI's fp32 shift gives 1.0000001 for some shifts; that is sigma 1, and timestep 1000."""
    schedule = schedule_from_sigmas(torch.tensor([1.0000001192092896, 0.5, 0.0]))
    assert schedule.sigmas[0] == 1 and schedule.timesteps[0] == 1000


@pytest.mark.parametrize(
    "sigmas,message",
    [
        ([], "at least 2"),
        ([1.0], "at least 2"),
        ([[1.0, 0.0]], "at least 2"),
        (0.5, "at least 2"),
        ([1.0, 0.5, 0.5, 0.0], "decrease"),
        ([0.0, 0.5, 1.0], "decrease"),
        ([1.01, 0.5, 0.0], "within 0..1"),
        ([14.6, 3.0, 0.0], "within 0..1"),
        ([1.0, 0.5, -0.1], "within 0..1"),
        ([1.0, math.nan, 0.0], "within 0..1"),
    ],
)
def test_unfit_sigmas_are_refused(sigmas, message):
    """Empty, rising, repeating, out of range or not a number: a ValueError that says which."""
    with pytest.raises(ValueError, match=message):
        schedule_from_sigmas(sigmas)


@pytest.mark.parametrize("build", [unipc_schedule, dpmpp_schedule, euler_schedule])
@pytest.mark.parametrize(
    "steps,shift,message",
    [
        (0, 5.0, "steps"),
        (-3, 5.0, "steps"),
        (2.0, 5.0, "steps"),
        (True, 5.0, "steps"),
        (10**9, 5.0, "steps"),
        (4, 0.0, "shift"),
        (4, -1.0, "shift"),
        (4, math.inf, "shift"),
        (4, math.nan, "shift"),
        (50, 1e8, "decrease"),
    ],
)
def test_unfit_steps_and_shifts_are_refused(build, steps, shift, message):
    """Steps that are no whole number of 1 or more, shifts of 0 or less, or so large that fp32 sigmas coincide."""
    with pytest.raises(ValueError, match=message):
        build(steps, shift)


@pytest.mark.parametrize("denoise", [0.0, -0.5, 1.01, math.nan, 1e-9])
def test_unfit_denoise_is_refused(denoise):
    """Denoise lies in (0, 1], and so small a value that the whole schedule would not fit in memory is refused."""
    with pytest.raises(ValueError, match="denoise"):
        make_schedule("unipc", 4, 5.0, denoise)


def test_unknown_solver_is_refused():
    """The message names the solvers there are."""
    with pytest.raises(ValueError, match="unipc, dpm"):
        make_schedule("ddim", 4, 5.0)


@pytest.mark.parametrize("start,end", [(-1, 3), (3, 3), (4, 2), (10, None), (0, 0), (0, -1)])
def test_empty_parts_are_refused(start, end):
    """A part without a step is an error, not an empty run."""
    with pytest.raises(ValueError, match="hold no step"):
        partial(unipc_schedule(10, 5.0), start, end)


@pytest.mark.parametrize(
    "sigmas,timesteps,message",
    [
        (torch.tensor([1.0, 0.0]), torch.tensor([1000.0, 0.0]), "2 sigmas need 1 timesteps"),
        (torch.tensor([1.0]), torch.tensor([]), "at least 2 sigmas"),
        (torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1000.0]), "sigmas of a schedule must be"),
        (torch.tensor([1.0, 0.0]), torch.tensor([1000]), "timesteps of a schedule must be"),
        (torch.tensor([1.0, 0.0]), torch.tensor([1001.0]), "within 0..1000"),
        (torch.tensor([0.0, 1.0]), torch.tensor([1000.0]), "decrease"),
    ],
)
def test_inconsistent_schedules_are_refused(sigmas, timesteps, message):
    """A Schedule that exists is sound."""
    with pytest.raises(ValueError, match=message):
        Schedule(sigmas, timesteps)
