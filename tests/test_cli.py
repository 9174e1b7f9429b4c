"""The shell: a video from one line, what a file is, and one clear line with status 2 for whatever the user can mend."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.small_models import save_module, write_hollow
from tests.weights.lora.lora_files import low_rank, low_rank_file, write
from wan_core import Checkpoints, generate, load_model, load_text_encoder, load_vae, nano
from wan_core.__main__ import main
from wan_core.dit import BACKENDS
from wan_core.memory import OneAtATime
from wan_core.presets import TEXT_ENCODERS, TRANSFORMERS, VAES, TransformerSpec
from wan_core.text import UMT5Encoder
from wan_core.training.score import score
from wan_core.vae import WanVAE
from wan_core.video import read_metadata, read_video, write_video
from wan_core.weights import TARGETS, expected_shapes

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--size", "32x16", "--frames", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def shell(files, tmp_path, capsys):
    """Runs `generate` with random-weight models in this process; gives status, standard output and error lines."""
    def run(*arguments, prompt="a red circle", **models):
        models = {"model": files.model, "vae": files.vae, "text_encoder": files.text_encoder, **models}
        chosen = [text for name, path in models.items() if path is not None
                  for text in (f"--{name.replace('_', '-')}", str(path))]
        status = main(["generate", prompt, "--out", str(tmp_path / "clip.mp4"), *chosen, *QUICK, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return run


def test_one_line_makes_the_video_that_was_asked_for(tmp_path):
    """`python -m wan_core generate PROMPT --out FILE` with the bundled models: an MP4 with the prompt's object."""
    done = subprocess.run([sys.executable, "-m", "wan_core", "generate", "a red circle moving left", "--out",
                           tmp_path / "clip.mp4"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"clip\.mp4: 17 frames of 64x64 at 8 fps, Nano T2V, [\d.]+ s\n$", done.stdout)
    assert "20/20" in done.stderr and "Traceback" not in done.stderr
    frames = read_video(tmp_path / "clip.mp4")
    assert frames.shape == (17, 64, 64, 3)
    shown = score(frames.permute(3, 0, 1, 2) / 127.5 - 1)
    assert (shown.shape, shown.colour, shown.direction) == ("circle", "red", "left")
    settings = read_metadata(tmp_path / "clip.mp4")["comment"]
    assert settings["prompt"] == "a red circle moving left" and settings["model"] == "nano_t2v"
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_bundled_experts_make_the_video_that_was_asked_for(tmp_path, capsys):
    """--high nano --low nano: the pair takes turns and shows the prompt's object."""
    out = tmp_path / "clip.mp4"
    assert main(["generate", "a blue square moving down", "--high", "nano", "--low", "nano", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "Nano T2V, expert pair" in captured.out
    assert "high-noise expert" in captured.err and "low-noise expert" in captured.err
    shown = score(read_video(out).permute(3, 0, 1, 2) / 127.5 - 1)
    assert (shown.colour, shown.direction) == ("blue", "down")
    assert read_metadata(out)["comment"]["model"] == "nano_t2v_a"


def test_every_option_reaches_the_run(shell, tmp_path):
    """What is given on the command line stands in the file; files, expert pair and tiles included."""
    status, out, _ = shell("--seed", "5", "--solver", "dpm++", "--shift", "4", "--guidance", "2.5", "--fps", "12.5",
                           "--negative", "blurry", "--dtype", "float32", "--attention", "sdpa-math", "--tile", "40")
    assert status == 0 and "5 frames of 32x16 at 12.5 fps, Nano T2V" in out
    settings = read_metadata(tmp_path / "clip.mp4")["comment"]
    settings.pop("seconds")
    assert settings == {
        "prompt": "a red circle", "negative_prompt": "blurry", "width": 32, "height": 16, "frames": 5, "steps": 2,
        "seed": 5, "solver": "dpm++", "shift": 4.0, "guidance": [2.5, 2.5], "fps": 12.5, "model": "nano_t2v",
        "files": ["model.safetensors"], "loras": []}
    assert read_video(tmp_path / "clip.mp4").shape == (5, 16, 32, 3)


def test_a_named_schedule_reaches_the_run(shell, tmp_path):
    """Its solver and guidance stand in the file beside its name; steps that it does not have are one line."""
    status, _, _ = shell("--schedule", "lightning")
    settings = read_metadata(tmp_path / "clip.mp4")["comment"]
    assert status == 0 and {name: settings[name] for name in ("schedule", "steps", "solver", "shift", "guidance")} == {
        "schedule": "lightning", "steps": 2, "solver": "euler", "shift": 5.0, "guidance": [1.0, 1.0]}
    status, _, error = shell("--schedule", "fastwan")
    assert status == 2 and error[-1] == "error: 'fastwan' is made for 3 steps, and 2 were asked for"


def test_options_of_guidance_reach_the_run(shell, tmp_path):
    """What refines guidance stands in the file; what cannot be read is one line that names its option."""
    status, _, _ = shell("--guidance-range", "0.999,0.5", "--guidance-steps", "4*2,1", "--cfg-zero-star", "1", "--apg",
                         "--nag", "5,3", "--skip-blocks", "1-2@0.9,0.1")
    assert status == 0
    assert read_metadata(tmp_path / "clip.mp4")["comment"]["guidance options"] == {
        "sigmas": {"start": 0.999, "end": 0.5}, "scales": [4.0, 4.0, 1.0], "zero_star": True, "zero_steps": 1,
        "projection": {"eta": 0.0, "momentum": -0.75, "threshold": 0.038, "per_element": True},
        "skipped": {"blocks": [1, 2], "scale": 0.0, "sigmas": {"start": 0.9, "end": 0.1}},
        "nag": {"scale": 5.0, "tau": 3.0, "alpha": 0.25}}
    for option, value in (("--guidance-range", "1"), ("--nag", "1,2,3,4"), ("--nag", "much"), ("--skip-blocks", "2@1")):
        status, _, errors = shell(option, value)
        assert status == 2 and errors[-1].startswith(f"error: {option} is given")
    assert shell("--skip-blocks", "6")[2][-1].startswith("error: block 6 is to be skipped, and the model has blocks 0")


def test_expert_pair_from_files(shell, files, tmp_path):
    """--high and --low take two files and two guidance scales."""
    status, out, errors = shell("--guidance", "4,3", model=None, high=files.high, low=files.low)
    assert status == 0 and "Nano T2V, expert pair" in out
    settings = read_metadata(tmp_path / "clip.mp4")["comment"]
    assert settings["model"] == "nano_t2v_a" and settings["guidance"] == [4.0, 3.0]


@pytest.fixture
def lora(tmp_path) -> Path:
    """A random LoRA for the nano models, in a folder of its own and with an equals sign in its name."""
    (tmp_path / "loras").mkdir()
    torch.manual_seed(5)
    modules = {name.removesuffix(".weight"): shape for name, shape in expected_shapes(TRANSFORMERS["nano_t2v"]).items()
               if "self_attn" in name and name.endswith(".weight") and len(shape) == 2}
    return low_rank_file(tmp_path / "loras" / "style=2.safetensors", modules)


def test_loras(shell, lora, tmp_path, caplog):
    """--lora takes a file, whose name may hold an equals sign, with a strength or without, any number of times; what it
    matched is said; strength 0 is the video without it."""
    caplog.set_level("INFO")
    frames = {}
    for options in ("", f"{lora}", f"{lora}=1", f"{lora}=0", f"{lora}=0.5 {lora}=-1e-1"):
        status, _, _ = shell(*(word for option in options.split() for word in ("--lora", option)))
        assert status == 0
        frames[options] = read_video(tmp_path / "clip.mp4")
    assert "LoRA style=2.safetensors: 24 of 24 adapters matched, strength -0.1" in caplog.text
    plain, whole = frames[""], frames[f"{lora}"]
    assert torch.equal(frames[f"{lora}=1"], whole) and torch.equal(frames[f"{lora}=0"], plain)
    assert not torch.equal(plain, whole)


def test_loras_of_a_pair(shell, files, lora, caplog):
    """A second strength is that of the low-noise expert; --weights quantises the model that the LoRA is put on."""
    caplog.set_level("INFO")
    status, _, _ = shell("--lora", f"{lora}=1,0.25", "--weights", "fp8_scaled", model=None, high=files.high,
                         low=files.low)
    assert status == 0
    assert ("high noise 24 of 24 adapters matched, strength 1; low noise 24 of 24 adapters matched, strength 0.25"
            in caplog.text)


@pytest.mark.parametrize(("strength", "message"), [
    ("=1,0.5", "a strength of its own for low noise, and Nano T2V is a single model. Give one strength."),
    ("=", "style=2.safetensors= does not exist"), ("=strong", "style=2.safetensors=strong does not exist"),
])
def test_lora_strengths_that_cannot_be_are_one_line(shell, lora, strength, message):
    """Two strengths on a single model, or a tail that is no number and therefore part of the name: one line."""
    status, out, errors = shell("--lora", f"{lora}{strength}")
    assert status == 2 and not out and len(errors) == 1 and message in errors[0]


def test_loras_that_do_not_fit_are_one_line(shell, files, lora, tmp_path):
    """A LoRA of another width, one for a pair on a single model, a file that is none: one line that says so."""
    wide = low_rank_file(lora.with_name("wide.safetensors"), {"blocks.0.ffn.2": (256, 64)})
    both = write(lora.with_name("both.safetensors"), {
        f"{prefix}.blocks.0.self_attn.q.lora_{kind}.weight": factor for prefix in ("transformer", "transformer_2")
        for kind, factor in zip("AB", low_rank((128, 128)), strict=True)})
    for path, message in ((wide, "wide.safetensors has no adapter that fits this model: it seems to be made for"),
                          (both, "both.safetensors holds adapters for a high- and a low-noise expert"),
                          (files.model, "model.safetensors holds no LoRA"),
                          ("absent.pt=2", "absent.pt does not exist")):
        status, out, errors = shell("--lora", str(path))
        assert status == 2 and not out and len(errors) == 1 and message in errors[0]


def test_tokenizer_file(shell, tmp_path):
    """--tokenizer takes the place of the one in the text encoder's file; another kind of file is an error."""
    (tmp_path / "spiece.model").write_text("no tokenizer")
    status, out, errors = shell("--tokenizer", str(tmp_path / "spiece.model"))
    assert status == 2 and not out and len(errors) == 1 and "not a readable SentencePiece model" in errors[0]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--size", "100x64"], "width is 100 pixels; it must be a multiple of 16. Use 96."),
    (["--size", "64x72"], "height is 72 pixels; it must be a multiple of 16. Use 64."),
    (["--size", "0x64"], "width is 0 pixels"),
    (["--frames", "16"], "frames is 16; it must be 4n + 1. Use 17."),
    (["--frames", "-1"], "frames is -1"),
    (["--steps", "0"], "steps must be a whole number from 1 to 1000000, got 0"),
    (["--seed", "18446744073709551616"], "the seed is 18446744073709551616; it must be a whole number from -92233"),
    (["--seed=-9223372036854775809"], "the seed is -9223372036854775809; it must be a whole number from -92233"),
    (["--shift", "0"], "shift must be a number greater than 0"),
    (["--guidance", "-2"], "guidance scale"),
    (["--fps", "0"], "fps is 0.0"),
    (["--dtype", "fp8"], "unknown precision 'fp8'"),
    (["--device", "toaster"], "device 'toaster' cannot be used"),
    (["--tile", "0"], "VAE tile height is 0 pixels"),
    (["--tile", "100"], "VAE tile height is 100 pixels; it must be a positive multiple of 8. Use 96."),
    (["--preset", "wan21_t2v_14b"], "model.safetensors is no single model of preset wan21_t2v_14b; it fits nano_t2v"),
    (["--out", "clip.gif"], "clip.gif ends in '.gif'; videos are written as .mp4"),
    (["--out", "absent/clip.mp4"], "the folder absent does not exist"),
    (["--tokenizer", "absent.model"], "cannot read tokenizer absent.model"),
])
def test_bad_options_are_one_line(shell, tmp_path, monkeypatch, arguments, message):
    """A setting that cannot work ends with status 2 and one line that says what to do; no file is made."""
    monkeypatch.chdir(tmp_path)
    status, out, errors = shell(*arguments)
    assert status == 2 and not out
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "message"), [
    ("--image clip", "Nano T2V takes no start image; models of type i2v, flf2v, ti2v do"),
    ("--end-image clip", "Nano T2V takes no end image"),
    ("--control clip", "Nano T2V takes no control video; models of type vace do"),
    ("--reference clip", "Nano T2V takes no reference image"),
    ("--mask clip", "Nano T2V takes no control mask"),
    ("--model nano-i2v --image clip --end-image clip", "5 start and 5 end frames do not fit into a clip of 5 frames"),
    ("--model nano-i2v --control clip", "Nano I2V takes no control video"),
    ("--model nano-i2v --vace nano", "is made for a text-to-video transformer of width 128, and this is one of type"),
    ("--vace nano --mask clip", "a control mask was given without the control video"),
    ("--vace nano --image clip", "Nano T2V with VACE takes no start image"),
    ("--vace nano --reference clip --reference other", "reference pictures must have one size, got 32x16, 48x32"),
    ("--vace nano --vace-low nano", "a second VACE module was given, and Nano T2V is a single model"),
    ("--vace-low nano", "the high-noise expert's, --vace, is missing"),
    ("--clip-vision nano", "Nano T2V takes no CLIP vision features. Leave it away"),
    ("--denoise 0.5", "there is no video to keep a part of"),
    ("--video short --denoise 0.5", "the video to start from has 1 frames, and 5 are to be made"),
    ("--video clip --denoise 0", "denoise must be greater than 0 and at most 1"),
    ("--image absent.png", "absent.png"),
    ("--image words", "words"),
])
def test_pictures_that_do_not_suit_are_one_line(shell, tmp_path, monkeypatch, line, message):
    """A picture, control or CLIP model that the model does not take, no room, no file: one line, and no video."""
    monkeypatch.chdir(tmp_path)
    for name, shape in (("clip", (5, 16, 32)), ("other", (1, 32, 48)), ("short", (1, 16, 32))):
        write_video(tmp_path / f"{name}.mp4", torch.zeros(*shape, 3, dtype=torch.uint8), 8)
        (tmp_path / f"{name}.mp4").rename(tmp_path / name)
    (tmp_path / "words").write_text("this is no picture")
    nano_model = {"model": None} if "--model" in line else {}
    status, out, errors = shell(*line.split(), "--vae", "nano", "--text-encoder", "nano", vae=None, text_encoder=None,
                                **nano_model)
    assert status == 2 and not out
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt_is_one_line(shell, prompt):
    """So does a prompt without a word."""
    status, out, errors = shell(prompt=prompt)
    assert (status, out, errors) == (2, "", ["error: the prompt is empty; say what the video should show."])


