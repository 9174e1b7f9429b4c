"""RES, DEIS and SA-ODE against their formulas, written out for one step."""

import math

import pytest
import torch

from wan_core.sampling import DEIS, SAODE, ResMultistep, schedule_from_sigmas


def noise(seed):
    return torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(seed))


def two_steps(solver, sigmas):
    """Samples before and after the second step, with the velocities noise(1), noise(2)."""
    run = solver(schedule_from_sigmas(sigmas))
    second = run.step(noise(1), 0, noise(0))
    return second, run.step(noise(2), 1, second)


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.7, 0.0], [0.8, 0.5, 0.1], [0.4, 0.3, 0.25, 0.0]])
def test_res_takes_the_phi_functions_of_the_paper(sigmas):
    """x' = e^-h x + h (b1 D + b2 D_before), with b2 = phi2(-h) / c2 and b1 = phi1(-h) - b2 over -log sigma."""
    first, second, third = sigmas[:3]
    x, after = two_steps(ResMultistep, sigmas)
    h, c2 = math.log(second / third), math.log(second / first) / math.log(second / third)
    phi1 = math.expm1(-h) / -h
    b2 = (phi1 - 1) / -h / c2
    before, now = noise(0) - first * noise(1), x - second * noise(2)
    expected = math.exp(-h) * x + h * ((phi1 - b2) * now + b2 * before)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", [ResMultistep, DEIS])
def test_a_long_last_step_lands_on_the_clean_estimate(solver):
    """At sigma 0, after a shorter step, the result is what the model says the clean latent is."""
    x, after = two_steps(solver, [1.0, 0.7, 0.0])
    torch.testing.assert_close(after, x - torch.tensor(0.7) * noise(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.2], [0.5, 0.25, 0.0]])
def test_deis_integrates_a_line_through_two_velocities(sigmas):
    """The mean velocity of a step is that of the line at its middle, whatever the lengths of both steps."""
    first, second, third = sigmas
    x, after = two_steps(DEIS, sigmas)
    slope = (noise(2) - noise(1)) / (second - first)
    middle = noise(2) + slope * (third - second) / 2
    torch.testing.assert_close(after, x + (third - second) * middle, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.2], [0.5, 0.25, 0.0]])
def test_sa_ode_weighs_velocities_as_of_even_steps(sigmas):
    """x' = x + (sigma' - sigma) (3 v - v_before) / 2, at every length of the steps, and to the end."""
    x, after = two_steps(SAODE, sigmas)
    torch.testing.assert_close(after, x + (sigmas[2] - sigmas[1]) * (3 * noise(2) - noise(1)) / 2, rtol=0, atol=2e-6)
