"""The commands for files: `inspect` says what one is, `quantize` writes a smaller one."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ..forecast import official_peaks
from ..memory import working_dtype
from ..models import Part
from ..presets import PRESETS, TransformerSpec
from ..weights import TARGETS, describe, format_report, human_size, open_model, write_quantised


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Add the command that says what a file is."""
    inspect = commands.add_parser("inspect", help="say what a model or LoRA file is",
                                  description="Say what a model or LoRA file is, what is missing, in which formats its "
                                              "weights are, and how much GPU memory they need.")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("file", type=Path)


def add_quantize(commands: argparse._SubParsersAction) -> None:
    """Add the command that writes a smaller file."""
    quantize = commands.add_parser("quantize", help="write a smaller file of a transformer",
                                   description="Quantise the matrices of a transformer's blocks and write a new file; "
                                               "FP8, int8, MXFP8 and NVFP4 as .safetensors, "
                                               "GGUF's block formats as .gguf.")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("input", type=Path, help="BF16, FP16 or FP32 file")
    quantize.add_argument("output", type=Path, help="file to write")
    quantize.add_argument("--format", choices=list(TARGETS), required=True)


def _inspect(options: argparse.Namespace) -> str:
    report = describe(options.file)
    part = None
    if report.complete and report.recognition.kind in ("transformer", "vae", "text_encoder", "clip_vision"):
        part = Part.open(options.file, report.recognition.kind)
    lines = [format_report(report, part and _memory(part))]
    if part and report.recognition.kind == "transformer" and part.names:
        preset = PRESETS[part.names[0]]
        official = preset.sampling
        half = working_dtype("auto", part.stored_dtype, torch.device("cuda"))
        size = f"{official.width}x{official.height}, {official.frames} frames"
        lines.append(f"  memory of a run on a GPU: {preset.title}, {size}")
        for choice, peak in official_peaks(part, preset, str(half).removeprefix("torch.")).items():
            lines.append(f"    {choice:<20} {human_size(peak)}")
    return "\n".join(lines)


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


def _quantize(options: argparse.Namespace) -> str:
    file, _ = open_model(options.input, "transformer")
    with tqdm(total=len(file), unit="tensor") as bar:
        written = write_quantised(file, options.format, options.output, lambda done, of: bar.update(done - bar.n))
    return f"{options.output}: {human_size(written)} of {human_size(file.nbytes)}"
