"""Recovery within a step: memory that runs out anywhere, numbers that are not finite, and what is not caught."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_models import save_module
from tests.tiny_runs import SPEC, randn, tiny_denoise, tiny_model, tiny_run, write_tiny
from wan_core import load_experts, load_model
from wan_core.dit import BACKENDS, WanTransformer
from wan_core.dit.attention.backend import Backend
from wan_core.memory import Layout, OneAtATime, Plan
from wan_core.sampling import SOLVERS, NotFinite, make_schedule


class Faults(TorchDispatchMode):
    """An allocator that has no memory at the places `at`, counted from 0: where a tensor is made, and where one is
    written to, which has happened by then."""

    def __init__(self, *at):
        super().__init__()
        self.at, self.places = set(at), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(value.alias_info is None or value.alias_info.is_write for value in function._schema.returns):
            made = [value for value in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(value)]
            if made and not any(value.is_meta for value in made):
                self.place()
        return out

    def place(self):
        self.places += 1
        if self.places - 1 in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


class EachOnce(Faults):
    """No memory at every place of every step in turn, or at each `stride`th: each time a step is tried again it comes
    one place further."""

    def __init__(self, stride=1):
        super().__init__()
        self.next = self.failures = 0
        self._stride = stride

    def place(self):
        self.places += 1
        if self.places > self.next:
            self.next += self._stride
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory")

    def begin(self, step=None):
        self.places = 0
        if step:
            self.next = 0


class Patient:
    """Experts that try again as they are, however often."""

    def __init__(self, model, faults):
        self._model, self._faults = model, faults
        self.chunk, self.name_at, self.get, self.state, self.expect = (
            model.chunk, model.name_at, model.get, model.state, model.expect)

    def recover(self, error, shape):
        assert isinstance(error, torch.OutOfMemoryError)
        self._faults.begin()
        return self


class Kept:
    """Notes the samples that `on_step` is told, and whether anybody writes to them."""

    def __init__(self):
        self._seen = []

    def __call__(self, step):
        # A copy that the allocator above knows nothing of.
        self._seen.append((step.latents, step.latents.numpy().copy()))

    def check(self, steps):
        assert len(self._seen) == steps
        assert all((told.numpy() == copy).all() for told, copy in self._seen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_in_which_every_allocation_fails_once(folder, stride):
    """Promise: whatever a step had computed, and written in place, when memory ran out, repeating it gives the same
    bits; samples that were given out are never written to."""
    model = tiny_model(folder, "single")
    expected = tiny_denoise(model, masked=True)
    faults, kept = EachOnce(stride), Kept()

    def on_step(step):
        kept(step)
        faults.begin(step)

    result = tiny_denoise(Patient(model, faults), masked=True, on_step=on_step, within=faults)
    assert torch.equal(result, expected)
    assert faults.failures > 900 // stride, "some 350 places in each of the three steps"
    kept.check(3)


def fail_at(model, expected, *places, **how):
    """A run that fails there; returns how many places it came by. The result must be that of the plain run."""
    kept, faults = Kept(), Faults(*places)
    result = tiny_denoise(model, on_step=kept, within=faults, **how)
    assert torch.equal(result, expected), places
    kept.check(3)
    return faults.places


def sweep(model, every, **how):
    """Runs that fail at one place each, all `every`th in turn, loading the weights included."""
    expected = tiny_denoise(model, **how)
    model.placement.clear()
    total = fail_at(model, expected, **how)
    for place in range(every // 2, total, every):
        model.placement.clear()
        fail_at(model, expected, place, **how)
    assert torch.equal(tiny_denoise(model, **how), expected), "and nothing is left of it"
    return total


WAYS = [("single", "unipc", False), ("pair", "dpm++", False), ("lora", "unipc", True), ("pair", "unipc", False)]


@pytest.mark.parametrize(("kind", "solver", "masked"), WAYS)
def test_a_run_that_fails_once_goes_on_leaner(folder, caplog, kind, solver, masked):
    """Promise: out of memory anywhere, loading included: the plan gets leaner, the step is repeated, and the result is
    the plain run's bit for bit."""
    total = sweep(tiny_model(folder, kind), 263, solver=solver, masked=masked)
    assert total > 1000
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(range(131, total, 263))
    assert set(warnings) == {"Wan: out of memory; the step is repeated. 1 of 2 blocks are now swapped, through 2 "
                             "slots, 8 tokens at a time."}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "solver", "masked"), WAYS)
def test_every_place_where_a_run_can_fail(folder, kind, solver, masked):
    """Promise: the same for every single allocation of a run."""
    sweep(tiny_model(folder, kind), 1, solver=solver, masked=masked)


@pytest.mark.slow
@pytest.mark.parametrize("load", [load_model, load_experts])
def test_every_place_where_a_run_of_the_nano_models_can_fail(load):
    """Promise: the same for the bundled models."""
    sweep(load(placement=OneAtATime("cpu")), 1)


def test_several_failures_in_one_run(folder):
    """Promise: a run that fails as often as its plan can be made leaner, in one step or in several, is not lost."""
    model = tiny_model(folder, "pair")
    expected = tiny_denoise(model)
    for places in ((10, 400, 900), (200, 201, 202), (350, 700, 1050), (1100, 1101, 1450)):
        model.placement.clear()
        fail_at(model, expected, *places)


