"""The models around the transformer as values: text encoder, CLIP vision model, video VAE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import Placement, working_dtype
from ..presets import CLIPVisionSpec, VAESpec
from ..text import Tokenizer, UMT5Encoder, encode_prompts
from ..vae import Tiling, WanVAE
from ..vision import CLIPVision, preprocess
from .part import Part


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
