"""Models as values: small handles that say where the weights are and how to run them.

A handle is immutable and cheap. Making one reads a file's header and no weights; they are read when the model first
runs, by the handle's placement. Changed copies (`dataclasses.replace`) share the files and the placement.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import nano
from .dit import WanTransformer, check_backend
from .memory import OneAtATime, Placement, working_dtype
from .presets import PRESETS, VAES, CLIPVisionSpec, Preset, TextEncoderSpec, TransformerSpec, VAESpec, with_vace
from .text import Tokenizer, UMT5Encoder, encode_prompts
from .vae import LatentStats, Tiling, WanVAE
from .vision import CLIPVision, preprocess
from .weights import (
    LoadError,
    TensorFile,
    build_module,
    check_tensors,
    converted,
    load_module,
    open_model,
    open_vace_module,
)
from .weights.lora import Lora, LoraFile, adapt, fold

NANO = "nano"

# Tensors that stay in the dtype of the file: they are small, and computed in float32 whatever the rest runs in.
_FLOAT32_ISLANDS = ("time_embedding.", "time_projection.", "head.", "norm", "modulation")


@dataclass(frozen=True, eq=False)
class Part:
    """One checkpoint: the opened file and the architecture it holds."""

    file: TensorFile
    spec: TransformerSpec | VAESpec | TextEncoderSpec | CLIPVisionSpec
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path, kind: str) -> "Part":
        """Open a 'transformer', 'vae', 'text_encoder' or 'clip_vision'; reads no weights.

        Raises LoadError where the file is something else.
        """
        file, recognition = open_model(path, kind)
        return cls(file, recognition.spec, recognition.names)

    @property
    def label(self) -> str:
        return self.file.path.name

    @property
    def fits(self) -> str:
        """The presets or table entries of this architecture, as words."""
        return ", ".join(self.names) or "no released model"

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that most weights of the file have; a tokenizer's bytes are no weights."""
        shapes, counts = self.file.shapes(), Counter()
        for name, dtype in self.file.dtypes().items():
            if dtype.is_floating_point:
                counts[dtype] += math.prod(shapes[name])
        return counts.most_common(1)[0][0] if counts else torch.float32

    def quantised(self, form: str) -> "Part":
        """A copy whose matrices are quantised when they are read; see `wan_core.weights.converted`."""
        return replace(self, file=converted(self.file, form))

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module on `device`, computing in `dtype`, its weights read from the file."""
        return load_module(build_module(self.spec), self.file, device=device,
                           dtype_for=lambda name, stored: self._kept_in(name, stored, dtype)).eval()

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the weights of the module that `build` makes."""
        stored, shapes = self.file.dtypes(), self.file.shapes()
        return sum(self.file.size(name) if name in self.file.quantised else
                   math.prod(shapes[name]) * self._kept_in(name, stored[name], dtype).itemsize for name in shapes)

    def _kept_in(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """The type of a tensor in a module that computes in `dtype`; for a quantised one, that of its numbers."""
        island = isinstance(self.spec, TransformerSpec) and any(part in name for part in _FLOAT32_ISLANDS)
        # A text encoder computes in float32 from weights kept as they are stored.
        if not island and not isinstance(self.spec, TextEncoderSpec):
            return dtype
        return torch.float32 if name in self.file.quantised else stored


@dataclass(frozen=True, eq=False)
class Model:
    """A transformer, or a high- and a low-noise expert, with its preset and how to run it.

    Raises ValueError for an unknown precision or attention backend.
    """

    high: Part
    low: Part
    preset: Preset
    placement: Placement
    dtype: str = "auto"
    attention: str = "sdpa"
    loras: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        check_backend(self.attention)
        working_dtype(self.dtype, self.low.stored_dtype, self.placement.device)

    @property
    def boundary(self) -> float | None:
        """The sigma at or above which the high-noise expert works; None for a single model."""
        return self.preset.sampling.boundary if self.preset.experts else None

    @property
    def spec(self) -> TransformerSpec:
        return self.low.spec

    @property
    def vae_spec(self) -> VAESpec:
        return VAES[self.preset.vae]

    @property
    def latent_stats(self) -> LatentStats:
        return LatentStats.of(self.vae_spec)

    def quantised(self, form: str) -> "Model":
        """A copy whose matrices are quantised on load: "fp8_scaled", "q8_0" and so on.

        Raises ValueError for an unknown format, or where nothing is left to quantise.
        """
        low = self.low.quantised(form)
        return replace(self, low=low, high=low if self.high is self.low else self.high.quantised(form))

    def name_at(self, timestep: float) -> str:
        """'high' or 'low': which expert works at `timestep` (0..1000). A single model is 'low' throughout."""
        return "high" if self.boundary is not None and timestep >= self.boundary * 1000 else "low"

    def with_lora(self, file: LoraFile, strength: float = 1.0, low: float | None = None, *, start: float = 1.0,
                  end: float = 0.0, blocks: str = "") -> "Model":
        """A copy with one LoRA more, of which `low` is the low-noise expert's strength, if it is another one.

        See `Lora` for the rest. Raises ValueError, before anything is loaded, where the file fits neither expert, or
        where it or its strengths are for a pair of experts and this is a single model.
        """
        if not self.preset.experts and file.experts != ("both",):
            raise LoadError(f"{file.path.name} holds adapters for a high- and a low-noise expert, and "
                            f"{self.preset.title} is a single model. Choose a LoRA for one model, or open both "
                            "experts.")
        if not self.preset.experts and low is not None:
            raise ValueError(f"{file.path.name} is given a strength of its own for low noise, and {self.preset.title} "
                             "is a single model. Give one strength.")
        strengths = {"high": strength, "low": strength if low is None else low}
        parts = {"high": self.high, "low": self.low} if self.preset.experts else {"low": self.low}
        matched = {name: file.match(part.file.shapes(), name if self.preset.experts else None)
                   for name, part in parts.items()}
        return replace(self, loras=(*self.loras, Lora(file, matched, strengths, start, end, blocks)))

    def merged(self) -> "Model":
        """A copy with its LoRAs folded into the weights when these are read, which costs nothing per step.

        LoRAs with a range of noise levels, and those on quantised weights, stay on the activations. `self` is the model
        without the merge, as it was.
        """
        parts = {"high": self.high, "low": self.low} if self.preset.experts else {"low": self.low}
        files, left = fold({name: part.file for name, part in parts.items()}, self.loras)
        low = replace(self.low, file=files["low"])
        return replace(self, low=low, high=replace(self.high, file=files["high"]) if self.preset.experts else low,
                       loras=left)

    def get(self, name: str, sigma: float = 0.0) -> WanTransformer:
        """The expert, ready to run on the placement's device at a noise level; until the next call of any copy."""
        part = self.high if name == "high" else self.low
        module = self.placement.place(part, working_dtype(self.dtype, part.stored_dtype, self.placement.device))
        adapt(module, self.loras, name, sigma)
        return module

    def state(self, name: str, sigma: float) -> Hashable:
        """Equal for noise levels at which `get` gives the same weights."""
        return name, tuple(lora.strength_at(name, sigma) for lora in self.loras)

    def check_latents(self, latents: Tensor) -> None:
        """Raise ValueError unless `latents` [B, C, T, H, W] fit this model, before anything is loaded."""
        channels = self.vae_spec.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; {self.preset.title} takes "
                             f"[batch, {channels}, frames, height, width]. Use latents of the same family.")
        if latents.shape[3] % 2 or latents.shape[4] % 2:
            pixels = [size * self.vae_spec.spatial_stride for size in (latents.shape[4], latents.shape[3])]
            raise ValueError(f"latents stand for {pixels[0]}x{pixels[1]} pixels; width and height must be multiples of "
                             f"{2 * self.vae_spec.spatial_stride}.")
        if not latents.isfinite().all():
            raise ValueError("the latents hold NaN or infinite values; look for where they come from (often a VAE that "
                             "overflows in float16).")

    def check_context(self, context: Tensor) -> None:
        """Raise ValueError unless the text embedding [B, L, width] is finite and as wide as the model's text input."""
        if context.shape[-1] != self.spec.text_dim:
            raise ValueError(f"the prompt was encoded to a width of {context.shape[-1]}, {self.preset.title} takes "
                             f"{self.spec.text_dim}. Use the text encoder {self.preset.text_encoder}.")
        if not context.isfinite().all():
            raise ValueError("the prompt was encoded to NaN or infinite values; use another precision for the text "
                             "encoder.")


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A UMT5 encoder with its tokenizer."""

    part: Part
    tokenizer: Tokenizer
    placement: Placement

    def encode(self, prompts: Sequence[str], on_block: Callable[[int], None] | None = None) -> Tensor:
        """Embeddings [B, 512, dim] float32, zero past each prompt's end, on the placement's device."""
        return encode_prompts(self.module(), self.tokenizer, prompts, self.part.spec.text_len, on_block=on_block)

    def module(self) -> UMT5Encoder:
        """The encoder, ready to run. It computes in float32 from weights kept as they are stored."""
        return self.placement.place(self.part, self.part.stored_dtype)


@dataclass(frozen=True, eq=False)
class VisionEncoder:
    """A CLIP vision model and how to run it. Raises ValueError for an unknown precision."""

    part: Part
    placement: Placement
    dtype: str = "auto"

    def __post_init__(self) -> None:
        working_dtype(self.dtype, self.part.stored_dtype, self.placement.device)

    @property
    def spec(self) -> CLIPVisionSpec:
        return self.part.spec

    def module(self) -> CLIPVision:
        """The encoder, ready to run on the placement's device."""
        return self.placement.place(self.part, working_dtype(self.dtype, self.part.stored_dtype, self.placement.device))

    @torch.no_grad()
    def encode(self, image: Tensor, crop: str = "none", on_block: Callable[[int], None] | None = None) -> Tensor:
        """Image tokens [B, tokens, dim] float32 of pictures [B, 3, H, W] in [-1, 1], on the placement's device.

        See `preprocess` for `crop`, and `CLIPVision.forward`.
        """
        pixels = preprocess(image, self.spec.image_size, crop)
        return self.module()(pixels.to(self.placement.device), on_block)


