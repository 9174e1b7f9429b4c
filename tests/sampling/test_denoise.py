"""The denoising loop: the official run, which expert and which prompt work when, what is told, how it is stopped."""

import math
import weakref
from dataclasses import dataclass

import pytest
import torch

from tests.golden_cases import load_case
from wan_core.conditioning import SigmaRange, TextCondition
from wan_core.dit import ModelInputs, WanTransformer
from wan_core.memory import OneAtATime
from wan_core.presets import TransformerSpec
from wan_core.sampling import Conditions, Guidance, denoise, make_schedule, schedule_from_sigmas

SPEC = TransformerSpec(model_type="t2v", dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4,
                       text_dim=12, text_len=16, freq_dim=32)


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be built into a transformer as often as wanted; `living` holds those that are alive."""

    spec: TransformerSpec
    weights: dict[str, torch.Tensor]
    living: weakref.WeakSet

    def build(self, device, dtype, layout=None):
        assert not self.living, "another transformer is still on the device"
        model = WanTransformer(self.spec).to(device, dtype).requires_grad_(False)
        model.load_state_dict(self.weights)
        self.living.add(model)
        return model


class Experts:
    """A high- and a low-noise expert that share a device with room for one; `got` is the order of the calls."""

    def __init__(self, high, low, boundary=0.875, spec=SPEC):
        self.living, self.got, self.boundary = weakref.WeakSet(), [], boundary
        self._parts = {"high": Checkpoint(spec, high, self.living), "low": Checkpoint(spec, low, self.living)}
        self._placement = OneAtATime("cpu")

    def name_at(self, timestep):
        return "high" if timestep >= self.boundary * 1000 else "low"

    chunk = None

    def expect(self, name, sigma):
        """Nothing can be brought ahead."""

    def state(self, name, sigma):
        return name

    def recover(self, error, shape):
        """Nothing could be done with less memory."""

    def get(self, name, sigma):
        self.got.append(name)
        return self._placement.place(self._parts[name], torch.float32)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(seed):
    torch.manual_seed(seed)
    return WanTransformer(SPEC).state_dict()


@pytest.fixture(scope="module")
def high():
    return weights(1)


@pytest.fixture(scope="module")
def low():
    return weights(2)


@pytest.fixture
def experts(high, low):
    return Experts(high, low)


def prompt(seed, start=math.inf, end=0.0, strength=1.0):
    return TextCondition(randn(1, 5, SPEC.text_dim, seed=seed), SigmaRange(start, end), strength)


NOISE = randn(1, 4, 2, 4, 4, seed=9)
BOTH = Conditions([prompt(3)], [prompt(4)])
UNGUIDED = Guidance(1.0, 1.0)



def test_equals_the_official_run_with_two_experts():
    """Golden case: guidance 4 and 3, a switch at 0.875, UniPC at shift 12: every step within 1e-4 of the official."""
    case = load_case("pipeline_wan22_t2v_moe")
    config = case.config
    names = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_heads", "num_layers", "in_dim", "out_dim")
    spec = TransformerSpec(model_type="t2v", **{name: config[name] for name in names})
    parts = [{name.removeprefix(f"{part}."): value for name, value in case.weights.items() if name.startswith(part)}
             for part in ("high", "low")]
    experts = Experts(*parts, config["boundary"], spec)
    conditions = Conditions([TextCondition(case.inputs["context"][None])],
                            [TextCondition(case.inputs["context_null"][None])])
    steps = []
    schedule = make_schedule(config["solver"], config["steps"], config["shift"])
    result = denoise(experts, case.inputs["noise"][None], schedule, conditions,
                     Guidance(config["guide_scale_high"], config["guide_scale_low"]), on_step=steps.append)
    latents = torch.stack([step.latents[0] for step in steps])
    torch.testing.assert_close(latents, case.outputs["latents"], atol=1e-4, rtol=0)
    assert torch.equal(result, steps[-1].latents)
    assert {step.expert for step in steps} == {"high", "low"}


def test_experts_take_turns_once_and_alone(experts):
    """The run goes from the high- to the low-noise expert once, and never are two of them alive (see Checkpoint)."""
    denoise(experts, NOISE, make_schedule("unipc", 6, 12.0), BOTH, Guidance(4.0, 3.0))
    assert experts.got == sorted(experts.got) and set(experts.got) == {"high", "low"}
    assert len(experts.got) == 6 and len(experts.living) == 1


def test_the_boundary_belongs_to_the_high_noise_expert(experts):
    """At exactly boundary * 1000 the high-noise expert works, right below it the low-noise one, with its own scale."""
    seen = []
    schedule = schedule_from_sigmas(torch.tensor([1.0, 0.875, 0.874, 0.0]))
    denoise(experts, NOISE, schedule, BOTH, Guidance(4.0, 1.0), on_step=seen.append, solver="euler")
    assert [step.expert for step in seen] == ["high", "high", "low"]


def counted_blocks(experts, schedule, conditions, guidance):
    calls = []
    denoise(experts, NOISE, schedule, conditions, guidance, on_block=calls.append)
    assert calls == list(range(SPEC.num_layers)) * (len(calls) // SPEC.num_layers)
    return len(calls) // SPEC.num_layers


@pytest.mark.parametrize(("guidance", "calls"), [((1.0, 1.0), 6), ((4.0, 3.0), 12), ((4.0, 1.0), None)])
def test_scale_one_never_runs_the_negative_branch(experts, guidance, calls):
    """At scale 1 a step costs one transformer call, else two; each expert's own scale decides."""
    schedule = make_schedule("unipc", 6, 12.0)
    if calls is None:
        calls = 6 + sum(experts.name_at(float(t)) == "high" for t in schedule.timesteps)
        assert 6 < calls < 12
    assert counted_blocks(experts, schedule, BOTH, Guidance(*guidance)) == calls