def test_a_missing_expert_is_one_line(shell, files):
    """One expert without the other, or a pair beside a single model, is an error that says which file is missing."""
    for models, message in (({"model": None, "high": files.high}, "--low is missing"),
                            ({"model": None, "low": files.low}, "--high is missing"),
                            ({"high": files.high, "low": files.low}, "give one or the other"),
                            ({"model": None, "high": files.high, "low": "absent.safetensors"}, "does not exist")):
        status, out, errors = shell(**models)
        assert status == 2 and not out and len(errors) == 1 and message in errors[0]


def bad_file(kind, files, folder) -> Path:
    """A file that is not what it is taken for."""
    path = folder / f"{kind}.safetensors"
    contents = {"missing": None, "empty": b"", "web_page": b"<!DOCTYPE html><html></html>", "gguf": b"GGUF" + bytes(99),
                "noise": bytes(range(1, 256)), "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                "truncated": files.model.read_bytes()[:100_000], "cut_header": files.model.read_bytes()[:300]}
    if contents[kind] is not None:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("role", ["model", "vae", "text_encoder"])
@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "does not exist"), ("empty", "is empty"), ("web_page", "is a web page"), ("gguf", "is a GGUF file"),
    ("noise", "is neither a safetensors, GGUF nor PyTorch file"), ("pointer", "is a Git LFS pointer"),
    ("truncated", "is truncated: its header promises"), ("cut_header", "is truncated: its header alone takes"),
])
def test_truncated_and_foreign_files_are_one_line(shell, files, tmp_path, kind, message, role):
    """Whatever part it is given for, the line names the file and what is wrong with it."""
    status, out, errors = shell(**{role: bad_file(kind, files, tmp_path)})
    assert status == 2 and not out
    assert len(errors) == 1 and errors[0].startswith(f"error: {kind}.safetensors ") and message in errors[0]


