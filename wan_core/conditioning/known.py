"""Latents that are known in part: noise masks, and the first frame of TI2V.

Where the mask is 0 the result is what is known; elsewhere the video is made. Most models get the known part at the
noise level of the step, mixed from the run's own noise (inpainting as in ComfyUI's KSamplerX0Inpaint). TI2V 5B was
trained to see it clean, at timestep 0 (Wan2.2 `wan/textimage2video.py`, which blends before the loop and after each
step).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .condition import check_room


@dataclass(frozen=True, eq=False)
class KnownLatents:
    """`latents` [B, C, T, H, W], normalised and clean; `mask` [B, 1, T, H, W] in 0..1, 0 where they are kept.

    `noise`, of the latents' shape, brings the known part to the noise level of a step; None leaves it clean, and frames
    then have timesteps of their own. Raises ValueError for sizes that differ or a mask with other values.
    """

    latents: Tensor
    mask: Tensor
    noise: Tensor | None

    def __post_init__(self) -> None:
        expected = (self.latents.shape[0], 1, *self.latents.shape[2:])
        if tuple(self.mask.shape) != expected:
            raise ValueError(f"the noise mask has shape {list(self.mask.shape)}; expected {list(expected)} for these "
                             "latents.")
        if not 0 <= self.mask.min() <= self.mask.max() <= 1:
            raise ValueError("a noise mask holds values from 0 (kept) to 1 (made anew), got "
                             f"{self.mask.min():g} to {self.mask.max():g}.")

    def to(self, device: torch.device) -> "KnownLatents":
        """A copy on `device`."""
        noise = None if self.noise is None else self.noise.to(device)
        return KnownLatents(self.latents.to(device), self.mask.to(device), noise)

    def blend(self, sample: Tensor, sigma: float) -> Tensor:
        """`sample` with the known part put in at noise level `sigma`."""
        known = self.latents
        if self.noise is not None and sigma > 0:
            known = torch.lerp(known, self.noise, sigma)
        return torch.lerp(known, sample, self.mask)

    def timesteps(self, timestep: Tensor) -> Tensor:
        """`timestep` [B] as it is, or for a clean known part [B, T]: in each frame the share that is made anew."""
        if self.noise is not None:
            return timestep
        return timestep[:, None] * self.mask.mean((1, 3, 4)).to(timestep.device)

    def steer(self, velocity: Tensor, sample: Tensor, sigma: float) -> Tensor:
        """`velocity` with the known part moving straight to what is known, so that the solver's history agrees."""
        return torch.lerp((sample - self.latents) / sigma, velocity, self.mask)


def known_start(encode: Callable[[Tensor], Tensor], latents: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """`latents` [B, C, T, H, W] whose first frames are `start` [k, 3, H, W] in [-1, 1], and the mask that keeps them.

    `encode` takes [1, 3, F, H, W] and gives raw latents, as `latents` are. Frames beyond the last whole latent frame of
    four are left away: they cannot be kept as they are. Raises ValueError, before anything is encoded, if there are
    more frames than `latents` have room for.
    """
    frames = 1 + (latents.shape[2] - 1) * 4
    check_room(frames, len(start))
    known = encode(start[:1 + (len(start) - 1) // 4 * 4].movedim(0, 1)[None])
    latents, mask = latents.clone(), torch.ones(latents.shape[0], 1, *latents.shape[2:])
    latents[:, :, :known.shape[2]] = known
    mask[:, :, :known.shape[2]] = 0
    return latents, mask
