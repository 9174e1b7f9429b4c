"""Normalised attention guidance: a negative prompt within one forward pass, for models that are run without CFG.

In every attention to the text the result for the prompt is pushed away from that for the negative prompt, held to a
multiple of its own size, and mixed with what it was. So a negative prompt works in models that were distilled to
guidance 1 as well, for one more short attention in each block in place of a second pass. Reference: Chen et al. 2025,
arXiv:2505.21179.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Keeps a token whose guided attention is zero from dividing by it.
_EPS = 1e-6


@dataclass(frozen=True)
class NormalisedAttention:
    """How strongly attention to the text is guided.

    `scale` above 1: how far from the negative prompt. `tau` above 0: how many times as large as before a token may
    become, by the sum of its absolute values. `alpha` from 0 to 1: the share of the guided result. Raises ValueError
    for anything else.
    """

    scale: float = 11.0
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 1):
            raise ValueError(f"the scale of normalised attention guidance is {self.scale}; expected a number above 1 "
                             "(5 to 11 as published). To switch it off, leave it away.")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau of normalised attention guidance is {self.tau}; expected a number above 0 (2.5 as "
                             "published).")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha of normalised attention guidance is {self.alpha}; expected 0 to 1 (0.25 as "
                             "published).")

    def guided(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Attention [B, L, D] to the prompt, all heads side by side, guided away from that to the negative prompt.

        The arithmetic is float32, each token by itself; the result has the type of `positive`.
        """
        wanted = positive.float()
        away = torch.lerp(negative.float(), wanted, self.scale)
        limit = self.tau * _size(wanted) / (_size(away) + _EPS)
        mixed = torch.addcmul(wanted * (1 - self.alpha), away, self.alpha * limit.clamp(max=1.0))
        return mixed.to(positive.dtype)


def _size(x: Tensor) -> Tensor:
    """The sum of absolute values of each token: [B, L, 1]."""
    return torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True)
