"""The shell: `python -m wan_core generate "..." --out clip.mp4`, `... inspect FILE` and `... quantize IN OUT`."""

import argparse
import logging
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import Checkpoints
from .conditioning import FITS
from .dit import BACKENDS
from .forecast import official_peaks
from .memory import Memory, OneAtATime, working_dtype
from .models import (
    NANO,
    Model,
    Part,
    add_vace,
    load_clip_vision,
    load_experts,
    load_model,
    load_text_encoder,
    load_vae,
)
from .pipeline import bundled_vae, generate
from .presets import PRESETS, TransformerSpec
from .sampling import SOLVERS, Step
from .vae import Tiling
from .video import check_video_path, read_video
from .visuals import Visuals
from .weights import TARGETS, describe, format_report, human_size, open_model, write_quantised
from .weights.fp8 import SWITCH
from .weights.lora import format_match, open_lora

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What the user can mend is one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.run(options)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wan_core", description="Wan video models from the shell.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("generate", help="make a video of a prompt",
                               description="Make a video. Without model files the bundled nano models are used; "
                                           "what is not given is the preset's default.")
    make.set_defaults(run=_generate)
    _add_inputs(make)
    _add_settings(make)
    inspect = commands.add_parser("inspect", help="say what a model or LoRA file is",
                                  description="Say what a model or LoRA file is, what is missing, in which formats its "
                                              "weights are, and how much GPU memory they need.")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("file", type=Path)
    quantize = commands.add_parser("quantize", help="write a smaller file of a transformer",
                                   description="Quantise the matrices of a transformer's blocks and write a new file; "
                                               "FP8, int8, MXFP8 and NVFP4 as .safetensors, "
                                               "GGUF's block formats as .gguf.")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("input", type=Path, help="BF16, FP16 or FP32 file")
    quantize.add_argument("output", type=Path, help="file to write")
    quantize.add_argument("--format", choices=list(TARGETS), required=True)
    return parser


def _add_inputs(make: argparse.ArgumentParser) -> None:
    """What a video is made of: the prompt, model files, pictures."""
    make.add_argument("prompt")
    make.add_argument("--out", type=Path, default=Path("video.mp4"), help="MP4 file to write (default: %(default)s)")
    files = make.add_argument_group("models")
    files.add_argument("--model", help="transformer file, or 'nano' (default), 'nano-i2v', 'nano-ti2v'")
    files.add_argument("--high", help="high-noise expert, with --low: a file, or 'nano'")
    files.add_argument("--low", help="low-noise expert")
    files.add_argument("--vae", help="VAE file (default: the bundled one)")
    files.add_argument("--clip-vision", help="CLIP vision file, for Wan 2.1 I2V and FLF2V")
    files.add_argument("--vace", help="VACE module to add to a text-to-video model, or 'nano'")
    files.add_argument("--vace-low", help="VACE module of the low-noise expert (default: the same)")
    files.add_argument("--text-encoder", default=NANO, help="UMT5 file (default: %(default)s)")
    files.add_argument("--tokenizer", help="SentencePiece file, if the text encoder's file holds none")
    files.add_argument("--lora", type=_lora, action="append", metavar="FILE[=STRENGTH[,LOW]]",
                       help="LoRA file, how strong it is (default: 1), and how strong for the low-noise expert of a "
                            "pair (default: the same); repeatable")
    files.add_argument("--merge-loras", action="store_true",
                       help="fold the LoRAs into the weights while these are read, where they are not quantised")
    files.add_argument("--weights", choices=list(TARGETS), help="quantise the transformer's matrices when it is loaded")
    files.add_argument("--fp8-products", choices=list(SWITCH), default="auto",
                       help="multiply FP8 weights in FP8 (default: where the device is faster at it)")
    files.add_argument("--preset", choices=list(PRESETS), metavar="NAME",
                       help="which preset, where several share the file's architecture")
    shown = make.add_argument_group("pictures and videos", "files of any format that ffmpeg reads")
    shown.add_argument("--image", type=Path, help="start image (of a video: all of its frames are continued)")
    shown.add_argument("--end-image", type=Path, help="end image")
    shown.add_argument("--control", type=Path, help="VACE: control video, or the video to change")
    shown.add_argument("--mask", type=Path, help="VACE: picture or video that is white where the video is made anew")
    shown.add_argument("--reference", type=Path, action="append", help="VACE: picture of what is to appear; repeatable")
    shown.add_argument("--video", type=Path, help="video to start from, with --denoise")
    shown.add_argument("--denoise", type=float, default=1.0, help="how much of --video is made anew, 0 to 1")
    shown.add_argument("--fit", choices=list(FITS), help="how pictures are brought to the video's size")