@dataclass(frozen=True, eq=False)
class VideoVAE:
    """A video VAE and how to run it. Raises ValueError for an unknown precision or tiles off the grid."""

    part: Part
    placement: Placement
    dtype: str = "auto"
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        working_dtype(self.dtype, self.part.stored_dtype, self.placement.device)
        if self.tiling:
            self.tiling.check(self.spec.spatial_stride)

    @property
    def spec(self) -> VAESpec:
        return self.part.spec

    def module(self) -> WanVAE:
        """The VAE, ready to run on the placement's device."""
        return self.placement.place(self.part, working_dtype(self.dtype, self.part.stored_dtype, self.placement.device))

    def encode(self, video: Tensor, on_piece: Callable[[], None] | None = None) -> Tensor:
        """Raw latents of video [B, 3, F, H, W] in [-1, 1]; see `WanVAE.encode`."""
        return self.module().encode(video, tiling=self.tiling, on_piece=on_piece)

    def decode(self, latents: Tensor, out: Tensor | None = None, on_piece: Callable[[], None] | None = None) -> Tensor:
        """Video [B, 3, F, H, W] in [-1, 1] of raw latents; see `WanVAE.decode`."""
        return self.module().decode(latents, out=out, tiling=self.tiling, on_piece=on_piece)


