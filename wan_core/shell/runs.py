"""The commands that run a model: `generate` makes a video, `calibrate` measures a model for step caches."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..cache import Report, write_calibration
from ..calibrate import calibrate
from ..memory import Memory, OneAtATime
from ..models import Model, load_clip_vision, load_text_encoder, load_vae
from ..pipeline import bundled_vae, generate
from ..sampling import Step
from ..vae import Tiling
from ..video import check_video_path
from .models import add_models, load_transformer
from .pictures import add_pictures, visuals
from .settings import add_cache, add_settings, cache_of, checkpoints, with_options


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the command that makes a video."""
    make = commands.add_parser("generate", help="make a video of a prompt",
                               description="Make a video. Without model files the bundled nano models are used; "
                                           "what is not given is the preset's default.")
    make.set_defaults(run=_generate)
    make.add_argument("prompt")
    make.add_argument("--out", type=Path, default=Path("video.mp4"), help="MP4 file to write (default: %(default)s)")
    _add_run(make)
    add_cache(make)


def add_calibrate(commands: argparse._SubParsersAction) -> None:
    """Add the command that measures a model."""
    measure = commands.add_parser("calibrate", help="measure a model, for MagCache and TeaCache",
                                  description="Measure a model on whole runs, for MagCache and TeaCache: with the "
                                              "steps, shift, guidance and size that it will be used with. All options "
                                              "are those of generate.")
    measure.set_defaults(run=_calibrate)
    measure.add_argument("prompt", nargs="+", help="one is enough for MagCache, TeaCache gets better with more")
    measure.add_argument("--out", type=Path, required=True, help="JSON file to write")
    _add_run(measure)


def _add_run(make: argparse.ArgumentParser) -> None:
    add_models(make)
    add_pictures(make)
    add_settings(make)


def _generate(options: argparse.Namespace) -> str:
    check_video_path(options.out)
    model, parts = _loaded(options)
    model = replace(model, cache=cache_of(model, options))
    passes: dict[int, tuple[Sequence[str], Sequence[str]]] = {}
    with _steps(model, passes) as on_step:
        video = generate(options.prompt, model=model, checkpoints=checkpoints(options), on_step=on_step, **parts)
    video.save(options.out)
    frames, height, width, _ = video.frames.shape
    reused = f", {Report.of(passes)}" if model.cache else ""
    return (f"{options.out}: {frames} frames of {width}x{height} at {video.fps:g} fps, {model.preset.title}, "
            f"{video.settings['seconds']} s{reused}")


def _calibrate(options: argparse.Namespace) -> str:
    if options.out.suffix != ".json" or not options.out.parent.is_dir():
        raise ValueError(f"{options.out} cannot be written; give a name that ends in .json, in a folder that exists.")
    if options.checkpoint_dir is not None or options.resume is not None:
        raise ValueError("a run that is measured cannot be saved and resumed; leave --checkpoint-dir and --resume "
                         "away.")
    model, parts = _loaded(options)
    with _steps(model, {}) as on_step:
        measured = calibrate(options.prompt, model, on_step=on_step, **parts)
    write_calibration(measured, options.out)
    return (f"{options.out}: {len(measured.positive)} ratios and {len(measured.polynomials)} polynomials of "
            f"{model.preset.title}")


def _loaded(options: argparse.Namespace) -> tuple[Model, dict[str, object]]:
    """The model, and all else that `generate` is given."""
    placement = OneAtATime(options.device)
    model = with_options(load_transformer(options, placement), options)
    tiling = None
    if options.tile is not None:
        # A quarter of the tile, on the grid of every VAE.
        tiling = Tiling(options.tile, options.tile, max(16, options.tile // 64 * 16))
    vae = load_vae(options.vae or bundled_vae(model), placement=placement, dtype=options.dtype, tiling=tiling)
    clip_vision = None
    if options.clip_vision is not None:
        clip_vision = load_clip_vision(options.clip_vision, placement=placement, dtype=options.dtype)
    text_encoder = load_text_encoder(options.text_encoder, tokenizer=options.tokenizer, placement=placement)
    memory = Memory(options.memory, options.pinned)
    model, vae, text_encoder = (replace(handle, memory=memory) for handle in (model, vae, text_encoder))
    width, height = options.size or (None, None)
    return model, {"vae": vae, "text_encoder": text_encoder, "clip_vision": clip_vision, "visuals": visuals(options),
                   "width": width, "height": height, "frames": options.frames, "negative_prompt": options.negative,
                   "steps": options.steps, "seed": options.seed, "solver": options.solver, "shift": options.shift,
                   "guidance": options.guidance, "fps": options.fps, "schedule": options.schedule}


@contextmanager
def _steps(model: Model, passes: dict[int, tuple[Sequence[str], Sequence[str]]]) -> Iterator[Callable[[Step], None]]:
    """Gives an `on_step` that shows the steps of one run after the other, and notes what was reused in `passes`."""
    bar: tqdm | None = None

    def on_step(step: Step) -> None:
        nonlocal bar
        passes[step.index] = step.branches, step.reused
        if bar and step.index < bar.n:
            bar.close()
            bar = None
        bar = bar or tqdm(total=step.total, unit="step", initial=step.index)
        bar.set_postfix_str(f"sigma {step.sigma:.3f}" + (f", {step.expert}-noise expert" if model.boundary else "")
                            + (", reused" if step.reused else ""))
        bar.update()

    try:
        yield on_step
    finally:
        if bar:
            bar.close()
