"""Classifier-free guidance: push the velocity away from what the negative prompt gives (Ho and Salimans 2022,
arXiv:2207.12598), in the form of the official Wan code, where scale 1 means no guidance.

Wan 2.2's two experts have a scale each: the high-noise expert lays out the motion, the low-noise one draws the detail.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of the two experts; a model without experts uses `low`.

    high, low: finite, 0 or more. 1: no guidance; above: towards the prompt, away from the negative prompt; below:
    towards the negative prompt. Raises ValueError for anything else.
    """

    high: float
    low: float

    def __post_init__(self):
        for expert, scale in (("high", self.high), ("low", self.low)):
            if not (math.isfinite(scale) and scale >= 0):
                raise ValueError(
                    f"the guidance scale for {expert} noise must be a number of 0 or more, got {scale}; "
                    "use 1 for no guidance, 3 to 5 as Wan does"
                )

    def scale_for(self, expert: str) -> float:
        """The scale for expert 'high' or 'low'. Raises ValueError for another name."""
        if expert not in ("high", "low"):
            raise ValueError(f"unknown expert {expert!r}; it is 'high' or 'low'")
        return self.high if expert == "high" else self.low


def needs_uncond(scale: float) -> bool:
    """Whether the velocity for the negative prompt has any part in the result; at scale 1 its call can be spared."""
    return scale != 1


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond), in fp32.

    cond, uncond: velocities for the prompt and the negative prompt, of one shape. Raises ValueError where the shapes
    differ: broadcasting would mix samples of a batch.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"the velocities for prompt and negative prompt must have one shape, got {tuple(cond.shape)} and "
            f"{tuple(uncond.shape)}; encode one negative prompt for each prompt"
        )
    uncond = uncond.float()
    return uncond + scale * (cond.float() - uncond)