def load_model(path: str | Path = NANO, *, preset: str | None = None, placement: Placement | None = None,
               dtype: str = "auto", attention: str = "sdpa") -> Model:
    """A single transformer from a file, or a bundled one: "nano" (text to video), "nano-i2v" or "nano-ti2v".

    `preset` picks among the presets that share the file's architecture (T2V-14B or one expert of A14B, say).
    Raises LoadError if the file is none of them.
    """
    part = Part.open(nano.NAMES.get(str(path), path), "transformer")
    chosen = _choose_preset(part, preset, experts=False)
    return Model(part, part, chosen, placement or OneAtATime(), dtype, attention)


def load_experts(high: str | Path = NANO, low: str | Path = NANO, *, preset: str | None = None,
                 placement: Placement | None = None, dtype: str = "auto", attention: str = "sdpa") -> Model:
    """A pair of experts from two files, or the bundled pair for "nano". Raises LoadError if they do not match."""
    first = Part.open(nano.T2V_HIGH if high == NANO else high, "transformer")
    second = Part.open(nano.T2V_LOW if low == NANO else low, "transformer")
    if first.spec != second.spec:
        raise LoadError(f"the experts are of different architectures: {first.label} fits {first.fits}, {second.label} "
                        f"fits {second.fits}. Choose the high- and the low-noise file of one model.")
    chosen = _choose_preset(first, preset, experts=True)
    return Model(first, second, chosen, placement or OneAtATime(), dtype, attention)


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

    The tokenizer is the file's own `spiece_model` tensor, else a `spiece.model` beside it, unless a SentencePiece file
    is given. Raises LoadError if there is none of them.
    """
    part = Part.open(nano.TEXT_ENCODER if path == NANO else path, "text_encoder")
    beside = part.file.path.with_name("spiece.model")
    if tokenizer is not None:
        pieces = Tokenizer.from_file(tokenizer)
    elif "spiece_model" in part.file:
        pieces = Tokenizer.from_tensor(part.file["spiece_model"])
    elif beside.is_file():
        pieces = Tokenizer.from_file(beside)
    else:
        raise LoadError(f"{part.label} holds no tokenizer. Give the SentencePiece file of google/umt5-xxl "
                        "(spiece.model), or use ComfyUI's repackaged umt5_xxl file, which has it inside.")
    return TextEncoder(part, pieces, placement or OneAtATime())


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