def test_scale_one_needs_no_negative_prompt(experts):
    """Without guidance a run has no negative prompt; with it a missing one is an error before any model is made."""
    schedule = make_schedule("euler", 2, 3.0)
    denoise(experts, NOISE, schedule, Conditions(BOTH.positive), UNGUIDED, solver="euler")
    experts.got.clear()
    with pytest.raises(ValueError, match="needs a negative prompt"):
        denoise(experts, NOISE, schedule, Conditions(BOTH.positive), Guidance(1.0, 5.0))
    assert not experts.got


def velocity(experts, latents, sigma, condition):
    """The transformer's own answer, one call."""
    model = experts.get(experts.name_at(1000 * sigma), sigma)
    context = condition.context.expand(latents.shape[0], -1, -1)
    return model(ModelInputs(latents, torch.full((latents.shape[0],), 1000 * sigma), model.prepare_text(context)))


def test_one_step_is_guidance_and_the_solvers_step(experts):
    """uncond + scale * (cond - uncond), then Euler's step, from the transformer's own answers."""
    sigmas = torch.tensor([0.9, 0.4])
    result = denoise(experts, NOISE, schedule_from_sigmas(sigmas), BOTH, Guidance(4.0, 2.0), solver="euler")
    cond, uncond = (velocity(experts, NOISE, 0.9, branch[0]) for branch in (BOTH.positive, BOTH.negative))
    torch.testing.assert_close(result, NOISE - 0.5 * (uncond + 4.0 * (cond - uncond)), atol=1e-5, rtol=0)


def test_combined_prompts_are_averaged_by_strength(experts):
    """Two prompts of strength 1 and 3 at once: a quarter of one velocity and three quarters of the other."""
    first, second = prompt(3), prompt(4, strength=3.0)
    schedule = schedule_from_sigmas(torch.tensor([0.9, 0.4]))
    result = denoise(experts, NOISE, schedule, Conditions([first, second]), UNGUIDED, solver="euler")
    mean = velocity(experts, NOISE, 0.9, first) / 4 + velocity(experts, NOISE, 0.9, second) * 3 / 4
    torch.testing.assert_close(result, NOISE - 0.5 * mean, atol=1e-5, rtol=0)


def test_prompts_hold_in_their_sigma_range(experts):
    """A run whose prompt changes at sigma 0.5 equals a run of the first down to there and one of the second on."""
    early, late = prompt(3, end=0.6), prompt(4, start=0.55)
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.5, 0.2, 0.0])
    whole = denoise(experts, NOISE, schedule_from_sigmas(sigmas), Conditions([early, late]), UNGUIDED, solver="euler")
    half = denoise(experts, NOISE, schedule_from_sigmas(sigmas[:4]), Conditions([prompt(3)]), UNGUIDED, solver="euler")
    rest = denoise(experts, half, schedule_from_sigmas(sigmas[3:]), Conditions([prompt(4)]), UNGUIDED, solver="euler")
    torch.testing.assert_close(whole, rest, atol=1e-6, rtol=0)
    assert not torch.allclose(whole, denoise(experts, NOISE, schedule_from_sigmas(sigmas), Conditions([prompt(3)]),
                                             UNGUIDED, solver="euler"))


