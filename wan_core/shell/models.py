"""Options that name model files and say how they are loaded."""

import argparse
import logging
import math
from pathlib import Path

from ..memory import OneAtATime
from ..models import NANO, Model, add_vace, load_experts, load_model
from ..presets import PRESETS
from ..weights import TARGETS
from ..weights.fp8 import SWITCH
from ..weights.lora import format_match, open_lora

log = logging.getLogger(__name__)


def add_models(make: argparse.ArgumentParser) -> None:
    """Add the options of model files."""
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


def load_transformer(options: argparse.Namespace, placement: OneAtATime) -> Model:
    """The transformer with its LoRAs and VACE module."""
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
    common = {"preset": options.preset, "placement": placement, "dtype": options.dtype,
              "fp8_products": options.fp8_products}
    if options.high is None and options.low is None:
        return load_model(options.model or NANO, **common)
    if options.model is not None:
        raise ValueError("--model is a single model, --high and --low a pair of experts; give one or the other.")
    if options.high is None or options.low is None:
        missing = "--high" if options.high is None else "--low"
        raise ValueError(f"an expert pair needs both files, and {missing} is missing.")
    return load_experts(options.high, options.low, **common)


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
