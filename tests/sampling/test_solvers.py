"""Solvers: the official results, diffusers' step by step, exact and convergent integration, resume, and refusals."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.golden_cases import load_case
from wan_core.sampling import SOLVERS, make_schedule, partial, schedule_from_sigmas

GOLDEN = load_case("schedules")
NAMES = sorted(SOLVERS)
# Those of the official code, and all that add no noise on their way.
OFFICIAL = ("dpm++", "euler", "unipc")
ODE = [name for name in NAMES if not SOLVERS[name].draws_noise]


def noise(seed, shape=(1, 4, 2, 3, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def golden_velocity(x, timestep):
    """The velocity field written in the golden case's config."""
    a, b = GOLDEN.inputs["a"], GOLDEN.inputs["b"]
    return a * torch.tanh(x) + b * torch.cos(3 * timestep / 1000) + 0.3 * x * timestep / 1000


def noise_velocity():
    """A velocity 'field' that gives noise(1), noise(2), ... whatever it is asked."""
    seeds = iter(range(1, 100))
    return lambda x, t: noise(next(seeds))


def run(solver, schedule, x, velocity=golden_velocity, first=0, last=None):
    """Steps first .. last - 1; the samples after each."""
    samples = []
    for i in range(first, schedule.steps if last is None else last):
        x = solver.step(velocity(x, schedule.timesteps[i]), i, x)
        samples.append(x)
    return samples


@pytest.mark.parametrize("name,steps,shift", GOLDEN.config["cases"])
def test_last_sample_is_the_official_one(name, steps, shift):
    """A whole run of every golden case ends where the official solver ends."""
    key = f"{name.replace('++', 'pp')}_{steps}_{shift:g}"
    schedule = make_schedule(name, steps, shift)
    last = run(SOLVERS[name](schedule), schedule, GOLDEN.inputs["noise"])[-1]
    torch.testing.assert_close(last, GOLDEN.outputs[f"{key}.sample"], rtol=0, atol=1e-5)


