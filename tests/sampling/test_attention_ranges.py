"""Attention by noise level: which backend a step uses, where radial attention begins, what a NaN leaves of it."""

import pytest
import torch

from tests.tiny_runs import tiny_denoise, tiny_model, tiny_run, write_tiny
from wan_core.checkpoint import Checkpoints
from wan_core.dit import BACKENDS, Attention, AttentionRange, Radial
from wan_core.dit.attention.backend import Backend

RANGES = (AttentionRange("sage", 0.9, 0.5), AttentionRange("flex", 0.6, 0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("sigma", "expected"), [
    (1.0, "auto"), (0.91, "auto"), (0.9, "sage"), (0.55, "sage"), (0.5, "sage"), (0.49, "flex"), (0.2, "flex"),
    (0.1, "auto")])
def test_the_first_range_that_holds_counts(sigma, expected):
    """Both ends belong to a range; where none holds, the base backend does."""
    assert Attention("auto", RANGES).at(sigma) == Attention(expected)


@pytest.mark.parametrize(("sigma", "is_sparse"), [(1.0, False), (0.951, False), (0.95, True), (0.0, True)])
def test_radial_attention_begins_at_its_noise_level(sigma, is_sparse):
    """Above it attention is dense."""
    radial = Radial(start=0.95)
    assert Attention(radial=radial).at(sigma).radial == (radial if is_sparse else None)


@pytest.mark.parametrize(("arguments", "message"), [
    (("saga",), "unknown attention backend 'saga'"), (("sage", 0.2, 0.5), "from sigma 0.2 to 0.5; expected 1 >= start"),
    (("sage", 1.5, 0.5), "from sigma 1.5"), (("sage", 1.0, -0.1), "to -0.1"), (("sage", float("nan")), "sigma nan")])
def test_ranges_that_make_no_sense_are_refused(arguments, message):
    """A wrong name or range is an error when the option is made."""
    with pytest.raises(ValueError, match=message):
        AttentionRange(*arguments)


class Recorded:
    """PyTorch's attention under a backend's name: how often it was called, and NaN from it in the calls `at`."""

    def __init__(self, at=()):
        self.calls, self._at = 0, at

    def __call__(self, q, k, v, bias):
        self.calls += 1
        out = BACKENDS["sdpa"].run(q, k, v, bias)
        return torch.full_like(out, torch.nan) if self.calls - 1 in self._at else out


def test_a_step_uses_the_backend_of_its_noise_level(folder, monkeypatch):
    """Of three steps, at 1, 0.86 and 0.6, one calls the range's backend: twice for each block and branch."""
    recorded = Recorded()
    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(recorded))
    model = tiny_model(folder, "single")
    result = tiny_denoise(model, ranges=(AttentionRange("sdpa-math", 0.9, 0.7),))
    assert recorded.calls == 8 and torch.equal(result, tiny_denoise(model))


@pytest.mark.parametrize("at", [0, 11])
def test_after_a_nan_ranges_count_no_more(folder, monkeypatch, caplog, at):
    """The step is repeated with plain attention, the rest of the run uses nothing else, and a warning names the range's
    backend."""
    recorded = Recorded({at})
    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(recorded))
    model = tiny_model(folder, "single")
    result = tiny_denoise(model, ranges=(AttentionRange("sdpa-math", 0.9),))
    assert torch.equal(result, tiny_denoise(model)) and recorded.calls == 8 * (at // 8 + 1)
    assert "with attention 'sdpa-math'; it is repeated" in caplog.text


def test_after_a_nan_attention_is_dense(folder, monkeypatch, caplog):
    """So does radial attention, whose NaN is told from that of its backend."""
    recorded = Recorded({0})
    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(recorded))
    model = tiny_model(folder, "single")
    result = tiny_denoise(model, backend="sdpa-math", radial=Radial(start=1.0))
    assert torch.equal(result, tiny_denoise(model)) and recorded.calls == 8
    assert "with attention 'sdpa-math', radial; it is repeated" in caplog.text


class Stopped(Exception):
    pass


def test_a_resumed_run_has_given_up_its_ranges(folder, tmp_path, monkeypatch):
    """A run that gave up its ranges and was stopped goes on without them."""
    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(Recorded({0})))
    model = tiny_model(folder, "single", attention_ranges=(AttentionRange("sdpa-math", 0.9),))

    def stop(step):
        if step.index == 1:
            raise Stopped

    with pytest.raises(Stopped):
        tiny_run(model, checkpoints=Checkpoints(tmp_path), on_step=stop)
    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(lambda *_: pytest.fail("it was used again")))
    result = tiny_run(model, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(result, tiny_run(tiny_model(folder, "single")))


def test_runs_with_other_attention_do_not_meet(folder, tmp_path):
    """A checkpoint belongs to its ranges and to its radial attention."""
    models = [tiny_model(folder, "single", **options) for options in (
        {}, {"attention_ranges": RANGES}, {"attention_ranges": RANGES[:1]}, {"radial": Radial()},
        {"radial": Radial(0.7)})]
    for model in models:
        def stop(step):
            raise Stopped

        with pytest.raises(Stopped):
            tiny_run(model, steps=2, checkpoints=Checkpoints(tmp_path), on_step=stop)
    assert len(list(tmp_path.iterdir())) == len(models)
