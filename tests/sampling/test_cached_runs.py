"""Step caches in a run: what is really spared, that nothing else changes, and that a run can be stopped anywhere."""

from dataclasses import replace

import pytest
import torch

from tests.sampling.test_recovery import EachOnce, Patient
from tests.tiny_runs import GUIDANCE, SPEC, tiny_denoise, tiny_model, tiny_run, write_tiny
from wan_core import Checkpoints, load_model
from wan_core.cache import (
    AutoCache,
    Calibration,
    EasyCache,
    MagCache,
    Polynomial,
    RunSteps,
    TeaCache,
    begin_cache,
)
from wan_core.calibrate import calibrate
from wan_core.conditioning import TextCondition
from wan_core.dit import ModelInputs
from wan_core.forecast import needs
from wan_core.memory import Plan
from wan_core.presets import PRESETS
from wan_core.sampling import make_schedule

STEPS = 8
BOTH = ("positive", "negative")


def measured(preset):
    """What a model was never measured to have: magnitudes that stay, an output that changes by 1 % a step."""
    polynomials = tuple(Polynomial(expert, signal, (0.01,), (1e-6, 1e3)) for expert in ("high", "low")
                        for signal in ("e", "e0"))
    return Calibration(preset, (1.0,) * STEPS, (1.0,) * STEPS, polynomials)


def cached(folder, kind, name):
    model = tiny_model(folder, kind)
    known = measured(model.preset.name)
    caches = {"TeaCache": TeaCache(0.025, retention=False, measured=known),
              "MagCache": MagCache(0.1, 2, 0.2, measured=known), "EasyCache": EasyCache(10.0, 0.25)}
    return replace(model, cache=caches[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["TeaCache", "MagCache", "EasyCache"])
def cache(request):
    return request.param


def run(model, **how):
    """The result, and for each step its expert, what was reused and how many blocks were computed."""
    blocks, told = [], []

    def on_step(step):
        told.append((step.expert, step.reused, len(blocks)))
        blocks.clear()

    return tiny_run(model, STEPS, on_step=on_step, on_block=blocks.append, **how), told


@pytest.mark.parametrize("kind", ["single", "pair", "lora"])
def test_no_block_of_a_reused_pass_is_computed(folder, cache, kind):
    """Promise: a step that is said to be reused computes no block, all others compute all; first and last steps, and
    an expert's first one, are computed."""
    _, told = run(cached(folder, kind, cache))
    computed = [2 * SPEC.num_layers - len(reused) * SPEC.num_layers for _, reused, _ in told]
    assert [count for *_, count in told] == computed and 0 in computed
    experts = [expert for expert, *_ in told]
    firsts = {experts.index(expert) for expert in experts}
    assert all(not told[index][1] for index in firsts)
    assert cache == "MagCache" or not told[-1][1]


def test_what_blocks_added_is_added_again(folder):
    """Promise: a reused pass gives the velocity of the new tokens plus what the blocks added at the last computed one,
    through the head of its own time."""
    module = tiny_model(folder, "single").get("low")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 16, 2, 4, 4, generator=generator) for _ in range(2))
    text = module.prepare_text(torch.randn(1, 5, SPEC.text_dim, generator=generator))

    class Kept:
        added = None

        def reused(self):
            return self.added

        def keep(self, added):
            self.added = added()

    kept = Kept()
    with torch.no_grad():
        full = module(ModelInputs(first, torch.tensor([900.0]), text), shortcut=kept)
        assert torch.equal(full, module(ModelInputs(first, torch.tensor([900.0]), text)))
        again = module(ModelInputs(first, torch.tensor([900.0]), text), shortcut=kept)
        assert (again - full).abs().max() <= 1e-5
        other = module(ModelInputs(second, torch.tensor([700.0]), text), shortcut=kept)
        tokens = module._embed_patches(second, module.patch_embedding) + kept.added
        time, _ = module.time_signals(torch.tensor([700.0]))
        scale, shift = (module.head.modulation.float() + time.unsqueeze(1)).split(1, 1)[::-1]
        normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=SPEC.eps) * (1 + scale) + shift
        expected = module.head.head(normed)
        expected = expected.reshape(1, 2, 2, 2, 1, 2, 2, 16).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(1, 16, 2, 4, 4)
    assert (other - expected).abs().max() <= 1e-5


def test_without_a_step_to_spare_nothing_changes(folder, cache):
    """Promise: a cache that may reuse at no step leaves the result as it is, bit for bit."""
    model = cached(folder, "single", cache)
    idle = replace(model, cache=replace(model.cache, start=0.0, end=0.0))
    result, told = run(idle)
    assert not any(reused for _, reused, _ in told)
    assert torch.equal(result, run(replace(model, cache=None))[0])
    assert not torch.equal(result, run(model)[0])


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_a_cached_run_goes_on_where_it_was_stopped(folder, tmp_path, cache, kind):
    """Promise: stopped behind any step and started again, the same bits follow."""
    model = cached(folder, kind, cache)
    expected, _ = run(model, masked=True)

    class Stop(Exception):
        pass

    for after in range(STEPS):
        def stop(step, after=after):
            if step.index == after:
                raise Stop

        with pytest.raises(Stop):
            tiny_run(model, STEPS, masked=True, checkpoints=Checkpoints(tmp_path), on_step=stop)
        assert torch.equal(tiny_run(model, STEPS, masked=True, checkpoints=Checkpoints(tmp_path)), expected)
        assert not list(tmp_path.iterdir())


