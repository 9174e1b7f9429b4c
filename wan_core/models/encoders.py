"""The models around the transformer as values: text encoder, CLIP vision model, video VAE."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..memory import RESIDENT, Layout, Memory, Placement, working_dtype
from ..memory.recovery import made_room
from ..presets import VAES, CLIPVisionSpec, TinyVAESpec, VAESpec
from ..text import Tokenizer, UMT5Encoder, encode_pieces, encode_prompts
from ..vae import StreamingVAE, Tiling
from ..vision import CLIPVision, preprocess
from .part import Part

log = logging.getLogger(__name__)

# Sides of the VAE's tiles in pixels with which it is tried again when memory ran out.
LARGEST_TILE, SMALLEST_TILE = 512, 64


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A UMT5 encoder with its tokenizer; `layout` says where its blocks live."""

    part: Part
    tokenizer: Tokenizer
    placement: Placement
    memory: Memory = Memory()
    layout: Layout = RESIDENT

    def encode(self, prompts: Sequence[str], on_block: Callable[[int], None] | None = None) -> Tensor:
        """Embeddings [B, 512, dim] float32, zero past each prompt's end, on the placement's device."""
        def run(encoder: TextEncoder) -> Tensor:
            return encode_prompts(encoder.module(), self.tokenizer, prompts, self.part.spec.text_len, on_block=on_block)

        return recovering(self, run)

    def encode_rows(self, rows: Sequence[Sequence[tuple[int, float]]],
                    on_block: Callable[[int], None] | None = None) -> Tensor:
        """The same of rows of (token id, weight); see `encode_pieces`."""
        text_len = self.part.spec.text_len
        return recovering(self, lambda encoder: encode_pieces(encoder.module(), rows, text_len, on_block))

    def working(self, prompts: int) -> int:
        """Bytes that encoding so many prompts needs beside the weights, as measured with the released encoder:
        attention's bias and logits, and a matrix in float32; of quantised weights what it is made of, too."""
        spec = self.part.spec
        matrices = 3 if self.part.file.quantised else 1
        return 8 * prompts * spec.num_heads * spec.text_len ** 2 + 4 * matrices * spec.dim * spec.dim_ffn

    def leaner(self) -> "TextEncoder | None":
        """A copy that needs less memory: with all blocks coming and going."""
        swapped = replace(self.layout, swapped=self.part.spec.num_layers)
        return None if self.layout == swapped else replace(self, layout=swapped)

    def module(self) -> UMT5Encoder:
        """The encoder, ready to run. It computes in float32 from weights kept as they are stored."""
        return self.placement.place(self.part, self.part.stored_dtype, self.layout)


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
    """A video VAE, or a tiny one for previews, and how to run it.

    Raises ValueError for an unknown precision or tiles off the grid.
    """

    part: Part
    placement: Placement
    dtype: str = "auto"
    tiling: Tiling | None = None
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        working_dtype(self.dtype, self.part.stored_dtype, self.placement.device)
        if self.tiling:
            self.tiling.check(self.spec.spatial_stride)

    @property
    def spec(self) -> VAESpec | TinyVAESpec:
        return self.part.spec

    def fits(self, spec: VAESpec) -> bool:
        """Whether it knows the latents of a VAE: because it is that VAE, or one for previews of its latents."""
        return self.spec == spec or isinstance(self.spec, TinyVAESpec) and VAES[self.spec.vae] == spec

    @property
    def computes_in(self) -> torch.dtype:
        """The type that it computes in."""
        return working_dtype(self.dtype, self.part.stored_dtype, self.placement.device)

    def module(self) -> StreamingVAE:
        """The VAE, ready to run on the placement's device."""
        return self.placement.place(self.part, self.computes_in).arranged()

    def encode(self, video: Tensor, on_piece: Callable[[], None] | None = None) -> Tensor:
        """Raw latents of video [B, 3, F, H, W] in [-1, 1]; see `WanVAE.encode`.

        If memory runs out it is begun anew in smaller tiles, and so is `decode`.
        """
        return recovering(self, lambda vae: vae.module().encode(video, tiling=vae.tiling, on_piece=on_piece))

    def decode(self, latents: Tensor, out: Tensor | None = None, on_piece: Callable[[], None] | None = None) -> Tensor:
        """Video [B, 3, F, H, W] in [-1, 1] of raw latents; see `WanVAE.decode`."""
        return recovering(self, lambda vae: vae.module().decode(latents, out=out, tiling=vae.tiling, on_piece=on_piece))

    def leaner(self) -> "VideoVAE | None":
        """A copy that needs less memory: with tiles, or smaller ones."""
        side = 2 * LARGEST_TILE if self.tiling is None else min(self.tiling.height, self.tiling.width)
        side = side // 2 // self.spec.spatial_stride * self.spec.spatial_stride
        if side < SMALLEST_TILE:
            return None
        overlap = side // 8 // self.spec.spatial_stride * self.spec.spatial_stride
        return replace(self, tiling=Tiling(side, side, max(self.spec.spatial_stride, overlap)))


Handle = TypeVar("Handle", TextEncoder, VideoVAE)


def recovering(handle: Handle, run: Callable[[Handle], Tensor]) -> Tensor:
    """The result of `run`, begun anew with a leaner copy of the handle whenever memory runs out."""
    while True:
        try:
            return run(handle)
        except Exception as error:
            leaner = handle.leaner() if made_room(error, handle.placement) else None
            if leaner is None:
                raise
            log.warning("Wan: out of memory; %s goes on with %s.", handle.part.label,
                        f"tiles of {leaner.tiling.height} pixels" if isinstance(leaner, VideoVAE) else
                        "its blocks coming and going")
            handle = leaner