def _add_settings(make: argparse.ArgumentParser) -> None:
    """How a video is made: its size, the sampling, the machine."""
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
    sampling.add_argument("--guidance", type=_guidance, metavar="SCALE[,LOW]",
                          help="guidance scale; two for experts: high-noise, low-noise")
    machine = make.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the accelerator, if there is one)")
    machine.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    machine.add_argument("--memory", type=float, metavar="GB",
                         help="device memory that may be used (default: what is free); a model that does not fit comes "
                              "and goes block by block")
    machine.add_argument("--pinned", type=float, metavar="GB",
                         help="host memory that may be page-locked for that (default: half of what is free)")
    machine.add_argument("--attention", default="sdpa", choices=list(BACKENDS))
    machine.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                         help="save the run here while it goes on; started again, it goes on from there")
    machine.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between two savings (default: 1)")
    machine.add_argument("--resume", type=Path, metavar="FILE",
                         help="checkpoint to go on from; with other settings than its own it is refused")
    machine.add_argument("--tile", type=int, metavar="PIXELS", help="decode in tiles of this size, to save memory")


def _generate(options: argparse.Namespace) -> None:
    check_video_path(options.out)
    placement = OneAtATime(options.device)
    model = _load_transformer(options, placement)
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
    bar: tqdm | None = None

    def on_step(step: Step) -> None:
        nonlocal bar
        bar = bar or tqdm(total=step.total, unit="step", initial=step.index)
        bar.set_postfix_str(f"sigma {step.sigma:.3f}" + (f", {step.expert}-noise expert" if model.boundary else ""))
        bar.update()

    try:
        video = generate(options.prompt, model=model, vae=vae, text_encoder=text_encoder, clip_vision=clip_vision,
                         visuals=_visuals(options), width=width, height=height, frames=options.frames,
                         negative_prompt=options.negative, steps=options.steps, seed=options.seed,
                         solver=options.solver, shift=options.shift, guidance=options.guidance, fps=options.fps,
                         checkpoints=_checkpoints(options), on_step=on_step)
    finally:
        if bar:
            bar.close()
    video.save(options.out)
    frames, height, width, _ = video.frames.shape
    print(f"{options.out}: {frames} frames of {width}x{height} at {video.fps:g} fps, {model.preset.title}, "
          f"{video.settings['seconds']} s")


def _checkpoints(options: argparse.Namespace) -> Checkpoints | None:
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


def _visuals(options: argparse.Namespace) -> Visuals:
    def pictures(path: Path | None) -> Tensor | None:
        return None if path is None else read_video(path).movedim(-1, 1).float() / 127.5 - 1

    references = [pictures(path) for path in options.reference or ()]
    if len({reference.shape[2:] for reference in references}) > 1:
        raise ValueError("reference pictures must have one size, got "
                         f"{', '.join(f'{r.shape[3]}x{r.shape[2]}' for r in references)}.")
    mask = pictures(options.mask)
    return Visuals(start=pictures(options.image), end=pictures(options.end_image), control=pictures(options.control),
                   mask=None if mask is None else (mask.mean(1, keepdim=True) + 1) / 2,
                   references=torch.cat(references) if references else None, video=pictures(options.video),
                   denoise=options.denoise, how=options.fit)


