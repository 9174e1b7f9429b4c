"""From a prompt to frames: what is checked first, what is recorded, and that a seed gives one video."""

from dataclasses import asdict, replace

import pytest
import torch

from tests.small_models import save_module
from wan_core.conditioning import SigmaRange, TextCondition
from wan_core.memory import OneAtATime
from wan_core.models import load_experts, load_model, load_text_encoder, load_vae
from wan_core.pipeline import Video, check_fit, generate, initial_noise, latent_shape, resolve_settings, sample
from wan_core.presets import PRESETS, TEXT_ENCODERS, VAES
from wan_core.sampling import Conditions, Guidance, denoise, make_schedule, partial, schedule_named
from wan_core.text import UMT5Encoder
from wan_core.vae import WanVAE
from wan_core.video import read_metadata, read_video

SMALL = {"width": 32, "height": 16, "frames": 5, "steps": 2}
ONE = Guidance(1.0, 1.0)


class NoModel(OneAtATime):
    """A place in which nothing may be put."""

    def place(self, part, dtype):
        pytest.fail(f"{part.label} was loaded")


@pytest.fixture(scope="module")
def parts(files):
    placement = OneAtATime("cpu")
    return {"model": load_model(files.model, placement=placement), "vae": load_vae(files.vae, placement=placement),
            "text_encoder": load_text_encoder(files.text_encoder, placement=placement)}


@pytest.fixture
def unloadable(files):
    """The same parts; loading any of them is a failure."""
    placement = NoModel("cpu")
    return {"model": load_model(files.model, placement=placement), "vae": load_vae(files.vae, placement=placement),
            "text_encoder": load_text_encoder(files.text_encoder, placement=placement)}


@pytest.fixture(scope="module")
def context():
    return TextCondition(torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(3)))


def test_generate_gives_frames_and_what_made_them(parts):
    """uint8 frames [F, H, W, 3] at the preset's rate, and every setting, chosen or default, and the model's name."""
    video = generate("a red circle", **parts, **SMALL, seed=7, guidance=2.5)
    assert video.frames.shape == (5, 16, 32, 3) and video.frames.dtype == torch.uint8 and video.fps == 8
    defaults = PRESETS["nano_t2v"].sampling
    assert video.settings == {
        "prompt": "a red circle", "negative_prompt": defaults.negative_prompt, **SMALL, "seed": 7,
        "solver": defaults.solver, "shift": defaults.shift, "guidance": (2.5, 2.5), "fps": defaults.fps,
        "model": "nano_t2v", "files": ["model.safetensors"], "loras": [], "seconds": video.settings["seconds"]}


def test_same_seed_same_video(parts):
    """Bit for bit, whatever was made in between; another seed, prompt or guidance gives another video."""
    first = generate("a red circle", **parts, **SMALL, seed=1).frames
    for change in ({"seed": 2}, {"guidance": 1.0}, {"solver": "euler"}):
        assert not torch.equal(generate("a red circle", **parts, **SMALL, **{"seed": 1, **change}).frames, first)
    assert not torch.equal(generate("a blue square", **parts, **SMALL, seed=1).frames, first)
    assert torch.equal(generate("a red circle", **parts, **SMALL, seed=1).frames, first)


def test_experts_take_two_guidance_scales(files, parts):
    """A pair takes (high, low); the high-noise expert's scale alone changes the video."""
    pair = load_experts(files.high, files.low, placement=parts["vae"].placement)
    videos = [generate("a red circle", **{**parts, "model": pair}, **SMALL, guidance=scales).frames
              for scales in ((4.0, 3.0), (2.0, 3.0))]
    assert not torch.equal(*videos)


