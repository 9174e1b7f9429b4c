"""Latent statistics of a VAE: the transformer works on latents of zero mean and unit variance per channel.

ComfyUI's LATENT sockets and our VAE speak un-normalised latents; the sampler converts at its edges. Figures:
`VAESpec.mean` and `.std` (Wan2.1 `wan/modules/vae.py`, class WanVAE).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..presets import TinyVAESpec, VAESpec


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation per latent channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, spec: VAESpec | TinyVAESpec) -> "LatentStats":
        return cls(spec.mean, spec.std)

    def normalise(self, latents: Tensor) -> Tensor:
        """[B, C, ...] as the VAE makes them -> zero mean, unit variance."""
        mean, std = self._columns(latents)
        return (latents - mean) / std

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._columns(latents)
        return latents * std + mean

    def _columns(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.shape[1] != len(self.mean):
            raise ValueError(f"latents have {latents.shape[1]} channels, the model's VAE {len(self.mean)}: use latents "
                             "and a VAE of the same family.")
        shape = (1, -1) + (1,) * (latents.ndim - 2)
        return (torch.tensor(self.mean, dtype=latents.dtype, device=latents.device).view(shape),
                torch.tensor(self.std, dtype=latents.dtype, device=latents.device).view(shape))
