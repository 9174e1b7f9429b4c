"""What the transformer is given for one call: the noisy latents, the time, and what conditions them.

Every way to condition a video adds to these inputs (channels behind the latents, tokens for cross-attention, a time of
its own for some frames, controls for side branches); the transformer itself never asks which way it was.
"""

from dataclasses import dataclass

from torch import Tensor

from .nag import NormalisedAttention


@dataclass(frozen=True, eq=False)
class TextTokens:
    """Text as the blocks see it: embedded tokens [B, N, dim] and a bias [N] for their attention logits, or None.

    Officially a text is zero-padded to 512 tokens which all take part in attention. The padding rows are all alike, and
    n equal keys weigh as much as one key whose logit is raised by log(n): so one row stands for all of them.
    Attention to it is guided away from that to the text in `away`, if there is one.
    """

    tokens: Tensor
    bias: Tensor | None
    away: "NegativeText | None" = None


@dataclass(frozen=True, eq=False)
class NegativeText:
    """The text of a negative prompt, and how attention is guided away from it."""

    text: TextTokens
    how: NormalisedAttention


@dataclass(frozen=True, eq=False)
class VaceControl:
    """One VACE control: its latents [B, vace_in_dim, T, H, W] and how strongly its hints are added."""

    latents: Tensor
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """The inputs of one call.

    `latents` [B, in_dim, T, H, W] are normalised: the noisy video, behind it the conditioning channels if the model has
    any. `timestep` in 0..1000 (1000 * sigma) is [B], or [B, T] where latent frames are at different noise levels.
    `text` comes from `prepare_text`, `image` [B, N, dim] from `prepare_image`.
    """

    latents: Tensor
    timestep: Tensor
    text: TextTokens
    image: Tensor | None = None
    controls: tuple[VaceControl, ...] = ()
