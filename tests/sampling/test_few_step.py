"""Named schedules: the published numbers, what goes with them, the change of experts, and refusals."""

import pytest
import torch

from wan_core.presets import PRESETS
from wan_core.sampling import (
    NAMED_SCHEDULES,
    SOLVERS,
    euler_schedule,
    last_part,
    sampling_named,
    schedule_named,
    unipc_schedule,
)

# Timesteps as the sources print them, or as they follow from the numbers there (name, steps, shift -> timesteps).
PUBLISHED = {
    ("lightx2v", None, None): [1000, 937.5, 833.3333, 625],
    ("lightx2v_flf2v", None, None): [1000, 979.5918, 941.1765, 842.1053],
    ("lightning", None, None): [1000, 937.5, 833.3333, 625],
    ("lightning", 6, None): [1000, 961.5385, 909.0909, 833.3333, 714.2857, 500],
    ("lightning", 8, None): [1000, 972.2222, 937.5, 892.8571, 833.3333, 750, 625, 416.6667],
    ("self_forcing", None, None): [1000, 937.5, 833.3333, 625],
    ("causvid_14b", None, None): [999, 934, 862, 756, 603, 410, 250, 140, 74],
    ("causvid_14b", 4, None): [999, 934, 862, 756],
    ("causvid_warp", None, None): [1000, 960, 888.8889, 727.2727],
    ("fastwan", None, None): [1000, 757, 522],
    ("rcm", None, None): [987.654, 933.781, 852.895, 608.979],
    ("rcm", 3, None): [987.654, 933.781, 852.895],
    ("rcm_720p", None, None): [991.736, 933.781, 852.895, 608.979],
    ("rcm_i2v", 2, None): [995.025, 933.781],
    # ComfyUI's own results at shift 5.
    ("simple", 4, 5.0): [1000, 937.5, 833.3333, 625],
    ("simple", 6, 5.0): [1000, 961.7159, 909.2149, 833.3333, 714.8973, 500.5995],
    ("beta", 8, 5.0): [1000, 988.0553, 959.0316, 910.6949, 833.8881, 711.2069, 518.1499, 235.3896],
}


@pytest.mark.parametrize("name,steps,shift", PUBLISHED)
def test_published_numbers(name, steps, shift):
    """Each named schedule visits the published timesteps, uncut, at sigma = timestep / 1000, and ends at 0."""
    schedule, expected = schedule_named(name, steps, shift), torch.tensor(PUBLISHED[name, steps, shift])
    torch.testing.assert_close(schedule.timesteps, expected.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(schedule.sigmas[:-1] * 1000, schedule.timesteps, rtol=0, atol=1e-3)
    assert schedule.sigmas[-1] == 0


def test_every_schedule_is_checked_against_numbers():
    """No name is without a line above, but AccVideo's, which is the official grid at its steps."""
    assert set(NAMED_SCHEDULES) - {name for name, *_ in PUBLISHED} == {"accvideo"}
    schedule, official = schedule_named("accvideo"), unipc_schedule(10, 5.0)
    assert torch.equal(schedule.sigmas, official.sigmas) and torch.equal(schedule.timesteps, official.timesteps)
    assert torch.equal(schedule_named("lightning", 5, 8.0).sigmas, euler_schedule(5, 8.0).sigmas)


def test_beta_leaves_repeated_levels_away():
    """With nearly as many steps as there are levels the quantiles meet, and each level is taken once."""
    schedule = schedule_named("beta", 1000, 1.0)
    assert 700 < schedule.steps < 1000 and schedule.sigmas[0] == 1


@pytest.mark.parametrize("name", NAMED_SCHEDULES)
def test_what_goes_with_a_schedule(name):
    """Solver and guidance of each are valid; distilled models run without guidance, any model with its own."""
    named, own = NAMED_SCHEDULES[name], PRESETS["wan21_t2v_14b"].sampling
    schedule, sampling = sampling_named(name, own)
    assert sampling.solver in SOLVERS and sampling.steps == schedule.steps and sampling.boundary is None
    distilled = name not in ("accvideo", "simple", "beta")
    assert (sampling.guidance_low, sampling.guidance_high) == ((1.0, 1.0) if distilled else (5.0, 5.0))
    assert sampling.shift == (named.shift or own.shift) and sampling.negative_prompt == own.negative_prompt
    assert torch.equal(schedule.sigmas, sampling_named(name, own, schedule.steps)[0].sigmas)


@pytest.mark.parametrize("name,preset,shift,moved", [
    ("lightx2v", "wan22_t2v_a14b", None, False), ("lightx2v", "wan22_i2v_a14b", None, False),
    ("lightx2v", "wan22_t2v_a14b", 8.0, True), ("lightx2v_flf2v", "wan22_i2v_a14b", None, True)])
def test_experts_change_after_the_published_step(name, preset, shift, moved):
    """LightX2V's lists change experts after two steps; the model's boundary is kept wherever it says the same."""
    own = PRESETS[preset].sampling
    schedule, sampling = sampling_named(name, own, shift=shift)
    assert [t >= sampling.boundary * 1000 for t in schedule.timesteps.tolist()] == [True, True, False, False]
    assert (sampling.boundary != own.boundary) == moved


@pytest.mark.parametrize("name,steps", [("lightning", 4), ("rcm_i2v", 4), ("simple", 20)])
def test_other_schedules_keep_the_boundary(name, steps):
    """Where no step is published the experts change at the model's own noise level."""
    own = PRESETS["wan22_i2v_a14b"].sampling
    assert sampling_named(name, own, steps)[1].boundary == own.boundary == 0.9


def test_a_part_of_a_list_is_its_end():
    """Of levels that a model knows the last are taken, at least one, and none is made up."""
    whole = schedule_named("lightx2v")
    for denoise, left in ((1.0, 4), (0.75, 3), (0.5, 2), (0.3, 1), (0.01, 1)):
        assert torch.equal(last_part(whole, denoise).sigmas, whole.sigmas[4 - left:])
    for denoise in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="greater than 0 and at most 1"):
            last_part(whole, denoise)


@pytest.mark.parametrize("request_,message", [
    (("lightx3v",), "unknown schedule 'lightx3v'; choose one of lightx2v"),
    (("lightx2v", 5), "made for 4 steps, and 5"), (("rcm", 5), "made for 1 to 4 steps"), (("rcm", 0), "1 to 4"),
    (("causvid_14b", True), "1 to 9 steps, and True"), (("lightning", 4.0), "1 to 100 steps, and 4.0"),
    (("fastwan", None, 5.0), "fixed, and a shift of 5"), (("lightning", 4, 0.0), "greater than 0"),
    (("lightning", 4, float("nan")), "greater than 0"), (("simple", None, 5.0), "no steps of its own"),
    (("beta", 8), "no shift of its own")])
def test_what_a_schedule_cannot_have_is_refused(request_, message):
    """Unknown names, steps that were not trained, shifts of fixed levels: a ValueError that names both sides."""
    with pytest.raises(ValueError, match=message):
        schedule_named(*request_)
    if "of its own" not in message:
        with pytest.raises(ValueError, match=message):
            sampling_named(request_[0], PRESETS["nano_t2v"].sampling, *request_[1:])