def diffusers_scheduler(name, schedule):
    """Diffusers' solver on our sigmas. It lowers the order at a short run's end even where that lies above sigma 0."""
    ends_at_zero = bool(schedule.sigmas[-1] == 0)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "lower_order_final": ends_at_zero}
    if name == "unipc":
        oracle = UniPCMultistepScheduler(**flow)
    elif name == "dpm++":
        oracle = DPMSolverMultistepScheduler(**flow, final_sigmas_type="zero" if ends_at_zero else "sigma_min")
    else:
        oracle = FlowMatchEulerDiscreteScheduler()
    oracle.set_timesteps(schedule.steps)
    oracle.sigmas = schedule.sigmas.clone()
    oracle.timesteps = schedule.timesteps.clone()
    oracle.set_begin_index(0)
    return oracle


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize(
    "steps,shift,part",
    [(1, 5.0, None), (2, 5.0, None), (3, 1.0, None), (9, 8.0, None), (20, 3.0, None), (50, 5.0, None),
     (20, 5.0, (0, 7)), (20, 5.0, (7, 20)), (20, 5.0, (5, 11))],
)  # fmt: skip
def test_every_step_agrees_with_diffusers(name, steps, shift, part):
    """Also for parts that begin below or end above the usual sigmas, and for velocities that follow no field."""
    schedule = make_schedule(name, steps, shift)
    if part:
        schedule = partial(schedule, *part)
    solver, oracle = SOLVERS[name](schedule), diffusers_scheduler(name, schedule)
    ours = theirs = noise(0)
    for i in range(schedule.steps):
        velocity = noise(i + 1)
        ours = solver.step(velocity, i, ours)
        theirs = oracle.step(velocity, schedule.timesteps[i], theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("first,last", [(1.0, 0.0), (0.999, 0.0), (1.0, 0.2), (0.7, 0.05)])
def test_constant_velocity_is_integrated_exactly(name, first, last):
    """With v constant the path is straight, and every solver lands on its end, whatever the sigmas."""
    schedule = schedule_from_sigmas(torch.linspace(first, last, 8, dtype=torch.float64))
    start, velocity = noise(0), noise(1)
    end = run(SOLVERS[name](schedule), schedule, start, lambda x, t: velocity)[-1]
    torch.testing.assert_close(end, start + (last - first) * velocity, rtol=0, atol=2e-6)


def linear_ode_error(name, steps, first, last):
    """Error at the end of dx/dsigma = -2 x + cos(3 sigma), x(first) = 1, on an even grid."""

    def special(sigma):
        return (2 * math.cos(3 * sigma) + 3 * math.sin(3 * sigma)) / 13

    schedule = schedule_from_sigmas(torch.linspace(first, last, steps + 1, dtype=torch.float64))
    end = run(SOLVERS[name](schedule), schedule, torch.ones(1), lambda x, t: -2 * x + torch.cos(3 * t / 1000))[-1]
    exact = (1 - special(first)) * math.exp(-2 * (last - first)) + special(last)
    return abs(end.item() - exact)


@pytest.mark.parametrize("name,least,most", [("euler", 0.9, 1.1), ("dpm++", 1.6, 2.4), ("unipc", 2.3, 3.2),
                                             ("res_multistep", 1.6, 2.4), ("deis", 1.8, 2.2),
                                             ("sa_ode", 1.8, 2.2)])
def test_order_of_convergence(name, least, most):
    """Half the step divides the error by 2 (Euler), about 4 (second order), more than 4 (UniPC, by its corrector)."""
    coarse, fine = (linear_ode_error(name, steps, 0.95, 0.05) for steps in (64, 128))
    assert least < math.log2(coarse / fine) < most


@pytest.mark.parametrize("name", ["unipc", "dpm++", "res_multistep", "deis", "sa_ode"])
def test_second_order_solvers_begin_well_at_sigma_one(name):
    """Foreign sigmas begin at exactly 1, where lambda is infinite: still far closer to the solution than Euler."""
    assert linear_ode_error(name, 32, 1.0, 0.0) < 0.1 * linear_ode_error("euler", 32, 1.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_bit_for_bit(name):
    """Two runs of the same noise and schedule are equal in every bit at every step."""
    schedule = make_schedule(name, 8, 5.0)
    first, second = (run(SOLVERS[name](schedule), schedule, noise(0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_the_beginning_of_the_whole(name):
    """Running only the first 5 of 12 steps gives the whole run's first 5 samples, bit for bit."""
    whole = make_schedule(name, 12, 5.0)
    part = partial(whole, 0, 5)
    samples = zip(run(SOLVERS[name](part), part, noise(0)), run(SOLVERS[name](whole), whole, noise(0)), strict=False)
    assert all(torch.equal(a, b) for a, b in samples)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(name, stop):
    """State saved after any step and loaded into a new solver goes on bit for bit, though the old one went on too."""
    schedule = make_schedule(name, 8, 5.0)
    first = SOLVERS[name](schedule)
    x = ([noise(0)] + run(first, schedule, noise(0), last=stop))[-1].clone()
    state = first.state_dict()
    rest = run(first, schedule, x, first=stop)
    resumed = SOLVERS[name](schedule)
    resumed.load_state_dict(state)
    again = run(resumed, schedule, x, first=stop)
    assert len(rest) == 8 - stop and all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_not_written_and_may_be_reused(name):
    """step leaves its arguments alone, and the caller may overwrite them and the result without changing the run."""
    schedule = make_schedule(name, 6, 5.0)
    expected = run(SOLVERS[name](schedule), schedule, noise(0))
    solver, x = SOLVERS[name](schedule), noise(0)
    for i in range(schedule.steps):
        sample, velocity = x.clone(), golden_velocity(x, schedule.timesteps[i])
        kept = sample.clone(), velocity.clone()
        result = solver.step(velocity, i, sample)
        assert torch.equal(sample, kept[0]) and torch.equal(velocity, kept[1])
        assert torch.equal(result, expected[i])
        x = result.clone()
        for tensor in (sample, velocity, result):
            tensor.fill_(math.nan)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_changed_later_does_not_reach_the_run(name):
    """A solver keeps its own sigmas."""
    schedule = make_schedule(name, 6, 5.0)
    expected = run(SOLVERS[name](schedule), schedule, noise(0), lambda x, t: -x)
    solver = SOLVERS[name](schedule)
    schedule.sigmas.fill_(0.5)
    again = run(solver, schedule, noise(0), lambda x, t: -x)
    assert torch.equal(again[-1], expected[-1])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_velocities_are_widened(name):
    """A bf16 velocity gives the same fp32 sample as its fp32 copy."""
    schedule = make_schedule(name, 4, 5.0)
    half, full = SOLVERS[name](schedule), SOLVERS[name](schedule)
    x = y = noise(0)
    for i in range(4):
        velocity = noise(i + 1).bfloat16()
        x, y = half.step(velocity, i, x), full.step(velocity.float(), i, y)
        assert x.dtype == torch.float32 and torch.equal(x, y)


@pytest.mark.parametrize("name", ODE)
def test_gradients_flow_through_a_run(name):
    """The end's derivative by a constant velocity is the change in sigma: a distillation loss can train through it."""
    schedule = make_schedule(name, 3, 5.0)
    velocity = noise(1).requires_grad_()
    run(SOLVERS[name](schedule), schedule, noise(0), lambda x, t: velocity)[-1].sum().backward()
    expected = torch.full_like(velocity, -schedule.sigmas[0].item())
    torch.testing.assert_close(velocity.grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_steps_out_of_order_are_refused(name):
    """Skipping, repeating and going past the end are errors and leave the run as it was."""
    schedule = make_schedule(name, 2, 5.0)
    solver, x = SOLVERS[name](schedule), noise(0)
    for index, due in ((1, "step 0"), (0, None), (0, "step 1"), (1, None), (2, "the run is done"), (0, "run is done")):
        if due is None:
            x = solver.step(noise(index + 1), index, x)
        else:
            with pytest.raises(ValueError, match=due):
                solver.step(noise(1), index, x)
    assert torch.equal(x, run(SOLVERS[name](schedule), schedule, noise(0), noise_velocity())[-1])


@pytest.mark.parametrize(
    "velocity,sample,message",
    [
        (torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.float16), "sample must be fp32"),
        (torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.float64), "sample must be fp32"),
        (torch.zeros(1, 5), torch.zeros(1, 4), "sample's shape"),
        (torch.zeros(4), torch.zeros(1, 4), "sample's shape"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), "floating"),
        (torch.zeros(1, 4, device="meta"), torch.zeros(1, 4), "one device"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_unfit_tensors_are_refused(name, velocity, sample, message):
    """Wrong dtype, shape or device: a ValueError that names what came and what fits."""
    with pytest.raises(ValueError, match=message):
        SOLVERS[name](make_schedule(name, 2, 5.0)).step(velocity, 0, sample)


@pytest.mark.parametrize("name", ["unipc", "dpm++", "res_multistep", "deis", "sa_ode"])
def test_a_changed_latent_size_is_refused(name):
    """A solver with memory does not mix two runs of different sizes."""
    solver = SOLVERS[name](make_schedule(name, 3, 5.0))
    solver.step(torch.zeros(1, 4), 0, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="earlier steps"):
        solver.step(torch.zeros(1, 5), 1, torch.zeros(1, 5))


def saved(name, steps=4, done=2):
    schedule = make_schedule(name, steps, 5.0)
    solver = SOLVERS[name](schedule)
    run(solver, schedule, noise(0), last=done)
    return solver.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_solver_or_schedule_is_refused(name):
    """Resuming with another solver or other steps is an error that says what to restore."""
    other = NAMES[NAMES.index(name) - 1]
    schedule = make_schedule(name, 4, 5.0)
    with pytest.raises(ValueError, match="solver that the run began with"):
        SOLVERS[name](schedule).load_state_dict(saved(other))
    with pytest.raises(ValueError, match="same steps, shift and denoise"):
        SOLVERS[name](schedule).load_state_dict(saved(name, steps=5))


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
@pytest.mark.parametrize("change", ["drop", "add", "index"])
def test_damaged_state_is_refused(name, change):
    """A state that lacks a tensor, has one too many, or an impossible index is an error, and nothing is loaded."""
    state = saved(name)
    if change == "drop":
        del state[f"{name}.clean.0"]
    elif change == "add":
        state[f"{name}.clean.7"] = torch.zeros(1)
    else:
        state[f"{name}.index"] = torch.tensor(99)
    schedule = make_schedule(name, 4, 5.0)
    solver = SOLVERS[name](schedule)
    with pytest.raises(ValueError, match="damaged"):
        solver.load_state_dict(state)
    assert torch.equal(run(solver, schedule, noise(0))[-1], run(SOLVERS[name](schedule), schedule, noise(0))[-1])
