"""Options of how a video is made: its size, the sampling, the machine."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from ..cache import QUALITIES, AutoCache, EasyCache, MagCache, StepCache, TeaCache, read_calibration
from ..checkpoint import Checkpoints
from ..conditioning import SigmaRange
from ..dit import BACKENDS, MODES, AttentionRange, Compile, NormalisedAttention, Radial
from ..guidance import GuidanceOptions, Projection, SkippedBlocks, parse_blocks, parse_scales
from ..models import Model
from ..sampling import NAMED_SCHEDULES, SOLVERS

CACHES = ("auto", "teacache", "magcache", "easycache")


def add_settings(make: argparse.ArgumentParser) -> None:
    """Add the options of size, sampling and machine."""
    video = make.add_argument_group("video")
    video.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT")
    video.add_argument("--frames", type=int, help="4n + 1")
    video.add_argument("--fps", type=float)
    video.add_argument("--seed", type=int, default=0, help="whole number of up to 64 bits (default: %(default)s)")
    sampling = make.add_argument_group("sampling")
    sampling.add_argument("--negative", help="negative prompt")
    sampling.add_argument("--steps", type=int)
    sampling.add_argument("--solver", choices=list(SOLVERS))
    sampling.add_argument("--shift", type=float)
    sampling.add_argument("--schedule", choices=list(NAMED_SCHEDULES),
                          help="noise levels of a distilled model, with what else goes with them")
    sampling.add_argument("--guidance", type=_guidance, metavar="SCALE[,LOW]",
                          help="guidance scale; two for experts: high-noise, low-noise")
    sampling.add_argument("--guidance-steps", default="", metavar="SCALE,SCALE*N,...",
                          help="a scale for each step; the last one holds for the steps that follow")
    sampling.add_argument("--guidance-range", default="inf,0", metavar="START,END",
                          help="noise levels, 1 falling to 0, at which there is guidance; elsewhere a step costs half")
    sampling.add_argument("--cfg-zero-star", type=int, nargs="?", const=0, metavar="N",
                          help="CFG-Zero*, and of the first N steps (default: 0) nothing is computed")
    sampling.add_argument("--apg", action="store_true", help="adaptive projected guidance: less saturated colours")
    sampling.add_argument("--nag", metavar="SCALE[,TAU[,ALPHA]]",
                          help="normalised attention guidance (11,2.5,0.25): a negative prompt at guidance 1, too")
    sampling.add_argument("--skip-blocks", metavar="BLOCKS[@START,END]",
                          help="leave blocks out of the negative prompt's pass, such as 9,10@0.95,0")
    _add_machine(make)


def _add_machine(make: argparse.ArgumentParser) -> None:
    machine = make.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the accelerator, if there is one)")
    machine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    machine.add_argument("--memory", type=float, metavar="GB",
                         help="device memory that may be used (default: what is free); a model that does not fit comes "
                              "and goes block by block")
    machine.add_argument("--pinned", type=float, metavar="GB",
                         help="host memory that may be page-locked for that (default: half of what is free)")
    machine.add_argument("--attention", type=_attention, action="append", default=[], metavar="NAME[=START..END]",
                         help=f"{', '.join(BACKENDS)} (default: sdpa), or one for a range of noise levels; repeatable")
    machine.add_argument("--radial", nargs="?", const="0.5", metavar="DECAY[,START[,BLOCKS]]",
                         help="sparse attention for long clips (0.5,0.94,1)")
    machine.add_argument("--compile", nargs="?", const=MODES[0], choices=MODES, metavar="MODE",
                         help=f"compile the model's blocks: {', '.join(MODES)} (default: the first)")
    machine.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                         help="save the run here while it goes on; started again, it goes on from there")
    machine.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between two savings (default: 1)")
    machine.add_argument("--resume", type=Path, metavar="FILE",
                         help="checkpoint to go on from; with other settings than its own it is refused")
    machine.add_argument("--tile", type=int, metavar="PIXELS", help="decode in tiles of this size, to save memory")


def add_cache(make: argparse.ArgumentParser) -> None:
    """Add the options of step caches."""
    cache = make.add_argument_group("step cache")
    cache.add_argument("--cache", choices=CACHES,
                       help="reuse steps in which little changes; auto chooses by the model (default: compute all)")
    cache.add_argument("--cache-quality", choices=QUALITIES, default="balanced",
                       help="how much a cache may change: quality least, fast most (default: %(default)s)")
    cache.add_argument("--calibration", type=Path, metavar="FILE",
                       help="what `calibrate` has measured, for teacache and magcache")


def with_options(model: Model, options: argparse.Namespace) -> Model:
    """`model` with what the options say of guidance, attention and compiling."""
    compiled = options.compile and Compile(options.compile)
    return replace(_with_attention(model, options), guidance=_guidance_options(options), compile=compiled)


def cache_of(model: Model, options: argparse.Namespace) -> StepCache | None:
    """The step cache that is asked for. Raises ValueError where it has no numbers for the model."""
    if options.calibration is not None and options.cache not in ("teacache", "magcache"):
        raise ValueError("--calibration is for --cache teacache or magcache; the others need no numbers.")
    measured = None if options.calibration is None else read_calibration(options.calibration)
    preset, quality = model.preset.name, options.cache_quality
    choices = {"auto": lambda: AutoCache(quality), "easycache": lambda: EasyCache.of_quality(quality),
               "teacache": lambda: TeaCache.for_preset(preset, quality, measured=measured),
               "magcache": lambda: MagCache.for_preset(preset, quality, measured)}
    return None if options.cache is None else choices[options.cache]()


def _guidance_options(options: argparse.Namespace) -> GuidanceOptions:
    skipped = None
    if options.skip_blocks is not None:
        blocks, _, levels = options.skip_blocks.partition("@")
        skipped = SkippedBlocks(parse_blocks(blocks), sigmas=_levels("--skip-blocks", levels or "inf,0"))
    zero_steps = options.cfg_zero_star
    return GuidanceOptions(
        sigmas=_levels("--guidance-range", options.guidance_range), scales=parse_scales(options.guidance_steps),
        zero_star=zero_steps is not None, zero_steps=zero_steps or 0, projection=Projection() if options.apg else None,
        skipped=skipped, nag=options.nag and NormalisedAttention(*_numbers("--nag", options.nag, 1, 3)))


def _with_attention(model: Model, options: argparse.Namespace) -> Model:
    ranges = [one for one in options.attention if one != AttentionRange(one.backend)]
    bases = [model.attention, *(one.backend for one in options.attention if one not in ranges)]
    radial = options.radial and Radial(*_numbers("--radial", options.radial, 1, 3))
    return replace(model, attention=bases[-1], attention_ranges=tuple(ranges), radial=radial)


def checkpoints(options: argparse.Namespace) -> Checkpoints | None:
    """Where the run is saved and what it goes on from; by itself, the file that is resumed says where."""
    folder = options.checkpoint_dir
    if folder is None and options.resume is not None:
        folder = options.resume.parent
    if folder is None:
        if options.checkpoint_every is not None:
            raise ValueError("--checkpoint-every says how often a run is saved, and --checkpoint-dir, which says "
                             "where, is missing.")
        return None
    return Checkpoints(folder, 1 if options.checkpoint_every is None else options.checkpoint_every, options.resume)


def _levels(option: str, text: str) -> SigmaRange:
    return SigmaRange(*_numbers(option, text, 2, 2))


def _numbers(option: str, text: str, least: int, most: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not least <= len(numbers) <= most:
        count = f"{most} numbers" if least == most else f"{least} to {most} numbers"
        raise ValueError(f"{option} is given {text!r}; expected {count} with commas between them.")
    return numbers


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x*](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 832x480")
    return int(match[1]), int(match[2])


def _attention(text: str) -> AttentionRange:
    """A backend, and the noise levels that it is for."""
    name, _, levels = text.partition("=")
    start, _, end = levels.partition("..")
    try:
        return AttentionRange(name, float(start), float(end)) if levels else AttentionRange(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} Write NAME, or NAME=START..END as in sage=0.95..0.3") from error


def _guidance(text: str) -> tuple[float, float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if len(scales) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a guidance scale; write 5, or 4,3 for high and low noise")
    return scales[0], scales[-1]