def test_a_cached_run_in_which_allocations_fail(folder, cache):
    """Promise: whatever was kept and reused when memory ran out, repeating the step gives the same bits."""
    model, steps = cached(folder, "single", cache), 4
    sigmas = tuple(make_schedule("unipc", steps, 3.0).sigmas[:-1].tolist())

    def begun():
        return begin_cache(replace(model.cache, **({"warm_up": 0.0} if cache == "EasyCache" else {})),
                           RunSteps(model.preset.name, sigmas, ("low",) * steps, (BOTH,) * steps))[0]

    reused, faults = [], EachOnce(stride=9)
    expected = tiny_denoise(model, steps, cache=begun(), on_step=lambda step: reused.append(step.reused))
    assert any(reused)
    result = tiny_denoise(Patient(model, faults), steps, cache=begun(), on_step=faults.begin, within=faults)
    assert torch.equal(result, expected) and faults.failures > 60


def test_a_prompt_that_comes_in_later_is_computed(folder):
    """Promise: what one prompt's blocks added is never added for another one."""
    model, prompts = cached(folder, "single", "MagCache"), []
    run_of = begin_cache(model.cache, RunSteps(model.preset.name, (0.9, 0.8, 0.7), ("low",) * 3, (("positive",),) * 3))
    run_of = run_of[0]
    for index in range(3):
        run_of.begin(index, None)

        def compute(shortcut, index=index):
            # The second step is of another prompt.
            one = shortcut(1 if index == 1 else 0)
            prompts.append(one.reused())
            one.keep(lambda: torch.full((1, 1, 1), float(index)))
            return torch.zeros(1)

        run_of.velocity("positive", torch.zeros(1), compute)
    assert prompts[:2] == [None, None]


def test_auto_takes_none_for_few_steps_and_a_cache_for_many(folder, caplog):
    """Promise: a run of 4 steps computes them all; one of 30 takes what is published for the model, and the log says
    what that is."""
    model = replace(tiny_model(folder, "single"), cache=AutoCache("fast"))
    told = []
    with caplog.at_level("INFO", "wan_core"):
        tiny_run(model, 4, on_step=lambda step: told.append(step.reused))
    assert not any(told) and "too few" in caplog.text
    for preset, name in (("nano_t2v", "EasyCache"), ("wan21_t2v_1_3b", "TeaCache"), ("wan21_vace_1_3b", "MagCache")):
        caplog.clear()
        with caplog.at_level("INFO", "wan_core"):
            tiny_run(replace(model, preset=PRESETS[preset]), 30, on_step=lambda step: told.append(step.reused))
        assert name in caplog.text
    assert any(told)


def test_what_is_kept_is_foreseen(folder):
    """Promise: the forecast counts what a cache keeps of the tokens for each prompt, and nothing for EasyCache."""
    shape, prompts = (1, 16, 2, 4, 4), [TextCondition(torch.ones(1, 5, SPEC.text_dim)) for _ in BOTH]
    plain = needs(tiny_model(folder, "single"), shape, prompts).peak(Plan())
    kept = 2 * 8 * SPEC.dim * 4
    for name, more in (("TeaCache", kept), ("MagCache", kept), ("EasyCache", 0)):
        assert needs(cached(folder, "single", name), shape, prompts).peak(Plan()) - plain == more, name


def test_measuring_changes_nothing_and_finds_what_it_should():
    """Promise: a calibration of a whole run has a ratio for each step of both branches, polynomials for the expert,
    and the caches that it is given to reuse steps."""
    model = load_model()
    found = calibrate(["a red circle moving left"], model, steps=12, frames=5)
    assert len(found.positive) == len(found.negative) == 12 and found.positive[0] == 1.0
    assert all(0.5 < ratio < 2 for ratio in found.positive + found.negative)
    assert {(one.expert, one.signal) for one in found.polynomials} == {("low", "e"), ("low", "e0")}
    steps = RunSteps(model.preset.name, tuple(make_schedule("unipc", 12, 3.0).sigmas[:-1].tolist()), ("low",) * 12,
                     (BOTH,) * 12)
    assert any(MagCache.for_preset(model.preset.name, "fast", found).plan(steps, "low")["positive"])


@pytest.mark.parametrize("cache", ["TeaCache", "MagCache"])
def test_guidance_that_changes_is_known_to_the_plan(folder, cache):
    """Promise: where the negative branch runs at some steps only, it is never reused over the gap."""
    model = cached(folder, "single", cache)
    options = replace(model.guidance, scales=(3.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0, 3.0))
    told = []
    tiny_run(replace(model, guidance=options), STEPS, guidance=GUIDANCE,
             on_step=lambda step: told.append((step.branches, step.reused)))
    assert [len(branches) for branches, _ in told] == [2, 2, 2, 1, 1, 2, 2, 2]
    assert all(set(reused) <= set(branches) for branches, reused in told)
    assert "negative" not in told[5][1] and "negative" in told[6][1]
