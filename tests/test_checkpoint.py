"""Checkpoints: a run that was stopped, killed or lost goes on and makes the same bits, and no file breaks the next."""

import json
import logging
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.small_models import write_halves, write_transformer
from tests.tiny_runs import SPEC, tiny_model, tiny_run, write_tiny
from wan_core import Checkpoints, load_model, load_text_encoder, load_vae, open_lora
from wan_core.checkpoint import SavedRun
from wan_core.dit import BACKENDS
from wan_core.dit.attention.backend import Backend
from wan_core.memory import Layout, OneAtATime, Plan
from wan_core.models import VideoVAE, add_vace
from wan_core.pipeline import generate
from wan_core.sampling import Guidance, make_schedule
from wan_core.weights import save_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, "wan_core.checkpoint")


class Stop(Exception):
    """Raised from outside."""


def stopping(step):
    """An `on_step` that ends the run behind a step, counted from 0."""
    def on_step(told):
        if told.index == step:
            raise Stop
    return on_step


def stopped(model, places, after=1, **how):
    """A run that was stopped behind a step: its file."""
    with pytest.raises(Stop):
        tiny_run(model, checkpoints=places, on_step=stopping(after), **how)
    found = sorted(Path(places.folder).iterdir())
    assert len(found) == 1 and found[0].match("wan-????????????????.safetensors")
    return found[0]


def steps_of(model, **how):
    """The result of a run and the steps that were computed for it."""
    told = []
    return tiny_run(model, on_step=lambda step: told.append(step.index), **how), told


@pytest.mark.parametrize("kind", ["single", "pair", "lora"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "deis"])
def test_a_run_goes_on_where_it_was_stopped(folder, tmp_path, caplog, solver, kind):
    """Promise: stopped behind any step, across the experts' boundary and a LoRA's range too, the same run goes on with
    the next step and gives the same bits; its file is gone then."""
    model = tiny_model(folder, kind)
    how = {"steps": 4, "solver": solver, "masked": kind == "pair"}
    expected = tiny_run(model, **how)
    for after in range(4):
        stopped(model, Checkpoints(tmp_path), after, **how)
        result, told = steps_of(tiny_model(folder, kind), checkpoints=Checkpoints(tmp_path), **how)
        assert torch.equal(result, expected) and told == list(range(after + 1, 4))
        said = f"going on at step {after + 2} of 4" if after < 3 else "all steps are done"
        assert said in caplog.records[-1].getMessage()
        assert not list(tmp_path.iterdir())


def test_noise_of_the_steps_goes_on_too(folder, tmp_path):
    """Promise: a solver that adds noise at every step goes on with the same noise, never with another seed's run."""
    model, how = tiny_model(folder, "pair"), {"steps": 4, "solver": "lcm", "checkpoints": Checkpoints(tmp_path)}
    expected = {seed: tiny_run(model, step_seed=seed, **how) for seed in (1, 2)}
    assert not torch.equal(expected[1], expected[2])
    with pytest.raises(Stop):
        tiny_run(model, step_seed=1, on_step=stopping(1), **how)
    assert torch.equal(tiny_run(model, step_seed=2, **how), expected[2])
    result, told = steps_of(model, step_seed=1, **how)
    assert torch.equal(result, expected[1]) and told == [2, 3] and not list(tmp_path.iterdir())


def test_a_run_that_is_stopped_again_and_again(folder, tmp_path):
    """Promise: one step at a time, stopped in the middle of a block each time, the run comes to the same end."""
    model = tiny_model(folder, "pair")
    expected = tiny_run(model, steps=4)
    for _ in range(4):
        calls = []

        def on_block(index, calls=calls):
            calls.append(index)
            if len(calls) == 6:
                raise Stop

        try:
            result = tiny_run(model, steps=4, checkpoints=Checkpoints(tmp_path), on_block=on_block)
        except Stop:
            continue
    assert torch.equal(result, expected) and not list(tmp_path.iterdir())


def test_saved_at_intervals(folder, tmp_path):
    """Promise: with an interval of 3, what goes on is the run as it was behind step 3."""
    model = tiny_model(folder, "single")
    places = Checkpoints(tmp_path / "new" / "folder", every=3)
    stopped(model, places, after=4, steps=6)
    result, told = steps_of(model, steps=6, checkpoints=places)
    assert torch.equal(result, tiny_run(model, steps=6)) and told == [3, 4, 5]


