"""Pictures as a clip's known frames: channels behind the noisy latents, and CLIP features for cross-attention.

The models of Wan 2.1 I2V and FLF2V and Wan 2.2 I2V-A14B take 20 more channels: a mask of four (one for each frame that
a latent frame stands for) which says where the video is known, and the latents of a clip that holds the known frames
and is grey elsewhere. The 2.1 models also take CLIP features of the first (and last) picture.
Reference: Wan2.1 `wan/image2video.py` and `wan/first_last_frame2video.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dit import ModelInputs, WanTransformer
from ..presets import TransformerSpec
from ..vae import LatentStats
from .condition import check_room, check_tensor, to_batch

MASK_CHANNELS = 4


@dataclass(frozen=True, eq=False)
class KnownFrames:
    """A clip of which some frames are known, encoded.

    `latents` [1, C, T, H, W] as the VAE makes them, not normalised; `mask` [1, 4, T, H, W] with 1 for each known
    frame of the four that a latent frame stands for (the clip's first frame counts four times).
    """

    latents: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class ImageChannels:
    """`channels` [B, 4 + C, T, H, W]: the mask of what is known (1 known), and normalised latents."""

    channels: Tensor

    @classmethod
    def of(cls, known: KnownFrames, stats: LatentStats) -> "ImageChannels":
        """From an encoded clip. Raises ValueError where mask and latents differ in size."""
        latents, mask = known.latents.float(), known.mask.float()
        if mask.shape[1] != MASK_CHANNELS or mask.shape[2:] != latents.shape[2:]:
            raise ValueError(f"the mask of known frames has shape {list(mask.shape)}; expected [batch, "
                             f"{MASK_CHANNELS}, {', '.join(map(str, latents.shape[2:]))}], as the latents have.")
        return cls(torch.cat([mask.to(latents.device).expand(latents.shape[0], *mask.shape[1:]),
                              stats.normalise(latents)], 1))

    @classmethod
    def nothing_known(cls, spec: TransformerSpec, shape: tuple[int, ...]) -> "ImageChannels":
        """What a model gets that takes pictures and is given none, for latents of `shape` [B, C, T, H, W]."""
        return cls(torch.zeros(1, spec.in_dim - shape[1], *shape[2:]))

    def check(self, spec: TransformerSpec, shape: tuple[int, ...]) -> None:
        """See `Condition.check`."""
        extra = spec.in_dim - shape[1]
        if not extra:
            raise ValueError("the prompt carries a start or end image, and this model takes none through its channels. "
                             "Use an image-to-video model (for TI2V 5B: Wan Image Latent, which puts the picture into "
                             "the latent), or remove the image.")
        expected = (extra, *shape[2:])
        if self.channels.shape[1:] != expected:
            raise ValueError(f"image conditioning has shape {list(self.channels.shape)}; this model and these latents "
                             f"take [batch, {', '.join(map(str, expected))}]. Make it for the video's width, height "
                             "and length.")
        check_tensor("image conditioning", self.channels, shape[0])

    def prepare(self, model: WanTransformer, sample: Tensor) -> Tensor:
        """See `Condition.prepare`."""
        return to_batch(self.channels, sample)

    def add(self, inputs: ModelInputs, prepared: Tensor, sigma: float) -> ModelInputs:
        """See `Condition.add`."""
        return replace(inputs, latents=torch.cat([inputs.latents, prepared], 1))


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """`features` [B, N, image_dim] of a CLIP vision model; those of a start and an end image one after the other."""

    features: Tensor

    def check(self, spec: TransformerSpec, shape: tuple[int, ...]) -> None:
        """See `Condition.check`."""
        if not spec.image_dim:
            raise ValueError("the prompt carries CLIP vision features, and this model takes none. Leave them away.")
        if self.features.ndim != 3 or self.features.shape[2] != spec.image_dim or not self.features.numel():
            raise ValueError(f"CLIP vision features have shape {list(self.features.shape)}; this model takes [batch, "
                             f"tokens, {spec.image_dim}]. Use the CLIP vision model that belongs to it.")
        if spec.model_type == "flf2v" and self.features.shape[1] > spec.image_tokens:
            raise ValueError(f"{self.features.shape[1]} CLIP vision tokens were given, and this model takes "
                             f"{spec.image_tokens}: a start and an end image.")
        check_tensor("a CLIP vision output", self.features, shape[0])

    def prepare(self, model: WanTransformer, sample: Tensor) -> Tensor:
        """See `Condition.prepare`."""
        return model.prepare_image(to_batch(self.features, sample))

    def add(self, inputs: ModelInputs, prepared: Tensor, sigma: float) -> ModelInputs:
        """See `Condition.add`."""
        return replace(inputs, image=prepared)


def encode_known_frames(encode: Callable[[Tensor], Tensor], frames: int, start: Tensor | None,
                        end: Tensor | None) -> KnownFrames:
    """A clip of `frames` pictures whose first and last ones are given, the others grey, through the VAE.

    `start` and `end` [k, 3, H, W] in [-1, 1] hold one or more frames each; `encode` takes [1, 3, F, H, W]. Raises
    ValueError, before anything is encoded, where neither is given, they differ in size or have no room.
    """
    given = [part for part in (start, end) if part is not None]
    if not given:
        raise ValueError("neither a start nor an end image was given; give one of them, or use a text-to-video model.")
    for part in given:
        if part.ndim != 4 or part.shape[1] != 3 or part.shape[2:] != given[0].shape[2:]:
            raise ValueError(f"start and end images must be [frames, 3, height, width] of one size, got "
                             f"{' and '.join(str(list(p.shape)) for p in given)}.")
    first, last = (0 if part is None else part.shape[0] for part in (start, end))
    check_room(frames, first, last)
    clip = torch.zeros(frames, *given[0].shape[1:])
    known = torch.zeros(frames)
    if start is not None:
        clip[:first], known[:first] = start, 1
    if end is not None:
        clip[frames - last:], known[frames - last:] = end, 1
    latents = encode(clip.movedim(0, 1).unsqueeze(0))
    repeated = torch.cat([known[:1].expand(MASK_CHANNELS - 1), known])
    mask = repeated.view(-1, MASK_CHANNELS).t()[None, :, :, None, None]
    return KnownFrames(latents, mask.expand(1, MASK_CHANNELS, *latents.shape[2:]))
