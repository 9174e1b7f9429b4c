"""Our text encoder, CLIP vision model and VAE in the shape of ComfyUI's objects, so that the core's nodes take them.

A socket's type is a name and the core calls a few methods of what comes through it; these classes have those methods
and no others. Value ranges are the core's: IMAGE [F, H, W, 3] in 0..1, LATENT [B, C, T, h, w] as the VAE makes it, not
normalised, and CONDITIONING with [1, 512, width] embeddings, zero past the prompt's end.
Reference: ComfyUI's `nodes.py`, `comfy/sd.py` and `comfy/clip_vision.py`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..wan_core.conditioning import check_values
from ..wan_core.forecast import fitted, fitted_encoder
from ..wan_core.models import TextEncoder, VideoVAE, VisionEncoder
from ..wan_core.presets import PRESETS
from ..wan_core.text import weighted_pieces
from ..wan_core.text.tokenizer import EOS_ID, PAD_ID
from ..wan_core.vae import Tiling
from .host import HOST, Advance

log = logging.getLogger(__name__)

# The name under which ComfyUI keeps the tokens of this encoder.
TOKENS = "umt5xxl"
Tokens = dict[str, list[list[tuple[int, float]]]]

# What the CLIP vision model needs beside its weights, in float32 copies of its widest layer: what goes into and comes
# out of the activation, the residual and its norms.
CLIP_VISION_COPIES = 4


@dataclass(frozen=True, eq=False)
class ComfyTextEncoder:
    """ComfyUI's CLIP socket on a `TextEncoder`."""

    encoder: TextEncoder

    @property
    def negative_prompt(self) -> str:
        """The official negative prompt of the models that this encoder belongs to."""
        return next((preset.sampling.negative_prompt for preset in PRESETS.values()
                     if preset.text_encoder in self.encoder.part.names), "")

    def tokenize(self, text: str, return_word_ids: bool = False, **_options: object) -> Tokens:
        """Token ids with weights, the end of the prompt included; word ids are not offered."""
        return {TOKENS: [[*weighted_pieces(self.encoder.tokenizer, text), (EOS_ID, 1.0)]]}

    def encode_from_tokens_scheduled(self, tokens: Tokens, unprojected: bool = False, add_dict: dict | None = None,
                                     show_pbar: bool = True) -> list:
        """CONDITIONING. UMT5 has no pooled output and no projection."""
        return [[self.encode_from_tokens(tokens), {"pooled_output": None, **(add_dict or {})}]]

    def encode_from_tokens(self, tokens: Tokens, return_pooled: bool = False,
                           return_dict: bool = False) -> Tensor | tuple[Tensor, None] | dict:
        """Embeddings [1, 512, width] float32, zero past the prompt's end."""
        rows = [[piece for piece in row if piece[0] not in (EOS_ID, PAD_ID)] for row in tokens[TOKENS]]
        encoder = HOST.with_room(fitted_encoder(self.encoder), self.encoder.working(len(rows)))
        embeddings = encoder.encode_rows(rows, lambda block: HOST.check_interrupt()).to(HOST.result_device())
        if return_dict:
            return {"cond": embeddings, "pooled_output": None}
        return (embeddings, None) if return_pooled else embeddings

    def encode(self, text: str) -> Tensor:
        """`tokenize` and `encode_from_tokens`."""
        return self.encode_from_tokens(self.tokenize(text))

    def clone(self) -> "ComfyTextEncoder":
        """A copy; nothing on it can be changed, so it is as good as this one."""
        return replace(self)

    def __getattr__(self, name: str) -> object:
        # LoRA, layer and hook nodes reach for more than a text encoder of this pack has.
        raise AttributeError(f"Wan Text Encoder Loader gives a plain UMT5 encoder without {name!r}: nodes that patch a "
                             "CLIP model do not work on it. Connect it to a text encode node, or use ComfyUI's Load "
                             "CLIP for them.")


