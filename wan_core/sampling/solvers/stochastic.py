"""The solver that begins anew from fresh noise at every step, for models distilled to jump to the clean latent.

Consistency models and those of distribution matching (LCM, DMD, Self-Forcing, CausVid, FastWan, rCM) are trained on
exact mixtures of a clean latent with noise, so each step makes one: x = (1 - sigma) * clean estimate + sigma * noise.
References: Luo et al. 2023, arXiv:2310.04378 (LCM); Zheng et al. 2025, arXiv:2510.08431 (rCM), whose sampler has the
same form once its angles are turned into sigmas.
"""

import hashlib

import torch
from torch import Tensor

from .base import Solver


class LCM(Solver):
    """The clean estimate, noised again to the next sigma.

    The noise belongs to the seed and to the sigma that is reached, not to the number of the step: so a step that is
    repeated, a run that was interrupted and a run in two parts all see the same, on every device.
    """

    name = "lcm"
    remembers = 0
    draws_noise = True

    def _advance(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        clean, after = sample - self._sigmas[index] * velocity, self._sigmas[index + 1]
        return clean if after == 0 else (1 - after) * clean + after * self._noise(after, sample)

    def _noise(self, sigma: float, like: Tensor) -> Tensor:
        # Seeds with and without a sign are one, as in PyTorch's generators. Plain sums of seed and step would meet the
        # noise of neighbouring seeds; the digest keeps them apart, and apart from the noise that the run began with.
        digest = hashlib.sha256(f"{self._seed % 2 ** 64} {sigma.hex()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        return torch.randn(like.shape, generator=generator).to(like.device)
