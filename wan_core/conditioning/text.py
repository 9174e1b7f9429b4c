"""Text conditions: an embedded prompt, the noise range in which it holds, and its share among others.

Ranges are sigmas in model time, so that they mean the same when a run is split in two. Several conditions that hold at
once are averaged by strength, as ComfyUI users expect of combined prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .condition import Condition, SigmaRange


@dataclass(frozen=True, eq=False)
class TextCondition:
    """`context` [B, L, text_dim] from the text encoder, zero rows at the end being padding.

    `beside` are the other conditions that hold together with this prompt: pictures, controls.
    """

    context: Tensor
    sigmas: SigmaRange = field(default_factory=SigmaRange)
    strength: float = 1.0
    beside: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if self.context.ndim != 3:
            raise ValueError(f"a text condition has shape {list(self.context.shape)}; expected [batch, tokens, width].")
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise ValueError(f"a text condition's strength is {self.strength}; expected a number above 0.")


def active(conditions: Sequence[TextCondition], sigma: float) -> list[tuple[TextCondition, float]]:
    """The conditions that hold at `sigma`, with shares that sum to one. Raises ValueError if none does."""
    holding = [condition for condition in conditions if condition.sigmas.holds(sigma)]
    if not holding:
        raise ValueError(f"no prompt is active at sigma {sigma:.3f}: the ranges of the conditions leave a gap. "
                         "Let one condition cover the whole run.")
    total = sum(condition.strength for condition in holding)
    return [(condition, condition.strength / total) for condition in holding]