def test_where_nothing_is_left_to_save(folder):
    """Promise: the last error says what was tried and what would help, is still one of memory, and leaves nothing on
    the device; the model works afterwards."""
    model = replace(tiny_model(folder, "single"), plan=Plan(Layout(2, slots=1)))
    expected = tiny_denoise(model)
    with pytest.raises(torch.OutOfMemoryError, match="all 2 blocks of Nano T2V are swapped, and 8 of 8 tokens .* Make "
                                                     "fewer frames or a smaller size, use weights in FP8"):
        tiny_denoise(model, within=Faults(200))
    assert model.placement._held is None
    assert torch.equal(tiny_denoise(model), expected)


def test_smaller_chunks_are_as_if_chosen_before(folder):
    """Promise: a run that fails in its first step and goes on in smaller chunks equals one that was planned so bit for
    bit, and one without chunks within rounding."""
    shape = (1, 16, 3, 32, 32)
    model = tiny_model(folder, "single")
    planned = replace(model, plan=Plan(Layout(2), chunk=512))
    expected = tiny_denoise(planned, shape=shape)
    result = tiny_denoise(replace(model, plan=Plan(Layout(2))), shape=shape, within=Faults(300))
    assert torch.equal(result, expected)
    plain = tiny_denoise(model, shape=shape)
    assert (result - plain).abs().max() <= 1e-6 * plain.abs().max()


def test_the_result_is_fetched_once_more(folder):
    """Promise: a run is not lost when the host has no room for its result beside the weights."""
    model = tiny_model(folder, "single")
    expected = tiny_run(model)
    total = Faults()
    with total:
        tiny_run(model)
    for place in (total.places - 1, total.places - 2):
        with Faults(place) as faults:
            assert torch.equal(tiny_run(model), expected)
        assert faults.places > total.places


class Stop(Exception):
    """Raised from outside."""


@pytest.mark.parametrize("error", [Stop(), torch.OutOfMemoryError("a preview found no room"), KeyboardInterrupt()])
def test_what_on_step_raises_ends_the_run(folder, error):
    """Promise: errors of who is told, even of memory, are theirs: no step is repeated for them."""
    seen = []

    def on_step(step):
        seen.append(step.index)
        raise error

    with pytest.raises(type(error)) as raised:
        tiny_denoise(tiny_model(folder, "single"), on_step=on_step)
    assert raised.value is error and seen == [0]


def test_other_errors_end_the_run(folder):
    """Promise: an error that is not one of memory comes out as it is, at once."""
    model, error, calls = tiny_model(folder, "single"), Stop(), []

    def on_block(index):
        calls.append(index)
        raise error

    with pytest.raises(Stop) as raised:
        tiny_denoise(model, on_block=on_block)
    assert raised.value is error and calls == [0]


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_step_that_fails_leaves_the_solver_as_it_was(name):
    """Promise: wherever in a solver's step memory runs out, taking it again gives the same bits."""
    schedule = make_schedule(name, 4, 3.0)
    plain, failing = SOLVERS[name](schedule), SOLVERS[name](schedule)
    x = y = randn(2, 3)
    failures = 0
    for index in range(4):
        velocity = randn(2, 3, seed=index + 1)
        x = plain.step(velocity, index, x)
        for place in range(100):
            try:
                with Faults(place):
                    y = failing.step(velocity, index, y)
                break
            except torch.OutOfMemoryError:
                failures += 1
        assert torch.equal(x, y)
    assert failures > 4
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in failing.state_dict().items())


def faulty(at):
    """PyTorch's attention, with a NaN in the result of the calls `at`."""
    calls = []

    def attention(q, k, v, bias):
        calls.append(1)
        out = BACKENDS["sdpa"].run(q, k, v, bias)
        return out.index_fill(-1, torch.tensor([0]), torch.nan) if len(calls) - 1 in at else out

    return Backend(attention)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_attention_that_gives_nan_is_replaced(folder, monkeypatch, caplog, step):
    """Promise: the step is repeated with plain attention, which the rest of the run uses, and a warning names the other
    one: the video is the one that plain attention makes from there on."""
    # Four calls of attention for a guided branch of two blocks, eight for a step.
    monkeypatch.setitem(BACKENDS, "sdpa-math", faulty({8 * step + 3}))
    model = tiny_model(folder, "single")
    told = []
    result = tiny_denoise(model, backend="sdpa-math", on_step=told.append)
    assert torch.equal(result, tiny_denoise(model)) and [step.index for step in told] == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"Step {step + 1} of 3 gave NaN or infinite values with attention 'sdpa-math'; it is repeated, and the run "
        "goes on, with 'sdpa'."]


def test_numbers_that_stay_infinite_are_an_error_that_says_where(folder, tmp_path, monkeypatch):
    """Promise: with plain attention as well the run ends, naming step, noise level, expert, attention, file, precision
    and LoRAs."""
    torch.manual_seed(0)
    broken = WanTransformer(SPEC)
    with torch.no_grad():
        broken.head.head.bias[3] = torch.inf
    model = tiny_model(write_tiny(tmp_path), "pair", attention="sdpa-math")
    save_module(tmp_path / "low.safetensors", broken)
    model = replace(tiny_model(tmp_path, "pair", attention="sdpa-math"), high=model.high)
    lora = tiny_model(tmp_path, "lora").loras[0].file
    with pytest.raises(ValueError, match=r"step 2 of 3 \(sigma 0\.8568, expert 'low', attention 'sdpa'\) gave NaN or "
                                         r"infinite values, computed by low\.safetensors in float32\. Use another "
                                         r"precision or another attention, leave a LoRA away \(lora\.safetensors\)"):
        tiny_run(model.with_lora(lora))
    with pytest.raises(NotFinite):
        tiny_denoise(model)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Only warnings are looked at."""
    caplog.set_level(logging.WARNING)
