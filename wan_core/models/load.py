"""Opens model files as handles, checks that they are what they are wanted as, and chooses presets."""

import os
from dataclasses import replace
from pathlib import Path

from .. import nano
from ..memory import OneAtATime, Placement
from ..presets import PRESETS, Preset, with_vace
from ..text import GGUF_PIECES, Tokenizer
from ..vae import Tiling
from ..weights import LoadError, build_module, check_tensors, open_vace_module
from .encoders import TextEncoder, VideoVAE, VisionEncoder
from .part import Part
from .transformer import Model

NANO = "nano"

# Where the SentencePiece file may be, seen from the text encoder's folder: beside it, in the layout of diffusers (from
# `text_encoder` and from the folder around it), and in that of the official repositories.
_SPIECE_FILES = ("spiece.model", "../tokenizer/spiece.model", "tokenizer/spiece.model",
                 "google/umt5-xxl/spiece.model")


def load_model(path: str | Path = NANO, *, preset: str | None = None, placement: Placement | None = None,
               dtype: str = "auto", attention: str = "sdpa", fp8_products: str = "auto") -> Model:
    """A single transformer from a file, or a bundled one: "nano" (text to video), "nano-i2v" or "nano-ti2v".

    `preset` picks among the presets that share the file's architecture (T2V-14B or one expert of A14B, say).
    Raises LoadError if the file is none of them.
    """
    part = Part.open(nano.NAMES.get(str(path), path), "transformer")
    chosen = _choose_preset(part, preset, experts=False)
    return Model(part, part, chosen, placement or OneAtATime(), dtype, attention, fp8_products=fp8_products)


def load_experts(high: str | Path = NANO, low: str | Path = NANO, *, preset: str | None = None,
                 placement: Placement | None = None, dtype: str = "auto", attention: str = "sdpa",
                 fp8_products: str = "auto") -> Model:
    """A pair of experts from two files, or the bundled pair for "nano". Raises LoadError if they do not match."""
    first = Part.open(nano.T2V_HIGH if high == NANO else high, "transformer")
    second = Part.open(nano.T2V_LOW if low == NANO else low, "transformer")
    if first.spec != second.spec:
        raise LoadError(f"the experts are of different architectures: {first.label} fits {first.fits}, {second.label} "
                        f"fits {second.fits}. Choose the high- and the low-noise file of one model.")
    chosen = _choose_preset(first, preset, experts=True)
    return Model(first, second, chosen, placement or OneAtATime(), dtype, attention, fp8_products=fp8_products)


def add_vace(model: Model, path: str | Path, low: str | Path | None = None) -> Model:
    """`model` with the VACE blocks of a module file; `low` is the low-noise expert's, the same file if not given.

    Raises LoadError where the file is no VACE module, or one for another model.
    """
    if low is not None and not model.preset.experts:
        raise ValueError(f"a second VACE module was given, and {model.preset.title} is a single model. Give one "
                         "module.")
    high = _with_vace(model.high, path)
    same = low is None and model.low is model.high
    preset = replace(model.preset, title=f"{model.preset.title} with VACE")
    return replace(model, high=high, low=high if same else _with_vace(model.low, path if low is None else low),
                   preset=preset)


def _with_vace(part: Part, path: str | Path) -> Part:
    module = open_vace_module(nano.VACE_MODULE if path == NANO else path)
    try:
        spec = with_vace(part.spec, module.shapes())
    except ValueError as error:
        advice = (f"Choose the module of {part.label}" if part.spec.model_type == "t2v" else
                  "Add it to a text-to-video model")
        raise LoadError(f"{module.path.name} {error}. {advice}.") from error
    file = part.file.extended(module)
    try:
        check_tensors(build_module(spec), file)
    except LoadError as error:
        raise LoadError(f"{module.path.name} cannot be added: with it, {error}") from error
    return replace(part, file=file, spec=spec)


def load_text_encoder(path: str | Path = NANO, *, tokenizer: str | Path | None = None,
                      placement: Placement | None = None) -> TextEncoder:
    """A UMT5 encoder, or the bundled one for "nano".

    The tokenizer is the SentencePiece file `tokenizer`, if one is given; else the file's own, a tensor `spiece_model`
    or the vocabulary in a GGUF header; else a `spiece.model` in the encoder's folder, in a folder `tokenizer` beside
    or inside that (as diffusers has it), or in `google/umt5-xxl` inside it (as the official repositories do).
    Raises LoadError if there is none of them, ValueError if the one that is found cannot be used.
    """
    part = Part.open(nano.TEXT_ENCODER if path == NANO else path, "text_encoder")
    return TextEncoder(part, _tokenizer(part, tokenizer), placement or OneAtATime())


def _tokenizer(part: Part, given: str | Path | None) -> Tokenizer:
    if given is not None:
        return Tokenizer.from_file(given)
    if "spiece_model" in part.file:
        return Tokenizer.from_tensor(part.file["spiece_model"])
    if GGUF_PIECES in part.file.header_values:
        return Tokenizer.from_gguf(part.file.header_values, part.label)
    folder = part.file.path.parent
    # By the names in the path, not by where a link leads: a linked folder still has its neighbours.
    places = [Path(os.path.abspath(folder / place)) for place in _SPIECE_FILES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise LoadError(f"{part.label} holds no tokenizer, and there is no {', '.join(_SPIECE_FILES[:-1])} or "
                        f"{_SPIECE_FILES[-1]} in its folder. Give google/umt5-xxl's SentencePiece file (spiece.model) "
                        "or put it beside the encoder; or use ComfyUI's repackaged umt5_xxl file, which has it inside.")
    return Tokenizer.from_file(found)


def load_clip_vision(path: str | Path = NANO, *, placement: Placement | None = None,
                     dtype: str = "auto") -> VisionEncoder:
    """A CLIP vision model, or the bundled one for "nano". Raises LoadError for another file."""
    part = Part.open(nano.CLIP_VISION if path == NANO else path, "clip_vision")
    return VisionEncoder(part, placement or OneAtATime(), dtype)


def load_vae(path: str | Path = NANO, *, placement: Placement | None = None, dtype: str = "auto",
             tiling: Tiling | None = None) -> VideoVAE:
    """A video VAE, or the bundled one for "nano". Raises LoadError for another file."""
    part = Part.open(nano.VAE if path == NANO else path, "vae")
    return VideoVAE(part, placement or OneAtATime(), dtype, tiling)


def _choose_preset(part: Part, wanted: str | None, *, experts: bool) -> Preset:
    fitting = [name for name in part.names if PRESETS[name].experts == experts]
    kind = "pair of experts" if experts else "single model"
    if wanted is not None:
        if wanted not in PRESETS:
            raise ValueError(f"unknown preset {wanted!r}; known are {', '.join(PRESETS)}.")
        if wanted not in fitting:
            raise LoadError(f"{part.label} is no {kind} of preset {wanted}; it fits {', '.join(fitting) or 'none'}.")
        return PRESETS[wanted]
    if not fitting:
        advice = f" Open {'it as a single model' if experts else 'the files of both experts as a pair'}."
        raise LoadError(f"{part.label} fits {part.fits}; there is no {kind} of that architecture."
                        f"{advice if part.names else ''}")
    return PRESETS[fitting[0]]
