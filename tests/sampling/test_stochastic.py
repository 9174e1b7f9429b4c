"""LCM: diffusers' step, the right amount of noise, and noise that belongs to seed and sigma."""

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.schedulers import scheduling_flow_match_lcm

from wan_core.sampling import LCM, partial, schedule_named

SHAPE = (1, 4, 4, 16, 16)


def noise(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def run(schedule, x, seed=0):
    solver = LCM(schedule, seed)
    for index in range(schedule.steps):
        x = solver.step(torch.tanh(x), index, x)
    return x


def added(seed):
    """The noise of a step from a model that knows the clean latent to be 0."""
    solver = LCM(partial(schedule_named("lightning", 2, 1.0), 0, 1), seed)
    x = noise(0)
    return solver.step(x, 0, x) / 0.5


def test_every_step_agrees_with_diffusers(monkeypatch):
    """With our noise put in the place of its own, diffusers' flow-matching LCM scheduler gives the same samples."""
    schedule, drawn = schedule_named("causvid_14b"), []
    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", lambda *_, **__: drawn[-1])
    oracle = FlowMatchLCMScheduler()
    oracle.set_timesteps(schedule.steps)
    oracle.sigmas, oracle.timesteps = schedule.sigmas.clone(), schedule.timesteps.clone()
    oracle.set_begin_index(0)
    solver, ours = LCM(schedule, seed=5), noise(0)
    theirs = ours
    for index, (sigma, after) in enumerate(zip(schedule.sigmas.tolist(), schedule.sigmas[1:].tolist())):
        velocity = noise(index + 1)
        clean = ours - sigma * velocity
        ours = solver.step(velocity, index, ours)
        drawn.append((ours - (1 - after) * clean) / after if after else torch.zeros(SHAPE))
        theirs = oracle.step(velocity, schedule.timesteps[index], theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert all(abs(float(some.std()) - 1) < 0.05 and abs(float(some.mean())) < 0.1 for some in drawn[:-1])


def test_noise_is_standard_normal_and_new_for_every_seed():
    """Mean 0 and variance 1; no likeness to the noise that a run of the same seed begins with, or to another seed's."""
    mine = added(7)
    assert abs(float(mine.mean())) < 0.1 and abs(float(mine.var()) - 1) < 0.1
    for other in (noise(7), added(8), added(6)):
        assert abs(float((mine * other).mean())) < 0.1
    assert torch.equal(mine, added(7)) and torch.equal(added(-1), added(2 ** 64 - 1))


@pytest.mark.parametrize("name", ["fastwan", "rcm"])
def test_two_parts_are_the_whole(name):
    """A run that is split between two solvers of one seed gets the same noise at the same sigmas."""
    schedule, steps = schedule_named(name), schedule_named(name).steps
    for cut in range(1, steps):
        first = run(partial(schedule, 0, cut), noise(0), seed=3)
        assert torch.equal(run(partial(schedule, cut), first, seed=3), run(schedule, noise(0), seed=3))
    assert not torch.equal(run(schedule, noise(0), seed=4), run(schedule, noise(0), seed=3))


def test_a_model_that_knows_the_clean_latent_ends_there():
    """From any noise, whatever was added: the last step adds none."""
    schedule, clean = schedule_named("rcm"), noise(9)
    solver, x = LCM(schedule), noise(0)
    for index, sigma in enumerate(schedule.sigmas[:-1].tolist()):
        x = solver.step((x - clean) / sigma, index, x)
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)