def test_every_step_is_told_and_can_stop(parts):
    """on_step comes once a step and on_block in the text encoder, too; what they raise ends the run."""
    steps, blocks = [], []
    generate("a red circle", **parts, **SMALL, on_step=steps.append, on_block=blocks.append)
    assert [step.index for step in steps] == [0, 1]
    assert len(blocks) == 2 + 2 * 2 * 6  # 2 blocks of text encoder, then 6 of transformer, 2 branches, 2 steps

    def stop(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate("a red circle", **parts, **SMALL, on_block=stop)


def test_saved_video_holds_frames_and_settings(parts, tmp_path):
    """The MP4 has the frames' size and number, and the settings as JSON in its comment."""
    video = generate("a red circle, \"moving\" left; 50 % = half", **parts, **SMALL)
    video.save(tmp_path / "clip.mp4")
    assert read_video(tmp_path / "clip.mp4").shape == (5, 16, 32, 3)
    settings = read_metadata(tmp_path / "clip.mp4")["comment"]
    assert settings == {**video.settings, "guidance": list(video.settings["guidance"])}


def test_a_video_of_any_rate_can_be_saved(tmp_path):
    """A rate that is no whole number is kept."""
    Video(torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 23.976, {"prompt": "x"}).save(tmp_path / "clip.mp4")
    assert read_metadata(tmp_path / "clip.mp4")["comment"] == {"prompt": "x"}


@pytest.mark.parametrize(("change", "message"), [
    ({"width": 100}, "width is 100 pixels; it must be a multiple of 16. Use 96"),
    ({"height": 8}, "height is 8 pixels.*Use 16"),
    ({"width": 0}, "width is 0 pixels.*Use 16"),
    ({"width": -64}, "width is -64 pixels.*Use 16"),
    ({"frames": 16}, "frames is 16; it must be 4n \\+ 1. Use 17"),
    ({"frames": 0}, "frames is 0.*Use 1"),
    ({"frames": -3}, "frames is -3.*Use 1"),
    ({"steps": 0}, "steps must be a whole number from 1 .* got 0"),
    ({"steps": -5}, "got -5"),
    ({"shift": 0.0}, "shift must be a number greater than 0"),
    ({"solver": "heun"}, "heun"),
    ({"guidance": -1.0}, "guidance scale for high noise .* got -1"),
    ({"fps": 0}, "fps is 0"),
    ({"fps": float("nan")}, "fps is nan"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n\t"}, "the prompt is empty"),
])
def test_bad_settings_are_refused_before_anything_is_loaded(unloadable, change, message):
    """Sizes off the grid, frames that are not 4n + 1, no steps, an empty prompt: each an error that says what to do."""
    with pytest.raises(ValueError, match=message):
        generate(**{"prompt": "a red circle", **unloadable, **SMALL, **change})


def test_parts_that_do_not_fit_are_refused_before_anything_is_loaded(unloadable, tmp_path):
    """A VAE or a text encoder of another model is an error that names the file and the right part."""
    other = replace(VAES["nano_vae"], dim=8, decoder_dim=8)
    torch.manual_seed(0)
    vae = load_vae(save_module(tmp_path / "other_vae.safetensors", WanVAE(other)), placement=NoModel("cpu"))
    with pytest.raises(ValueError, match="other_vae.safetensors .* is not the VAE that Nano T2V.*Use nano_vae"):
        generate("a red circle", **{**unloadable, "vae": vae}, **SMALL)
    tensors = UMT5Encoder(replace(TEXT_ENCODERS["nano_umt5"], dim=64))
    tokenizer = tmp_path / "spiece.model"
    tokenizer.write_bytes(unloadable["text_encoder"].tokenizer.to_bytes())
    encoder = load_text_encoder(save_module(tmp_path / "other_text.safetensors", tensors), placement=NoModel("cpu"))
    with pytest.raises(ValueError, match="other_text.safetensors gives embeddings of width 64; Nano T2V takes 96. Use "
                                         "nano_umt5"):
        generate("a red circle", **{**unloadable, "text_encoder": encoder}, **SMALL)


def test_parts_that_fit_pass(unloadable, files):
    """The model's own VAE and text encoder are accepted, for a single model and a pair."""
    check_fit(**unloadable)
    check_fit(load_experts(files.high, files.low, placement=NoModel("cpu")), unloadable["vae"],
              unloadable["text_encoder"])


NAMES = ("negative_prompt", "width", "height", "frames", "steps", "solver", "shift", "fps")
UNSET = dict.fromkeys(NAMES)


def test_settings_are_the_presets_unless_given(unloadable):
    """None means the preset's value; one guidance scale stands for both experts; nothing else changes."""
    model = unloadable["model"]
    defaults = model.preset.sampling
    settings = resolve_settings(model, "x", seed=3, **UNSET)
    assert asdict(settings) == {"prompt": "x", "seed": 3, **{name: getattr(defaults, name) for name in NAMES},
                                "guidance": (defaults.guidance_high, defaults.guidance_low)}
    chosen = {"steps": 4, "fps": 12.5, "negative_prompt": ""}
    given = resolve_settings(model, "x", seed=0, guidance=2, **{**UNSET, **chosen})
    assert (given.steps, given.fps, given.negative_prompt, given.guidance) == (4, 12.5, "", (2, 2))
    assert resolve_settings(model, "x", seed=0, guidance=(4, 3), **UNSET).guidance == (4, 3)


def test_experts_default_to_their_own_scales(files):
    """Wan 2.2 T2V-A14B's defaults come out as (high, low)."""
    pair = load_experts(files.high, files.low, placement=NoModel("cpu"))
    preset = replace(pair.preset, sampling=PRESETS["wan22_t2v_a14b"].sampling)
    assert resolve_settings(replace(pair, preset=preset), "x", seed=0, **UNSET).guidance == (4.0, 3.0)


@pytest.mark.parametrize(("vae", "size", "expected"), [
    ("wan21_vae", (832, 480, 81), (1, 16, 21, 60, 104)), ("wan21_vae", (16, 16, 1), (1, 16, 1, 2, 2)),
    ("wan22_vae", (1280, 704, 121), (1, 48, 31, 44, 80)),
])
def test_shape_of_latents(vae, size, expected):
    """Sizes in pixels and frames to [batch, channels, time, height, width] of latents, for both families."""
    assert latent_shape(VAES[vae], *size) == expected
    assert latent_shape(VAES[vae], *size, batch=3) == (3, *expected[1:])


def test_sizes_follow_each_family_s_grid():
    """The Wan 2.2 VAE's grid is 32 pixels, where 16 would do for Wan 2.1."""
    with pytest.raises(ValueError, match="width is 720 pixels; it must be a multiple of 32. Use 704"):
        latent_shape(VAES["wan22_vae"], 720, 704, 121)


def test_noise_is_normal_and_of_its_seed():
    """Standard normal float32 on the CPU, the same for a seed whenever it is asked for."""
    noise = initial_noise((1, 16, 5, 32, 32), 5)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert torch.equal(noise, initial_noise((1, 16, 5, 32, 32), 5))
    assert not torch.equal(noise, initial_noise((1, 16, 5, 32, 32), 6))


@pytest.mark.parametrize("seed", [2 ** 64, -2 ** 63 - 1, 10 ** 40, 1.5, True, None])
def test_seeds_beyond_64_bits_are_refused(unloadable, seed):
    """A seed that no generator takes is an error with the range, before anything is made or loaded."""
    message = f"the seed is {seed}; it must be a whole number from -9223372036854775808 to 18446744073709551615"
    with pytest.raises(ValueError, match=message):
        resolve_settings(unloadable["model"], "x", seed=seed, **UNSET)
    with pytest.raises(ValueError, match=message):
        initial_noise((1, 2), seed)
    with pytest.raises(ValueError, match=message):
        generate("x", **unloadable, seed=seed)


def test_seeds_of_64_bits_make_noise():
    """Both ends of the range work; a negative seed is the one 2^64 above it."""
    for seed in (-2 ** 63, -1):
        assert torch.equal(initial_noise((1, 16), seed), initial_noise((1, 16), seed + 2 ** 64))
    assert not torch.equal(initial_noise((1, 16), -1), initial_noise((1, 16), -2 ** 63))


def raw_latents(model, seed=1):
    return model.latent_stats.restore(initial_noise((1, 16, 2, 4, 4), seed))


def test_without_noise_the_latents_go_on_as_they_are(parts, context):
    """noise=None: raw latents are normalised, denoised from the schedule's first level, and come back raw."""
    model, conditions = parts["model"], Conditions([context])
    latents, schedule = raw_latents(model), partial(make_schedule("euler", 4, 3.0), 2)
    result = sample(model, latents, schedule, conditions, ONE, solver="euler")
    stats = model.latent_stats
    expected = denoise(model, stats.normalise(latents), schedule, conditions, ONE, solver="euler")
    torch.testing.assert_close(result, stats.restore(expected), atol=1e-5, rtol=1e-5)


def test_a_run_in_two_parts_is_the_run(parts, context):
    """The first steps with noise, the rest without: what one run gives (Euler remembers nothing)."""
    model, conditions = parts["model"], Conditions([context])
    schedule, noise = make_schedule("euler", 4, 3.0), initial_noise((1, 16, 2, 4, 4), 2)
    empty = torch.zeros_like(noise)
    whole = sample(model, empty, schedule, conditions, ONE, noise=noise, solver="euler")
    half = sample(model, empty, partial(schedule, 0, 2), conditions, ONE, noise=noise, solver="euler")
    rest = sample(model, half, partial(schedule, 2), conditions, ONE, solver="euler")
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(half, whole, atol=1e-2)


def test_noise_is_mixed_in_at_the_first_level(parts, context):
    """A partial run starts from (1 - sigma) * latents + sigma * noise; a full one from the noise alone."""
    model, conditions = parts["model"], Conditions([context])
    latents, noise = raw_latents(model), initial_noise((1, 16, 2, 4, 4), 2)
    clean = model.latent_stats.normalise(latents)
    schedule = make_schedule("euler", 4, 3.0)
    sigma = float(schedule.sigmas[2])
    assert 0.1 < sigma < 0.9
    for used, start in ((partial(schedule, 2), (1 - sigma) * clean + sigma * noise), (schedule, noise),
                        (make_schedule("unipc", 4, 3.0), noise)):
        result = sample(model, latents, used, conditions, ONE, noise=noise, solver="euler")
        expected = model.latent_stats.restore(denoise(model, start, used, conditions, ONE, solver="euler"))
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_a_schedule_that_begins_below_one_starts_from_scaled_noise(parts, context):
    """rCM's first level is 0.988: an empty clip starts as noise times that, which is the mixture there."""
    model, conditions = parts["model"], Conditions([context])
    schedule, noise = schedule_named("rcm"), initial_noise((1, 16, 2, 4, 4), 2)
    result = sample(model, torch.zeros_like(noise), schedule, conditions, ONE, noise=noise, solver="lcm", seed=4)
    start = noise * schedule.sigmas[0]
    expected = denoise(model, start, schedule, conditions, ONE, solver="lcm", seed=4)
    torch.testing.assert_close(result, model.latent_stats.restore(expected), atol=1e-5, rtol=1e-5)
    other = denoise(model, start, schedule, conditions, ONE, solver="lcm", seed=5)
    assert not torch.allclose(other, expected, atol=1e-2)


def test_a_named_schedule_brings_its_settings(parts):
    """Steps, shift, solver and guidance 1 of the schedule, recorded with its name; what is given goes first."""
    small = {name: SMALL[name] for name in ("width", "height", "frames")}
    settings = generate("a red circle", **parts, **small, schedule="lightx2v").settings
    assert {name: settings[name] for name in ("schedule", "steps", "shift", "solver", "guidance")} == {
        "schedule": "lightx2v", "steps": 4, "shift": 5.0, "solver": "euler", "guidance": (1.0, 1.0)}
    chosen = {"steps": 2, "solver": "euler", "guidance": 2.0}
    settings = generate("a red circle", **parts, **small, schedule="rcm", **chosen).settings
    assert (settings["steps"], settings["solver"], settings["guidance"]) == (2, "euler", (2.0, 2.0))


def test_an_empty_clip_is_zero_when_normalised(parts, context):
    """Zeros stand for no clip: they are not taken for raw latents, whose zero is not the normalised one."""
    model, conditions = parts["model"], Conditions([context])
    schedule, noise = partial(make_schedule("euler", 4, 3.0), 2), initial_noise((1, 16, 2, 4, 4), 2)
    result = sample(model, torch.zeros_like(noise), schedule, conditions, ONE, noise=noise, solver="euler")
    start = float(schedule.sigmas[0]) * noise
    expected = model.latent_stats.restore(denoise(model, start, schedule, conditions, ONE, solver="euler"))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused_before_weights_are_loaded(unloadable, context):
    """Latents, noise, prompts and gaps between prompts are checked while no model is on the device."""
    model, schedule = unloadable["model"], make_schedule("euler", 4, 3.0)
    latents = torch.zeros(1, 16, 2, 4, 4)
    for change, message in (
            ({"latents": torch.zeros(1, 48, 2, 4, 4)}, r"takes \[batch, 16"),
            ({"noise": torch.zeros(1, 16, 2, 4, 6)}, r"noise has shape \[1, 16, 2, 4, 6\], the latents"),
            ({"conditions": Conditions([TextCondition(torch.zeros(1, 3, 64))])}, "width of 64, Nano T2V takes 96"),
            ({"conditions": Conditions([replace(context, sigmas=SigmaRange(end=0.6))])}, "no prompt is active"),
            ({"guidance": Guidance(5.0, 5.0)}, "needs a negative prompt"),
            ({"solver": "heun"}, "'heun'")):
        arguments = {"latents": latents, "conditions": Conditions([context]), "guidance": ONE, "schedule": schedule,
                     **change}
        with pytest.raises(ValueError, match=message):
            sample(model, **arguments)