def test_parts_of_another_model_are_one_line(shell, files, tmp_path):
    """A file of the wrong kind, and a VAE or text encoder of the right kind that is not the model's."""
    torch.manual_seed(0)
    vae = save_module(tmp_path / "other_vae.safetensors", WanVAE(replace(VAES["nano_vae"], dim=8, decoder_dim=8)))
    text = save_module(tmp_path / "other_text.safetensors", UMT5Encoder(replace(TEXT_ENCODERS["nano_umt5"], dim=64)),
                       spiece_model=torch.frombuffer(bytearray(spiece_of(files)), dtype=torch.uint8))
    unknown = write_hollow(tmp_path / "unknown.safetensors", expected_shapes(
        TransformerSpec(model_type="t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=1)))
    for models, message in (
            ({"vae": files.model}, "model.safetensors seems to be Nano T2V"),
            ({"vae": vae}, "other_vae.safetensors (wan21) is not the VAE that Nano T2V was trained with"),
            ({"text_encoder": files.vae}, "vae.safetensors seems to be a Wan VAE"),
            ({"text_encoder": text}, "other_text.safetensors gives embeddings of width 64; Nano T2V takes 96"),
            ({"model": files.text_encoder}, "text_encoder.safetensors seems to be a T5-type text encoder"),
            ({"model": unknown}, "unknown.safetensors fits no released model"),
            ({"model": None, "high": unknown, "low": files.low}, "the experts are of different architectures")):
        status, out, errors = shell(**models)
        assert status == 2 and not out and len(errors) == 1 and message in errors[0], errors


def spiece_of(files) -> bytes:
    from wan_core.models import load_text_encoder
    return load_text_encoder(files.text_encoder).tokenizer.to_bytes()


def test_attention_by_noise_level_reaches_the_run(shell, tmp_path, caplog):
    """--attention is the base without a range, and repeated with ranges; --radial stands in the file."""
    status, _, _ = shell("--attention", "sdpa-math", "--attention", "sage3=1..0.9", "--radial", "0.25,0.99,2")
    assert status == 0 and "Attention 'sage3' cannot run here, and sdpa takes its place" in caplog.text
    assert read_metadata(tmp_path / "clip.mp4")["comment"]["radial attention"] == {
        "decay": 0.25, "start": 0.99, "dense_blocks": 2}


def test_the_backends_of_a_device_are_listed(capsys):
    """`attention` says of every backend whether it runs, and of others why they do not."""
    assert main(["attention", "--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BACKENDS)
    assert lines[0].split() == ["sdpa", "yes"]
    assert "no: it needs an NVIDIA card, and the device is cpu" in lines[list(BACKENDS).index("flash3")]


@pytest.mark.parametrize("line", [
    "", "generate", "generate x --size 64", "generate x --guidance high", "generate x --guidance 1,2,3",
    "generate x --attention sage=0.2..0.5", "generate x --attention sage=high",
    "generate x --solver heun", "generate x --steps two", "generate x --preset wan3", "generate x --attention saga",
    "generate x --lora x=1,2,3", "generate x --lora x=nan", "generate x --weights q9_0", "inspect", "paint x",
])
def test_misspelt_commands_end_with_status_2(line, capsys):
    """What the parser refuses has the same status, and its last line says what is wrong."""
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


LIMITED = """
import resource, sys
from wan_core.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits")
def test_a_full_disk_is_one_line_and_leaves_nothing(files, tmp_path):
    """When the disk refuses the video's bytes: status 2, a line that names the file, and no part of it."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "generate", "a red circle", "--out", tmp_path / "clip.mp4", "--model",
         files.model, "--vae", files.vae, "--text-encoder", files.text_encoder, "--size", "64x64", "--frames", "5",
         "--steps", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: could not write") and "clip.mp4" in last and "disk full" in last
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_control_c_stops_at_once_and_leaves_nothing(files, tmp_path):
    """Interrupted in the middle of a run: status 130, one word, no traceback, no file."""
    command = [sys.executable, "-m", "wan_core", "generate", "a red circle", "--out", tmp_path / "clip.mp4", "--model",
               files.model, "--vae", files.vae, "--text-encoder", files.text_encoder, "--steps", "5000"]
    # A shell that started the tests in the background has made them deaf to the signal, and children inherit that.
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        seen = b""
        while b"/5000" not in seen and (part := process.stderr.read1(1000)):
            seen += part
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
    assert process.returncode == 130, seen + rest
    assert rest.endswith(b"stopped\n") and b"Traceback" not in seen + rest and not out
    assert not list(tmp_path.iterdir())


class Stop(Exception):
    """Raised from outside."""


@pytest.fixture
def checkpoint(files, tmp_path):
    """A run with the settings of `shell` that was stopped behind the first of its two steps."""
    def on_step(step):
        raise Stop

    placement = OneAtATime("cpu")
    with pytest.raises(Stop):
        generate("a red circle", width=32, height=16, frames=5, steps=2, model=load_model(
            files.model, placement=placement), vae=load_vae(files.vae, placement=placement),
            text_encoder=load_text_encoder(files.text_encoder, placement=placement),
            checkpoints=Checkpoints(tmp_path / "runs"), on_step=on_step)
    return next((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("how", ["folder", "file"])
def test_a_run_goes_on(shell, checkpoint, tmp_path, caplog, how):
    """--checkpoint-dir goes on with what an equal run has saved there, --resume with a file; the bar begins there, the
    video is the undisturbed one, and the file is gone."""
    assert shell()[0] == 0
    expected = read_video(tmp_path / "clip.mp4")
    caplog.set_level("INFO")
    where = ["--resume", str(checkpoint)]
    if how == "folder":
        where = ["--checkpoint-dir", str(checkpoint.parent), "--checkpoint-every", "2"]
    status, _, errors = shell(*where)
    assert status == 0 and f"{checkpoint.name}: going on at step 2 of 2" in caplog.text
    assert "| 2/2 " in "".join(errors) and "| 0/2 " not in "".join(errors)
    assert torch.equal(read_video(tmp_path / "clip.mp4"), expected) and not list(checkpoint.parent.iterdir())


def test_checkpoints_that_cannot_be_used(shell, checkpoint, tmp_path):
    """Another seed than the saved run's, a file that is not there, an interval without a folder or of no steps: one
    line that says what is wrong, and status 2."""
    for options, message in (
            (["--resume", str(checkpoint), "--seed", "3"], "of other settings. seed: 0 there, 3 here."),
            (["--resume", str(tmp_path / "absent.safetensors")], "there is no checkpoint "),
            (["--checkpoint-every", "2"], "--checkpoint-dir, which says where, is missing"),
            (["--checkpoint-dir", str(tmp_path), "--checkpoint-every", "0"], "every 0 steps; expected 1 or more")):
        status, _, errors = shell(*options)
        assert status == 2 and errors[-1].startswith("error: ") and message in errors[-1]
    assert checkpoint.exists()


@pytest.mark.parametrize(("path", "preset"), [
    (nano.VAE, "nano_vae"), (nano.TEXT_ENCODER, "nano_umt5"), (nano.T2V, "nano_t2v"), (nano.T2V_HIGH, "nano_t2v_a"),
    (nano.T2V_LOW, "nano_t2v_a"), (nano.I2V, "nano_i2v"), (nano.CLIP_VISION, "nano_clip"),
    (nano.VAE22, "nano_vae22"), (nano.TI2V, "nano_ti2v"),
], ids=lambda value: getattr(value, "stem", value))
def test_inspect_knows_the_bundled_files(path, preset, capsys):
    """Every file of the nano family is recognised and complete."""
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path.name}: ") and preset in out
    assert "every tensor is there and has the right shape" in out
    assert "missing" not in out and "unexpected" not in out


def test_inspect_says_what_is_missing(files, tmp_path, capsys):
    """An incomplete file is described, not refused: preset, prefix, types, and which tensors it lacks."""
    shapes = expected_shapes(TransformerSpec(model_type="t2v", dim=128, ffn_dim=384, num_heads=1, num_layers=6,
                                             text_dim=96))
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()
              if name != "blocks.3.self_attn.q.bias"}
    assert main(["inspect", str(write_hollow(tmp_path / "part.safetensors", shapes))]) == 0
    out = capsys.readouterr().out
    for text in ("nano_t2v", "prefix 'model.diffusion_model.'", "bfloat16", "missing     1: blocks.3.self_attn.q.bias"):
        assert text in out
    assert "every tensor is there" not in out
    assert main(["inspect", str(files.text_encoder)]) == 0
    assert "tokenizer   inside" in capsys.readouterr().out


def test_inspect_says_what_memory_is_needed(tmp_path, capsys):
    """Formats stand by the kind of layer, and what the weights take on a GPU by the choices that there are: quantised
    on load for a file in full precision, nothing but as stored for one that is quantised."""
    assert main(["inspect", str(nano.T2V)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n    self_attn +48 bfloat16\n", out) and re.search(r"\n    as stored +3\.18 MB\n", out)
    rows = re.findall(r"\n    (\w+) +([\d.]+) (MB|kB)", out.partition("memory")[2])
    sizes = {choice: float(size) / (1 if unit == "MB" else 1000) for choice, size, unit in rows}
    assert set(TARGETS) <= set(sizes) and 0.9 < sizes["q4_0"] < 1.4 < sizes["fp8_scaled"] < sizes["q8_0"] < 2
    assert sizes["q2_k"] < sizes["q3_k"] < sizes["q4_k"] < sizes["q5_k"] < sizes["q6_k"] < sizes["int8"]
    assert main(["quantize", str(nano.T2V), str(tmp_path / "small.gguf"), "--format", "q4_0"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "small.gguf")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n    self_attn +24 float32, 24 Q4_0\n", out) or re.search(
        r"\n    self_attn +24 Q4_0, 24 float32\n", out)
    assert re.search(r"memory of the weights on a GPU\n    as stored +1\.\d\d MB\n", out)
    peaks = re.search(r"memory of a run on a GPU: Nano T2V, 64x64, 17 frames\n    all blocks stay +([\d.]+) MB\n"
                      r"    every block swapped +([\d.]+) MB\n$", out)
    assert 1 < float(peaks[2]) < float(peaks[1]) < 3


def test_inspect_describes_a_lora(lora, capsys):
    """For a LoRA: kinds of adapters, ranks, layers, and the model that it seems to be made for."""
    assert main(["inspect", str(lora)]) == 0
    out = capsys.readouterr().out
    for text in ("adapters    24 LoRA", "ranks       3 (24)", "layers      24 self_attn", "with 6 blocks: nano_t2v",
                 "of width 128"):
        assert text in out


def test_inspect_describes_another_models_file(tmp_path, capsys):
    """A file of weights that are not Wan's is described as such, with status 0: that is the answer."""
    path = write_hollow(tmp_path / "sd.safetensors", {"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3)})
    assert main(["inspect", str(path)]) == 0
    assert "Stable Diffusion" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "empty", "web_page", "gguf", "noise", "truncated"])
def test_inspect_refuses_what_is_no_checkpoint(files, tmp_path, kind, capsys):
    """A truncated file or one of another kind is one line and status 2."""
    assert main(["inspect", str(bad_file(kind, files, tmp_path))]) == 2
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1 and f"error: {kind}.safetensors" in captured.err


def test_help_names_every_option(capsys):
    """The help of `generate` is whole: every option has a line, and it ends well."""
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("--model", "--high", "--low", "--vae", "--text-encoder", "--size", "--frames", "--steps", "--seed",
                   "--solver", "--shift", "--schedule", "--guidance", "--tile", "--device", "--image", "--end-image",
                   "--clip-vision", "--control", "--mask", "--reference", "--vace", "--video", "--denoise", "--fit",
                   "--lora", "--weights", "--checkpoint-dir", "--checkpoint-every", "--resume"):
        assert option in out