def test_the_chunk_is_the_saved_runs_and_swapping_makes_no_difference(folder, tmp_path):
    """Promise: a run goes on in the chunks that it began with, whatever the plan is now, and wherever blocks live."""
    model, shape = tiny_model(folder, "single"), (1, 16, 3, 8, 8)
    begun = replace(model, plan=Plan(chunk=1))
    expected = tiny_run(begun, shape=shape)
    assert not torch.equal(expected, tiny_run(model, shape=shape))
    stopped(begun, Checkpoints(tmp_path), 0, shape=shape)
    result, told = steps_of(replace(model, plan=Plan(Layout(2))), shape=shape, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(result, expected) and told == [1, 2]


def test_the_attention_is_the_saved_runs(folder, tmp_path, monkeypatch):
    """Promise: a run that had to give up its attention goes on without it."""
    def broken(q, k, v, bias):
        return torch.full_like(q, torch.nan)

    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(broken))
    model = tiny_model(folder, "single", attention="sdpa-math")
    stopped(model, Checkpoints(tmp_path), 0)
    monkeypatch.setitem(BACKENDS, "sdpa-math", Backend(lambda *_: pytest.fail("it was used again")))
    result = tiny_run(model, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(result, tiny_run(tiny_model(folder, "single")))


OTHER_SETTINGS = {
    "noise": {"seed": 1}, "prompt": {"prompt": 4}, "steps": {"steps": 4}, "shift": {"shift": 4.0},
    "solver": {"solver": "dpm++"}, "guidance": {"guidance": Guidance(3.0, 2.5)}, "mask": {"masked": True},
    "size": {"shape": (1, 16, 3, 4, 4)},
}


@pytest.mark.parametrize("change", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_runs_of_other_settings_do_not_meet(folder, tmp_path, change):
    """Promise: with any setting changed, in the same folder, a run begins anew and leaves the other's file alone."""
    model = tiny_model(folder, "single")
    file = stopped(model, Checkpoints(tmp_path))
    before = file.read_bytes()
    result, told = steps_of(model, checkpoints=Checkpoints(tmp_path), **change)
    assert told == list(range(change.get("steps", 3))) and torch.equal(result, tiny_run(model, **change))
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and file.read_bytes() == before


def variants(folder, tmp_path):
    """Models that differ from the first in one thing each, by its name in the settings."""
    model = tiny_model(folder, "single")
    file = open_lora(folder / "lora.safetensors")
    yield "", model.with_lora(file, 0.5)
    yield "LoRA 1", model.with_lora(file, 0.6)
    yield "LoRA 1", model.with_lora(file, 0.5, end=0.2)
    yield "LoRA 1", model.with_lora(file, 0.5, blocks="0")
    yield "merged LoRA 1", model.with_lora(file, 0.5).merged()
    yield "attention", replace(model.with_lora(file, 0.5), attention="sdpa-math")
    yield "model precision", replace(model.with_lora(file, 0.5), dtype="bfloat16")
    yield "model formats", model.quantised("fp8_scaled").with_lora(file, 0.5)
    yield "model formats", model.quantised("fp8_e4m3").with_lora(file, 0.5)
    yield "model formats", model.quantised("fp8_scaled_rows").with_lora(file, 0.5)
    (tmp_path / "other").mkdir()
    write_transformer(tmp_path / "other" / "low.safetensors", 5, SPEC)
    write_transformer(tmp_path / "other" / "high.safetensors", 5, SPEC)
    yield "model files", tiny_model(tmp_path / "other", "single").with_lora(file, 0.5)


def test_runs_of_other_models_do_not_meet_and_are_told_apart(folder, tmp_path):
    """Promise: file, weight format, precision, attention and every number of a LoRA count; each makes a checkpoint of
    its own, and resuming with another is refused with what differs."""
    names, first = set(), None
    for index, (what, model) in enumerate(variants(folder, tmp_path)):
        file = stopped(model, Checkpoints(tmp_path / str(index)))
        names.add(file.name)
        assert len(names) == index + 1, what
        first = first or file
        if what:
            with pytest.raises(ValueError, match=rf"saved by a run of other settings\. .*{what}: .* there, .* here"):
                tiny_run(model, checkpoints=Checkpoints(tmp_path / str(index), resume=first))


def test_an_added_module_counts(folder, tmp_path):
    """Promise: of a model with a VACE module, the module's file is among those that count."""
    spec = replace(SPEC, model_type="vace", vace_layers=(0,), vace_in_dim=96)
    write_halves(tmp_path / "model.safetensors", tmp_path / "module.safetensors", spec)
    model = add_vace(tiny_model(folder, "single"), tmp_path / "module.safetensors")
    file = stopped(model, Checkpoints(tmp_path / "runs"))
    os.utime(tmp_path / "module.safetensors")
    changed = add_vace(tiny_model(folder, "single"), tmp_path / "module.safetensors")
    with pytest.raises(ValueError, match="settings. model files: low.safetensors .*, module.safetensors .* here. Give"):
        tiny_run(changed, checkpoints=Checkpoints(tmp_path / "runs", resume=file))


def test_resuming_a_file(folder, tmp_path):
    """Promise: a named file is gone on from wherever it lies, and is only read; the run is saved in its folder."""
    model = tiny_model(folder, "single")
    file = stopped(model, Checkpoints(tmp_path / "runs"))
    kept = file.replace(tmp_path / "kept.safetensors")
    before = kept.read_bytes()
    result, told = steps_of(model, checkpoints=Checkpoints(tmp_path / "runs", resume=kept))
    assert torch.equal(result, tiny_run(model)) and told == [2]
    assert kept.read_bytes() == before and not list((tmp_path / "runs").iterdir())


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    changed = {"empty": b"", "header": data[:header // 2], "data": data[:-100], "one byte": data[:8],
               "a bit": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "noise": random.Random(0).randbytes(5000),
               "zeros": bytes(len(data)), "longer": data + b"x" * 10,
               "a setting": data.replace(b"step", b"stop", 1), "a chunk": data.replace(b"null", b"1234")}
    if how == "foreign":
        save_weights(file, {"latents": torch.zeros(3)})
    else:
        assert changed[how] != data
        file.write_bytes(changed[how])


KINDS = ["empty", "header", "data", "one byte", "a bit", "noise", "zeros", "longer", "a setting", "a chunk", "foreign"]


@pytest.mark.parametrize("how", KINDS)
def test_damaged_files_are_passed_over(folder, tmp_path, caplog, how):
    """Promise: whatever a checkpoint has become, the run begins anew, says so once, and ends with the same bits."""
    model = tiny_model(folder, "single")
    file = stopped(model, Checkpoints(tmp_path))
    damage(file, how)
    with pytest.raises(ValueError, match="cannot be resumed: .*Start the run again"):
        tiny_run(model, checkpoints=Checkpoints(tmp_path, resume=file))
    caplog.clear()
    result, told = steps_of(model, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(result, tiny_run(model)) and told == [0, 1, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{file.name} cannot be resumed, and the run begins anew" in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_taken_away(folder, tmp_path):
    """Promise: unfinished files of the same run go at once, those of other runs after a day, other files never."""
    model = tiny_model(folder, "single")
    own = stopped(model, Checkpoints(tmp_path)).name
    left = {name: tmp_path / name for name in (f".{own}.0a1b.tmp", ".wan-1234.safetensors.ab.tmp",
                                               ".wan-5678.safetensors.ab.tmp", "notes.tmp")}
    for path in left.values():
        path.write_bytes(b"half")
    old = time.time() - 2 * 24 * 3600
    for name in (".wan-5678.safetensors.ab.tmp", "notes.tmp"):
        os.utime(left[name], (old, old))
    result, told = steps_of(model, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(result, tiny_run(model)) and told == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".wan-1234.safetensors.ab.tmp", "notes.tmp"]


def test_bad_places_are_refused_before_anything_is_loaded(folder, tmp_path):
    """Promise: an interval of none, a file that is not there, a folder that cannot be made: errors, at once."""
    with pytest.raises(ValueError, match="every 0 steps; expected 1 or more"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="there is no checkpoint .*absent"):
        Checkpoints(tmp_path, resume=tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    model = tiny_model(folder, "single")
    with pytest.raises(OSError):
        tiny_run(model, checkpoints=Checkpoints(tmp_path / "file"))
    assert model.placement._held is None


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits")
def test_a_full_disk_does_not_end_the_run(folder, tmp_path, caplog):
    """Promise: when the disk refuses a checkpoint the run goes on, with one warning; the last whole file stays usable
    until then, and no part of another remains."""
    import resource

    model = tiny_model(folder, "single")
    stopped(model, Checkpoints(tmp_path), 0)
    seen = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    caplog.clear()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        result = tiny_run(model, checkpoints=Checkpoints(tmp_path),
                          on_step=lambda step: seen.append(sorted(path.name for path in tmp_path.iterdir())))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(result, tiny_run(model))
    assert len(seen) == 2 and all(len(names) == 1 for names in seen)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "goes on without a new checkpoint: wan-" in warnings[0]
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True, eq=False)
class FailingVAE(VideoVAE):
    """A VAE for which there is no memory."""

    def decode(self, *_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")


SMALL = {"width": 32, "height": 16, "frames": 5, "steps": 3}


def test_a_run_is_kept_until_its_frames_are_decoded(files, tmp_path):
    """Promise: where decoding fails the steps are not lost: with another VAE setting the next run decodes at once."""
    placement = OneAtATime("cpu")
    parts = {"model": load_model(files.model, placement=placement),
             "text_encoder": load_text_encoder(files.text_encoder, placement=placement)}
    vae, told = load_vae(files.vae, placement=placement), []
    how = {**parts, **SMALL, "seed": 3, "checkpoints": Checkpoints(tmp_path),
           "on_step": lambda step: told.append(step.index)}
    with pytest.raises(torch.OutOfMemoryError):
        generate("a red circle", vae=FailingVAE(vae.part, placement), **how)
    frames = generate("a red circle", vae=vae, **how).frames
    assert told == [0, 1, 2] and not list(tmp_path.iterdir())
    assert torch.equal(frames, generate("a red circle", vae=vae, **{**how, "checkpoints": None}).frames)


def test_other_words_and_seeds_are_named(files, tmp_path):
    """Promise: resuming with another prompt or seed is refused, and the message has both of them in words."""
    placement = OneAtATime("cpu")
    how = {"model": load_model(files.model, placement=placement), "vae": load_vae(files.vae, placement=placement),
           "text_encoder": load_text_encoder(files.text_encoder, placement=placement), **SMALL}
    with pytest.raises(Stop):
        generate("a red circle", **how, seed=3, checkpoints=Checkpoints(tmp_path), on_step=stopping(0))
    file = next(tmp_path.iterdir())
    with pytest.raises(ValueError, match="prompt: a red circle there, a blue one here. seed: 3 there, 4 here."):
        generate("a blue one", **how, seed=4, checkpoints=Checkpoints(tmp_path, resume=file))


class Worker:
    """See `tests/checkpoint_worker.py`."""

    def __init__(self, models):
        self._process = subprocess.Popen([sys.executable, "-m", "tests.checkpoint_worker", models], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, folder, out, kill=None):
        self._process.stdin.write(json.dumps({"folder": str(folder), "out": str(out), "kill": kill}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(folder, tmp_path, count):
    """Promise: killed at any moment, without a chance to tidy up, the next run ends with the bytes of one that nobody
    disturbed, and leaves nothing behind."""
    worker, moments = Worker(folder), random.Random(count)
    undisturbed = [worker.run(tmp_path / "plain", tmp_path / "expected") for _ in range(3)]
    assert all(status == 0 for status, _ in undisturbed)
    seconds = min(took for _, took in undisturbed)
    expected = (tmp_path / "expected").read_bytes()
    killed = left = 0
    for index in range(count):
        place, out = tmp_path / str(index), tmp_path / f"{index}.out"
        # Each in its part of the time that a run takes, and now and then twice.
        for _ in range(1 + index % 2):
            status, _ = worker.run(place, out, (index + moments.random()) / count * seconds)
            assert status in (0, -9)
            killed += status == -9
        left += place.exists() and any(place.iterdir())
        status, _ = worker.run(place, out)
        assert status == 0 and not list(place.iterdir())
        assert out.read_bytes() == expected, f"run {index}"
    worker.close()
    assert killed >= count // 2, "most were killed before they were done"
    assert left >= count // 8, "and some of them when they had saved something"
    assert torch.frombuffer(bytearray(expected), dtype=torch.float32).isfinite().all() and len(expected) == 4 * 16 * 32


def test_the_digest_is_the_same_tomorrow(folder, tmp_path):
    """Promise: the name of a file depends on the settings alone: not on the process, objects or where blocks live."""
    model = tiny_model(folder, "pair")
    names = {stopped(other, Checkpoints(tmp_path / str(index))).name for index, other in enumerate(
        (model, tiny_model(folder, "pair"), replace(model, plan=Plan(Layout(1), chunk=4))))}
    assert len(names) == 1


def test_only_the_latest_stopped_runs_are_kept(tmp_path):
    """Promise: where a limit is set, the oldest files of other runs go, and nothing else in the folder."""
    for age in range(6):
        file = tmp_path / f"wan-{age:016}.safetensors"
        file.write_bytes(b"x")
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    schedule = make_schedule("unipc", 2, 3.0)
    SavedRun(Checkpoints(tmp_path), {"a": "b"}, schedule, "unipc")
    assert len(list(tmp_path.iterdir())) == 7
    SavedRun(Checkpoints(tmp_path, keep=2), {"a": "b"}, schedule, "unipc")
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.safetensors", *(f"wan-{age:016}.safetensors" for age in range(2))}
