"""Wan Schedule: levels, what goes with them in the sampler, and the picture."""

import pytest
import torch


@pytest.fixture
def schedule(call, nano):
    def make(model="model", **widgets):
        return call("WanCoreSchedule", model=nano[model], **widgets)

    return make


def test_levels_and_what_goes_with_them(schedule, nano):
    """Promise: published levels, the solver's name, and a changed copy of the model with guidance 1."""
    model, sigmas, solver, _ = schedule(schedule="rcm", steps=2)
    assert sigmas.tolist() == pytest.approx([0.987654, 0.933781, 0.0], abs=1e-5) and solver == "lcm"
    assert model.preset.sampling.guidance_low == 1.0 and nano["model"].preset.sampling.guidance_low == 3.0
    assert model.low is nano["model"].low


def test_the_sampler_follows(call, nano, schedule):
    """Promise: model, sigmas and solver joined to the sampler make the engine's run: without guidance, one boundary."""
    model, sigmas, solver, _ = schedule("pair", schedule="lightx2v_flf2v")
    assert [model.name_at(t) for t in (1000 * sigmas[:-1]).tolist()] == ["high", "high", "low", "low"]
    empty, = call("WanCoreEmptyLatent", width=32, height=32, length=5)
    texts = {"positive": nano["positive"], "negative": nano["negative"], "latent": empty, "seed": 3}
    followed, = call("WanCoreSampler", model=model, sigmas=sigmas, solver=solver, **texts)
    by_hand, = call("WanCoreSampler", model=model, solver="euler", steps=4, shift=16.0, guidance=1.0, **texts)
    torch.testing.assert_close(followed["samples"], by_hand["samples"], atol=1e-3, rtol=0)
    other, = call("WanCoreSampler", model=nano["pair"], sigmas=sigmas, solver=solver, guidance=1.0, **texts)
    assert not torch.allclose(other["samples"], by_hand["samples"], atol=1e-2)


def test_zero_stands_for_the_published_or_the_models_own(schedule, nano):
    """Promise: steps and shift of 0 are the published ones, or the model's where the schedule has none."""
    own = nano["model"].preset.sampling
    assert len(schedule(schedule="lightning")[1]) == 5 and len(schedule(schedule="lightning", steps=8)[1]) == 9
    model, sigmas, solver, _ = schedule(schedule="simple")
    assert len(sigmas) == own.steps + 1 and solver == own.solver and model.preset.sampling == own


def test_what_a_schedule_cannot_have_is_refused(schedule):
    """Promise: steps and shifts that do not belong to a schedule are errors, not ignored."""
    with pytest.raises(ValueError, match="made for 4 steps"):
        schedule(schedule="lightx2v", steps=6)
    with pytest.raises(ValueError, match="are fixed"):
        schedule(schedule="fastwan", shift=5.0)


def test_the_solver_fits_the_samplers_widget(pack):
    """Promise: the output's type is the widget's list itself, which is when ComfyUI lets the two be connected."""
    widget = pack.NODE_CLASS_MAPPINGS["WanCoreSampler"].INPUT_TYPES()["required"]["solver"][0]
    assert pack.NODE_CLASS_MAPPINGS["WanCoreSchedule"].RETURN_TYPES[2] == widget


def test_the_plot_shows_levels_and_experts(module):
    """Promise: an IMAGE of the curve through all levels, in the experts' colours, with their grounds side by side."""
    plot = module("nodes.plot")
    sigmas = [1.0, 0.9, 0.5, 0.0]
    image = plot.plot_sigmas(sigmas, ["high", "high", "low"], 0.7)
    assert image.shape == (1, plot.HEIGHT, plot.WIDTH, 3) and 0 <= image.min() and image.max() <= 1
    across, up = plot.WIDTH - 2 * plot.MARGIN, plot.HEIGHT - 2 * plot.MARGIN
    for index, (sigma, expert) in enumerate(zip(sigmas, ("high", "high", "low", "low"))):
        pixel = image[0, round(plot.MARGIN + up * (1 - sigma)), round(plot.MARGIN + across * index / 3)]
        torch.testing.assert_close(pixel, torch.tensor(plot.COLOURS[expert]), atol=0.02, rtol=0)
    below = image[0, plot.HEIGHT - plot.MARGIN - 5]
    left, right = below[plot.WIDTH // 2], below[plot.WIDTH - plot.MARGIN - 60]
    assert left[0] > left[2] and right[2] > right[0]
    single = plot.plot_sigmas(torch.linspace(1, 0, 501).tolist(), ["low"] * 500)
    assert torch.equal(single[0, 5, 5], torch.tensor(plot.BACKGROUND)) and not torch.equal(single, image)