@dataclass(frozen=True, eq=False)
class CLIPVisionOutput:
    """What ComfyUI's CLIP_VISION_OUTPUT holds, read as attributes or by key.

    Wan's nodes read `penultimate_hidden_states` [B, tokens, dim] alone. `last_hidden_state` has the same shape,
    `image_embeds` is [B, width of CLIP's joint space]; `mm_projected` belongs to other models. All float32.
    """

    penultimate_hidden_states: Tensor
    last_hidden_state: Tensor
    image_embeds: Tensor
    mm_projected: None = None

    def __getitem__(self, name: str) -> Tensor | None:
        return getattr(self, name)


@dataclass(frozen=True, eq=False)
class ComfyCLIPVision:
    """ComfyUI's CLIP_VISION socket on a `VisionEncoder`."""

    encoder: VisionEncoder

    def encode_image(self, image: Tensor, crop: bool = True) -> CLIPVisionOutput:
        """Features of pictures [B, H, W, 3] in 0..1; `crop` takes the middle of each, without it they are squashed.

        Pictures are resized as in the official code, where the core's own class filters them before and rounds them to
        eight bits after it.
        """
        check_pictures(image)
        spec = self.encoder.spec
        tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        encoder = HOST.with_room(self.encoder, len(image) * tokens * spec.mlp_dim * 4 * CLIP_VISION_COPIES)
        pictures = image[..., :3].movedim(-1, 1) * 2 - 1
        hidden = encoder.encode(pictures, "center" if crop else "none", lambda block: HOST.check_interrupt())
        with torch.no_grad():
            last, embedding = encoder.module().project(hidden)
        return CLIPVisionOutput(*(tensor.to(HOST.result_device()) for tensor in (hidden, last, embedding)))


