"""Runs with options of guidance: what they compute and spare, against passes worked out by hand; resumed runs."""

from dataclasses import replace

import pytest
import torch

from tests.small_models import SMALL, write_transformer
from tests.test_checkpoint import Stop, stopping
from tests.tiny_runs import SHAPE, SPEC, conditions, randn, tiny_model, tiny_run, write_tiny
from wan_core import Checkpoints
from wan_core.conditioning import ImageChannels, TextCondition
from wan_core.dit import ModelInputs, NegativeText, NormalisedAttention
from wan_core.guidance import GuidanceOptions, Projection, SigmaRange, SkippedBlocks
from wan_core.memory import OneAtATime
from wan_core.models import Model, Part
from wan_core.pipeline import check_coverage
from wan_core.presets import PRESETS
from wan_core.sampling import Conditions, Guidance, denoise, guided_velocity, make_schedule, schedule_from_sigmas
from wan_core.sampling.guidance import StepGuidance

APG = GuidanceOptions(projection=Projection(0.2, -0.75, 0.05))
NAG = GuidanceOptions(nag=NormalisedAttention(5.0, 2.5, 0.25))
OPTIONS = {"APG": APG, "NAG": NAG, "zero star": GuidanceOptions(zero_star=True, zero_steps=1),
           "skipped": GuidanceOptions(skipped=SkippedBlocks((1,))),
           "third pass": GuidanceOptions(skipped=SkippedBlocks((1,), 3.0)),
           "batched": GuidanceOptions(batched="on")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return tiny_model(folder, "single")


def passes(model, options, guidance=3.0, steps=4, **how):
    """Passes through the transformer at each step."""
    blocks, counts = [], []

    def on_step(step):
        counts.append(len(blocks) // SPEC.num_layers)
        blocks.clear()

    tiny_run(replace(model, guidance=options), steps, guidance=Guidance(guidance, guidance), on_block=blocks.append,
             on_step=on_step, **how)
    return counts


@pytest.mark.parametrize(("options", "guidance", "counts"), [
    (GuidanceOptions(), 3.0, [2, 2, 2, 2]), (GuidanceOptions(sigmas=SigmaRange(0.95, 0.6)), 3.0, [1, 2, 2, 1]),
    (GuidanceOptions(scales=(3.0, 1.0)), 5.0, [2, 1, 1, 1]), (GuidanceOptions(zero_steps=1), 3.0, [0, 2, 2, 2]),
    (GuidanceOptions(zero_star=True), 1.0, [1, 1, 1, 1]), (NAG, 1.0, [1, 1, 1, 1]), (APG, 3.0, [2, 2, 2, 2]),
    (GuidanceOptions(batched="on"), 3.0, [1, 1, 1, 1]),
    (GuidanceOptions(skipped=SkippedBlocks((1,))), 3.0, [2, 2, 2, 2]),
    (GuidanceOptions(skipped=SkippedBlocks((1,), 3.0, SigmaRange(0.95))), 3.0, [2, 3, 3, 3]),
    (GuidanceOptions(skipped=SkippedBlocks((1,), 3.0, SigmaRange(0.95))), 1.0, [1, 2, 2, 2])])
def test_passes_that_are_not_needed_are_not_computed(model, options, guidance, counts):
    """Promise: what a step spares is really spared, and only the original skip-layer guidance takes a third pass."""
    assert passes(model, options, guidance) == counts


def test_neutral_options_change_no_bit(model):
    """Promise: a model with neutral options, in whatever words, makes what it makes without."""
    expected = tiny_run(model)
    for options in (GuidanceOptions(sigmas=SigmaRange(1.0, 0.0)), GuidanceOptions(batched="off"),
                    GuidanceOptions(scales=(2.0,))):
        assert torch.equal(tiny_run(replace(model, guidance=options)), expected)


def velocity(model, sample, sigma, condition, away=None, without=()):
    module = model.get("low")
    text = module.prepare_text(condition.context)
    if away:
        text = replace(text, away=NegativeText(module.prepare_text(away.context), NAG.nag))
    return module(ModelInputs(sample, torch.tensor([1000 * sigma]), text), without=without)


@pytest.mark.parametrize("name", ["NAG", "skipped", "third pass", "zero star", "APG"])
@torch.no_grad()
def test_a_step_worked_out_by_hand(model, name):
    """Promise: Euler's step with the guided velocity, from the transformer's own answers for each pass."""
    options, given, noise = replace(OPTIONS[name], zero_steps=0), conditions(), randn(*SHAPE)
    positive, negative = given.positive[0], given.negative[0]
    step = StepGuidance(3.0, skipped=options.skipped, nag=options.nag)
    by_hand = {"positive": velocity(model, noise, 0.9, positive, negative if options.nag else None),
               "negative": velocity(model, noise, 0.9, negative, without=(1,) if name == "skipped" else ())}
    if name == "third pass":
        by_hand["skipped"] = velocity(model, noise, 0.9, positive, without=(1,))
    expected, _ = guided_velocity(by_hand, step, options)
    result = denoise(model, noise, schedule_from_sigmas(torch.tensor([0.9, 0.4])), given, Guidance(3.0, 3.0),
                     options=options, solver="euler")
    torch.testing.assert_close(result, noise - 0.5 * expected, atol=1e-5, rtol=0)


def test_zero_steps_leave_the_noise_as_it_is(model):
    """Promise: Euler's sample after the zero steps is the noise it began with."""
    seen = []
    denoise(model, randn(*SHAPE), make_schedule("euler", 4, 3.0), conditions(), Guidance(3.0, 3.0), solver="euler",
            options=GuidanceOptions(zero_steps=2), on_step=seen.append)
    assert torch.equal(seen[1].latents, randn(*SHAPE)) and not torch.equal(seen[2].latents, randn(*SHAPE))


@pytest.mark.parametrize("batch", [1, 2])
def test_both_prompts_in_one_call(model, batch):
    """Promise: with prompts of different length, it equals two calls within 1e-5."""
    shape = (batch, *SHAPE[1:])
    together, apart = (tiny_run(replace(model, guidance=GuidanceOptions(batched=choice)), shape=shape)
                       for choice in ("on", "off"))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_pictures_beside_batched_prompts(tmp_path):
    """Promise: the same picture in two conditions, at steps with one prompt and with both, equals two calls within
    1e-5; two pictures are not batched."""
    write_transformer(tmp_path / "i2v.safetensors", 5, replace(SMALL["i2v"], num_layers=2))
    part, pictures = Part.open(tmp_path / "i2v.safetensors", "transformer"), randn(2, 20, *SHAPE[2:], seed=4)
    model = Model(part, part, PRESETS["wan21_i2v_14b_480p"], OneAtATime("cpu"))
    given, schedule = conditions(), make_schedule("euler", 3, 3.0)

    def run(batched, second):
        beside = [replace(prompts[0], beside=(ImageChannels(pictures[index:index + 1].clone()),))
                  for prompts, index in ((given.positive, 0), (given.negative, second))]
        return denoise(model, randn(*SHAPE), schedule, Conditions(beside[:1], beside[1:]), Guidance(3.0, 3.0),
                       options=GuidanceOptions(batched=batched, sigmas=SigmaRange(0.9)), solver="euler")

    torch.testing.assert_close(run("on", 0), run("off", 0), atol=1e-5, rtol=1e-5)
    assert not torch.equal(run("on", 0), run("off", 0)) and torch.equal(run("on", 1), run("off", 1))


def test_what_cannot_be_batched_is_not(model):
    """Promise: two prompts at once, or a pass without a block, go one after the other and come to the same."""
    on, given = GuidanceOptions(batched="on"), conditions()
    two = Conditions([given.positive[0], TextCondition(randn(1, 4, SPEC.text_dim, seed=6))], given.negative)
    schedule = make_schedule("unipc", 3, 3.0)
    results = [denoise(model, randn(*SHAPE), schedule, two, Guidance(3.0, 3.0), options=options)
               for options in (on, GuidanceOptions())]
    assert torch.equal(*results)
    assert passes(model, replace(on, skipped=SkippedBlocks((0,))), steps=3) == [2, 2, 2]


@pytest.mark.parametrize(("name", "kind"), [*((name, "single") for name in OPTIONS), ("APG", "pair")])
def test_a_run_goes_on_where_it_was_stopped(folder, tmp_path, name, kind):
    """Promise: with each option, projected guidance's momentum and the switch of experts included, a resumed run makes
    the same bits; and one with other options is another run."""
    model = replace(tiny_model(folder, kind), guidance=OPTIONS[name])
    expected = tiny_run(model, 4)
    assert not torch.equal(expected, tiny_run(replace(model, guidance=GuidanceOptions()), 4)) or name == "batched"
    for after in (2, 0) if name == "APG" else (1,):
        with pytest.raises(Stop):
            tiny_run(model, 4, checkpoints=Checkpoints(tmp_path), on_step=stopping(after))
        told = []
        tiny_run(replace(model, guidance=GuidanceOptions(scales=(2.5,))), 4, checkpoints=Checkpoints(tmp_path),
                 on_step=told.append)
        assert len(told) == 4
        told.clear()
        assert torch.equal(tiny_run(model, 4, checkpoints=Checkpoints(tmp_path), on_step=told.append), expected)
        assert len(told) == 3 - after


def test_each_expert_has_momentum_of_its_own(folder):
    """Promise: a pair's low-noise expert goes on from the high-noise expert's sample as a run that begins there."""
    model = replace(tiny_model(folder, "pair"), guidance=APG)
    schedule, seen, given = make_schedule("euler", 5, 3.0), [], conditions()
    whole = denoise(model, randn(*SHAPE), schedule, given, Guidance(3.0, 3.0), options=APG, solver="euler",
                    on_step=seen.append)
    switch = [step.expert for step in seen].index("low")
    assert 1 < switch < 4
    rest = denoise(model, seen[switch - 1].latents, schedule_from_sigmas(schedule.sigmas[switch:]), given,
                   Guidance(3.0, 3.0), options=APG, solver="euler")
    assert torch.equal(whole, rest)


def test_a_failed_step_is_repeated_with_the_same_momentum(folder):
    """Promise: where memory runs out in the middle of a step, the result is the same bit for bit."""
    model = replace(tiny_model(folder, "single"), guidance=APG)
    expected, calls = tiny_run(model, 4), []

    def on_block(block):
        calls.append(block)
        if len(calls) in (11, 15):
            raise torch.OutOfMemoryError

    assert torch.equal(tiny_run(model, 4, on_block=on_block), expected) and len(calls) > 16


def test_a_gap_in_the_negative_prompt(model):
    """Promise: a negative prompt is asked for at the steps that use one, for NAG too, and at no others."""
    given = conditions()
    late = Conditions(given.positive, [replace(given.negative[0], sigmas=SigmaRange(0.5, 0.0))])
    schedule = make_schedule("unipc", 4, 3.0)
    check_coverage(replace(model, guidance=GuidanceOptions(sigmas=SigmaRange(0.5))), schedule, late, Guidance(3.0, 3.0))
    for options in (GuidanceOptions(), NAG):
        with pytest.raises(ValueError, match="no prompt is active"):
            check_coverage(replace(model, guidance=options), schedule, late, Guidance(3.0, 3.0))
    with pytest.raises(ValueError, match="needs a negative prompt"):
        denoise(model, randn(*SHAPE), schedule, Conditions(given.positive), Guidance(1.0, 1.0), options=NAG)