def test_a_gap_between_ranges_is_refused(experts):
    """A noise level that no prompt covers is an error that names it."""
    with pytest.raises(ValueError, match="no prompt is active at sigma 0.500"):
        denoise(experts, NOISE, schedule_from_sigmas(torch.tensor([1.0, 0.5, 0.0])), Conditions([prompt(3, end=0.6)]),
                UNGUIDED)


def test_on_step_is_told_what_happened(experts):
    """Index, total, sigma, expert, the sample, and the clean estimate sample - sigma * velocity, for every step."""
    seen = []
    schedule = make_schedule("euler", 4, 3.0)
    result = denoise(experts, NOISE, schedule, Conditions(BOTH.positive), UNGUIDED, solver="euler",
                     on_step=seen.append)
    assert [(step.index, step.total) for step in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [step.sigma for step in seen] == schedule.sigmas[:-1].tolist()
    assert [step.expert for step in seen] == [experts.name_at(float(t)) for t in schedule.timesteps]
    before = NOISE
    for step in seen:
        expected = before - step.sigma * velocity(experts, before, step.sigma, BOTH.positive[0])
        torch.testing.assert_close(step.clean, expected, atol=1e-5, rtol=0)
        before = step.latents
    assert torch.equal(seen[-1].latents, result)
    # From the last level down to zero, the estimate is the result.
    torch.testing.assert_close(seen[-1].clean, result, atol=1e-5, rtol=0)


class Interrupted(Exception):
    """Raised by the callables below."""


def test_on_block_can_stop_within_a_block(experts):
    """What on_block raises ends the run at once, in the middle of a step, in either branch."""
    for limit in (1, 2, SPEC.num_layers + 1, 3 * SPEC.num_layers):
        calls = []

        def stop(index, calls=calls, limit=limit):
            calls.append(index)
            if len(calls) == limit:
                raise Interrupted

        with pytest.raises(Interrupted):
            denoise(experts, NOISE, make_schedule("unipc", 4, 3.0), BOTH, Guidance(5.0, 5.0), on_block=stop)
        assert len(calls) == limit


def test_on_step_can_stop(experts):
    """What on_step raises ends the run after that step."""
    seen = []

    def stop(step):
        seen.append(step.index)
        if step.index == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        denoise(experts, NOISE, make_schedule("unipc", 4, 3.0), BOTH, Guidance(5.0, 5.0), on_step=stop)
    assert seen == [0, 1]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_same_noise_same_video(experts, solver):
    """Two runs from the same noise are equal bit for bit, whatever ran between; the noise is not written to."""
    schedule, kept = make_schedule(solver, 4, 5.0), NOISE.clone()
    first = denoise(experts, NOISE, schedule, BOTH, Guidance(4.0, 3.0), solver=solver)
    other = denoise(experts, randn(*NOISE.shape, seed=5), schedule, BOTH, Guidance(4.0, 3.0), solver=solver)
    assert torch.equal(denoise(experts, NOISE, schedule, BOTH, Guidance(4.0, 3.0), solver=solver), first)
    assert torch.equal(NOISE, kept) and first.dtype == torch.float32
    assert not torch.allclose(first, other)


def test_a_batch_shares_one_prompt(experts):
    """Two samples under one prompt: each equals its run alone."""
    noise = randn(2, 4, 2, 4, 4, seed=6)
    schedule = make_schedule("unipc", 3, 5.0)
    together = denoise(experts, noise, schedule, BOTH, Guidance(4.0, 3.0))
    for i in range(2):
        alone = denoise(experts, noise[i:i + 1], schedule, BOTH, Guidance(4.0, 3.0))
        torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=0)


def test_unknown_solver_is_refused(experts):
    """A wrong solver is an error that lists the known ones, before any model is made."""
    with pytest.raises(ValueError, match="'heun'; choose one of unipc, dpm\\+\\+, euler"):
        denoise(experts, NOISE, make_schedule("euler", 2, 3.0), BOTH, UNGUIDED, solver="heun")
    assert not experts.got


def test_unknown_attention_is_refused(experts):
    """A wrong attention backend is an error that lists the known ones."""
    with pytest.raises(ValueError, match="'saga'; choose one of sdpa"):
        denoise(experts, NOISE, make_schedule("euler", 2, 3.0), BOTH, UNGUIDED, backend="saga")