@dataclass(frozen=True, eq=False)
class ComfyVAE:
    """ComfyUI's VAE socket on a `VideoVAE`."""

    vae: VideoVAE
    latent_dim = 3

    @property
    def latent_channels(self) -> int:
        return self.vae.spec.z_dim

    def spacial_compression_decode(self) -> int:
        """Pixels per latent pixel. The core spells it so."""
        return self.vae.spec.spatial_stride

    def spacial_compression_encode(self) -> int:
        """Pixels per latent pixel."""
        return self.vae.spec.spatial_stride

    def temporal_compression_decode(self) -> int:
        """Frames per latent frame."""
        return self.vae.spec.temporal_stride

    def throw_exception_if_invalid(self) -> None:
        """Does nothing: an invalid file was refused when it was opened."""

    def get_sd(self) -> dict[str, Tensor]:
        """The weights as they are stored, for VAE Save."""
        return dict(self.vae.part.file)

    def decode(self, samples: Tensor, vae_options: dict | None = None) -> Tensor:
        """IMAGE frames [B, F, H, W, 3] of raw latents [B, C, T, h, w]."""
        return self._decode(self.vae, samples)

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None,
                     overlap: int | None = None, tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """`decode` in tiles of the given size in latent pixels. Tiles in time are not needed: pieces follow another."""
        return self._decode(replace(self.vae, tiling=self._tiling(tile_x, tile_y, overlap, 1)), samples)

    def encode(self, pixels: Tensor) -> Tensor:
        """Raw latents [1, C, T, h, w] of one clip [F, H, W, 3], or [B, C, T, h, w] of clips [B, F, H, W, 3]."""
        return self._encode(self.vae, pixels)

    def encode_tiled(self, pixels: Tensor, tile_x: int | None = None, tile_y: int | None = None,
                     overlap: int | None = None, tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """`encode` in tiles of the given size in pixels. Tiles in time are not needed: pieces follow one another."""
        tiling = self._tiling(tile_x, tile_y, overlap, self.vae.spec.spatial_stride)
        return self._encode(replace(self.vae, tiling=tiling), pixels)

    def _decode(self, vae: VideoVAE, samples: Tensor) -> Tensor:
        if samples.ndim != 5 or samples.shape[1] != vae.spec.z_dim:
            raise ValueError(f"the latent has shape {list(samples.shape)}; {vae.part.label} decodes [batch, "
                             f"{vae.spec.z_dim}, frames, height, width]. Connect the latent of a Wan sampler.")
        batch, _, latent_frames, height, width = samples.shape
        stride, step = vae.spec.spatial_stride, vae.spec.temporal_stride
        frames = torch.empty((batch, 1 + (latent_frames - 1) * step, height * stride, width * stride, 3),
                             device=HOST.result_device())
        vae = self._with_room(vae, tuple(samples.shape))
        tiles = vae.tiling.count(height, width, stride) if vae.tiling else 1
        with HOST.progress(tiles * latent_frames, "Wan decode") as advance:
            vae.decode(samples.float(), out=frames.movedim(-1, 1), on_piece=_counted(advance))
        return frames.add_(1).mul_(0.5)

    def _encode(self, vae: VideoVAE, pixels: Tensor) -> Tensor:
        if pixels.ndim not in (4, 5) or pixels.shape[-1] < 3:
            raise ValueError(f"the image has shape {list(pixels.shape)}; expected frames [frames, height, width, 3].")
        clips = self._on_grid(pixels if pixels.ndim == 5 else pixels[None])[..., :3].movedim(-1, 1)
        batch, _, frames, height, width = clips.shape
        stride, step = vae.spec.spatial_stride, vae.spec.temporal_stride
        shape = (batch, vae.spec.z_dim, 1 + (frames - 1) // step, height // stride, width // stride)
        vae = self._with_room(vae, shape, encode=True)
        tiles = vae.tiling.count(height // stride, width // stride, stride) if vae.tiling else 1
        with HOST.progress(tiles * (1 + (frames - 1) // step), "Wan encode") as advance:
            latents = vae.encode(clips * 2 - 1, on_piece=_counted(advance))
        return latents.to(HOST.result_device())

    def _on_grid(self, clips: Tensor) -> Tensor:
        """Clips [B, F, H, W, C] cut, as the core does it, to 4n + 1 frames and to the middle of the VAE's grid."""
        stride, step = self.vae.spec.spatial_stride, self.vae.spec.temporal_stride
        _, frames, height, width, _ = clips.shape
        kept = 1 + (frames - 1) // step * step, height // stride * stride, width // stride * stride
        if kept != (frames, height, width):
            log.warning("Wan: %d frames of %dx%d are cut to %d frames of %dx%d, which the VAE can take.",
                        frames, width, height, kept[0], kept[2], kept[1])
        top, left = (height - kept[1]) // 2, (width - kept[2]) // 2
        return clips[:, :kept[0], top:top + kept[1], left:left + kept[2]]

    def _tiling(self, width: int | None, height: int | None, overlap: int | None, unit: int) -> Tiling | None:
        """Tiling from sizes of which `unit` make one latent pixel, brought to what the VAE accepts.

        Without sizes, what is set on the VAE.
        """
        if not width and not height:
            return self.vae.tiling
        stride = self.vae.spec.spatial_stride
        columns, rows = (max(2, (size or width or height) // unit) for size in (width, height))
        shared = min(max(1, (overlap or 0) // unit), min(columns, rows) // 2)
        return Tiling(rows * stride, columns * stride, shared * stride)

    def _with_room(self, vae: VideoVAE, shape: tuple[int, ...], encode: bool = False) -> VideoVAE:
        """The VAE in tiles that fit what is free, and with that room asked for."""
        vae, peak = fitted(vae, shape, encode)
        return HOST.with_room(vae, max(0, peak - vae.part.size(vae.computes_in)))


def check_pictures(image: Tensor) -> None:
    """Raise ValueError unless `image` is an IMAGE [B, H, W, 3], or with alpha besides, in about 0..1."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"the image has shape {list(image.shape)}; expected pictures [batch, height, width, 3].")
    if not image.is_floating_point():
        raise ValueError(f"the image holds {str(image.dtype).removeprefix('torch.')}; expected floating-point numbers "
                         "from 0 to 1.")
    check_values("the image", image, 0, 1)


def _counted(advance: Advance) -> Callable[[], None]:
    def on_piece() -> None:
        advance()
        HOST.check_interrupt()

    return on_piece