def _load_transformer(options: argparse.Namespace, placement: OneAtATime) -> Model:
    model = _load_files(options, placement)
    if options.weights is not None:
        model = model.quantised(options.weights)
    if options.vace is not None:
        model = add_vace(model, options.vace, options.vace_low)
    elif options.vace_low is not None:
        raise ValueError("--vace-low is the VACE module of the low-noise expert, and the high-noise expert's, "
                         "--vace, is missing.")
    for path, strength, low in options.lora or ():
        model = model.with_lora(open_lora(path), strength, low)
        log.info("LoRA %s", format_match(model.loras[-1]))
    log.info("%s", model.summary())
    return model.merged() if options.merge_loras else model


def _load_files(options: argparse.Namespace, placement: OneAtATime) -> Model:
    common = {"preset": options.preset, "placement": placement, "dtype": options.dtype, "attention": options.attention,
              "fp8_products": options.fp8_products}
    if options.high is None and options.low is None:
        return load_model(options.model or NANO, **common)
    if options.model is not None:
        raise ValueError("--model is a single model, --high and --low a pair of experts; give one or the other.")
    if options.high is None or options.low is None:
        missing = "--high" if options.high is None else "--low"
        raise ValueError(f"an expert pair needs both files, and {missing} is missing.")
    return load_experts(options.high, options.low, **common)


def _inspect(options: argparse.Namespace) -> None:
    report = describe(options.file)
    part = None
    if report.complete and report.recognition.kind in ("transformer", "vae", "text_encoder", "clip_vision"):
        part = Part.open(options.file, report.recognition.kind)
    print(format_report(report, part and _memory(part)))
    if part and report.recognition.kind == "transformer" and part.names:
        preset = PRESETS[part.names[0]]
        official = preset.sampling
        half = working_dtype("auto", part.stored_dtype, torch.device("cuda"))
        size = f"{official.width}x{official.height}, {official.frames} frames"
        print(f"  memory of a run on a GPU: {preset.title}, {size}")
        for choice, peak in official_peaks(part, preset, str(half).removeprefix("torch.")).items():
            print(f"    {choice:<20} {human_size(peak)}")


def _memory(part: Part) -> dict[str, int]:
    """Bytes of the weights on a GPU: "as stored", in half precision, and quantised on load, where that differs."""
    stored, half = part.stored_dtype, working_dtype("auto", part.stored_dtype, torch.device("cuda"))
    as_stored = part.size(stored)
    sizes = {}
    if not part.file.quantised:
        sizes[str(half).removeprefix("torch.")] = part.size(half)
        if isinstance(part.spec, TransformerSpec):
            sizes |= {form: part.quantised(form).size(half) for form in TARGETS}
    return {"as stored": as_stored, **{choice: size for choice, size in sizes.items() if size != as_stored}}


def _quantize(options: argparse.Namespace) -> None:
    file, _ = open_model(options.input, "transformer")
    with tqdm(total=len(file), unit="tensor") as bar:
        written = write_quantised(file, options.format, options.output, lambda done, of: bar.update(done - bar.n))
    print(f"{options.output}: {human_size(written)} of {human_size(file.nbytes)}")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x*](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 832x480")
    return int(match[1]), int(match[2])


def _lora(text: str) -> tuple[Path, float, float | None]:
    """The file and its strengths, of which the second is None if not given; a path may hold '=', too."""
    path, _, tail = text.rpartition("=")
    try:
        strengths = [float(part) for part in tail.split(",")]
    except ValueError:
        strengths = []
    if not path or not strengths:
        return Path(text), 1.0, None
    if len(strengths) > 2 or not all(map(math.isfinite, strengths)):
        raise argparse.ArgumentTypeError(f"{text!r} ends in no strength; write FILE=0.8, or FILE=1,0.5 for high and "
                                         "low noise")
    return Path(path), strengths[0], strengths[1] if len(strengths) == 2 else None


def _guidance(text: str) -> tuple[float, float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if len(scales) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a guidance scale; write 5, or 4,3 for high and low noise")
    return scales[0], scales[-1]


if __name__ == "__main__":
    sys.exit(main())
