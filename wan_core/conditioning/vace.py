"""VACE: a control video, masks and reference images as 96 channels beside the video.

Where the mask is 0 the video is kept (its inactive part), where it is 1 it is made anew, led by what the control shows
there (its reactive part). Both parts are encoded, 16 channels each, and the mask's 8x8 pixels become 64 channels.
Reference images are latent frames of their own in front of the clip, to be trimmed from the result.
Reference: Wan2.1 `wan/vace.py` (vace_encode_frames, vace_encode_masks, vace_latent).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dit import ModelInputs, VaceControl, WanTransformer
from ..presets import TransformerSpec
from ..vae import LatentStats
from .condition import SigmaRange, check_tensor, to_batch


@dataclass(frozen=True, eq=False)
class ControlLatents:
    """An encoded control.

    `frames` [1, 2 * C, R + T, H, W]: inactive, then reactive latents as the VAE makes them, not normalised, with R
    reference frames in front (the reactive part of a reference is the latent that is zero when normalised). `mask`
    [1, 64, R + T, H, W], 1 where the video is made anew.
    """

    frames: Tensor
    mask: Tensor
    references: int = 0


@dataclass(frozen=True, eq=False)
class VaceCondition:
    """`control` [B, 96, T, H, W], normalised; hints are added times `strength` at the noise levels of `sigmas`."""

    control: Tensor
    strength: float = 1.0
    sigmas: SigmaRange = field(default_factory=SigmaRange)

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"the strength of a VACE control is {self.strength}; expected a number, 1 for full.")

    @classmethod
    def of(cls, latents: ControlLatents, stats: LatentStats, strength: float = 1.0,
           sigmas: SigmaRange | None = None) -> "VaceCondition":
        """From an encoded control. Raises ValueError where frames and mask differ in size or another VAE made them."""
        frames, mask = latents.frames.float(), latents.mask.float()
        channels = 2 * len(stats.mean)
        if frames.ndim != 5 or frames.shape[1] != channels or frames.shape[2:] != mask.shape[2:]:
            raise ValueError(f"VACE frames have shape {list(frames.shape)} and their mask {list(mask.shape)}; frames, "
                             f"height and width must be equal, and the frames have {channels} channels. Encode them "
                             "with the model's VAE.")
        halves = [stats.normalise(half) for half in frames.chunk(2, 1)]
        mask = mask.to(frames.device).expand(frames.shape[0], *mask.shape[1:])
        return cls(torch.cat([*halves, mask], 1), strength, sigmas or SigmaRange())

    def check(self, spec: TransformerSpec, shape: tuple[int, ...]) -> None:
        """See `Condition.check`."""
        if spec.model_type != "vace":
            raise ValueError("the prompt carries a VACE control, and this model has no VACE blocks. Use a VACE model, "
                             "or add a VACE module to this one.")
        expected = (spec.vace_in_dim, *shape[2:])
        if self.control.shape[1:] != expected:
            raise ValueError(f"a VACE control has shape {list(self.control.shape)}; this model and these latents take "
                             f"[batch, {', '.join(map(str, expected))}]. Its frames, the reference images among them, "
                             "must be as many as the latent's.")
        check_tensor("a VACE control", self.control, shape[0])

    def prepare(self, model: WanTransformer, sample: Tensor) -> Tensor:
        """See `Condition.prepare`."""
        return to_batch(self.control, sample)

    def add(self, inputs: ModelInputs, prepared: Tensor, sigma: float) -> ModelInputs:
        """See `Condition.add`."""
        if not self.sigmas.holds(sigma):
            return inputs
        return replace(inputs, controls=(*inputs.controls, VaceControl(prepared, self.strength)))


def encode_control(encode: Callable[[Tensor], Tensor], stats: LatentStats, stride: int, video: Tensor,
                   mask: Tensor | None = None, references: Sequence[Tensor] = ()) -> ControlLatents:
    """A control video through the VAE, its mask and reference images with it.

    `video` [3, F, H, W] in [-1, 1] (0 where nothing is given), `mask` [1, F, H, W] in 0..1, 1 where the video is made
    anew (everywhere, if not given), `references` [3, 1, H, W] each. `encode` takes [1, 3, F, H, W]; `stride` is pixels
    per latent pixel. Raises ValueError for sizes that differ, before anything is encoded.
    """
    if mask is None:
        mask = torch.ones(1, *video.shape[1:])
    for name, tensor, shape in (("the mask", mask, (1, *video.shape[1:])),
                                *(("a reference image", image, (3, 1, *video.shape[2:])) for image in references)):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {list(tensor.shape)}; with a control video of {list(video.shape)} it "
                             f"must be {list(shape)}.")
    # Officially the mask is rounded for the frames and goes to its own channels as it is.
    change = (mask > 0.5).to(video.dtype)
    parts = [encode((video * share).unsqueeze(0)) for share in (1 - change, change)]
    frames = torch.cat(parts, 1)
    folded = mask_channels(mask, stride, frames.shape[2])
    if references:
        images = torch.cat([encode(image.unsqueeze(0)) for image in references], 2)
        empty = stats.restore(torch.zeros_like(images))
        frames = torch.cat([torch.cat([images, empty], 1), frames], 2)
        folded = F.pad(folded, (0, 0, 0, 0, len(references), 0))
    return ControlLatents(frames, folded, len(references))


def mask_channels(mask: Tensor, stride: int, latent_frames: int) -> Tensor:
    """A mask [1, F, H, W] as [1, stride^2, T, H / stride, W / stride]: pixels to channels, frames by the nearest."""
    _, frames, height, width = mask.shape
    pixels = mask.view(frames, height // stride, stride, width // stride, stride)
    channels = pixels.permute(2, 4, 0, 1, 3).flatten(0, 1).unsqueeze(0)
    return F.interpolate(channels, (latent_frames, height // stride, width // stride), mode="nearest-exact")
