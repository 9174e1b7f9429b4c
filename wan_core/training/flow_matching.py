"""Flow-matching training: noise levels, loss weights and the loss. Used for nano models and LoRA alike.

A clean latent x0 and noise n are mixed to x = (1 - sigma) * x0 + sigma * n; the model learns the velocity n - x0
(Lipman et al. 2023, "Flow matching for generative modeling"; rectified flow). Noise levels are drawn either as
official fine-tuning recipes do, evenly from a shifted table of 1,000 timesteps with a bell-shaped loss weight, or
logit-normally (Esser et al. 2024, "Scaling rectified flow transformers", section 3.1) without one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000

# Below it the inverse of the normal distribution function is no longer exact: 37 standard deviations from the mean.
LEAST_PROBABILITY = 1e-300

Predict = Callable[[Tensor, Tensor], Tensor]


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """s -> shift * s / (1 + (shift - 1) * s): more of the schedule at high noise, as larger videos need."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@dataclass(frozen=True)
class UniformTimesteps:
    """Even draws from the shifted table of 1,000 timesteps, with the bell-shaped weight.

    `low` and `high` (fractions of the table, which begins at the highest noise) limit it to a part, for experts.
    """

    shift: float = 5.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or not self.shift > 0:
            raise ValueError(f"timesteps from {self.low} to {self.high} at shift {self.shift}: expected "
                             "0 <= low < high <= 1 and a shift above 0.")

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` noise levels [count] in (0, 1] and their loss weights [count]."""
        sigmas = shift_sigmas(torch.linspace(1, 0, TRAIN_TIMESTEPS + 1)[:-1], self.shift)
        first, last = int(self.low * TRAIN_TIMESTEPS), max(int(self.high * TRAIN_TIMESTEPS), 1)
        index = torch.randint(min(first, last - 1), last, (count,), generator=generator)
        return sigmas[index], bell_weights(sigmas * TRAIN_TIMESTEPS)[index]


@dataclass(frozen=True)
class LogitNormalTimesteps:
    """sigmoid(N(mean, std)), then shifted; limited to sigmas in [low, high]. All weights are one.

    Raises ValueError for a range that the normal distribution does not reach in double precision.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or not self.shift > 0 or not self.std > 0:
            raise ValueError(f"sigmas from {self.low} to {self.high}, shift {self.shift}, std {self.std}: expected "
                             "0 <= low < high <= 1, a shift and a std above 0.")
        first, last, _ = self._tail()
        if not last - first >= LEAST_PROBABILITY:
            raise ValueError(f"no sigma from {self.low} to {self.high} is ever drawn at mean {self.mean}, std "
                             f"{self.std} and shift {self.shift}. Widen the range, or move the mean towards it.")

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` noise levels [count] in [low, high] and their loss weights [count]."""
        # The inverse of the truncated distribution function: one uniform number a level, however narrow the range.
        first, last, sign = self._tail()
        uniform = torch.rand(count, dtype=torch.float64, generator=generator)
        normal = sign * torch.special.ndtri(first + (last - first) * uniform)
        sigmas = shift_sigmas((normal * self.std + self.mean).sigmoid(), self.shift)
        return sigmas.float().clamp(self.low, self.high), torch.ones(count)

    def _tail(self) -> tuple[float, float, int]:
        """The standard normal distribution function at both ends of the range, and 1, or -1 for the mirrored range.

        Above the mean the function nears 1 and loses its digits, so a range there is mirrored to below it.
        """
        # The shift multiplies the odds sigma / (1 - sigma), so it moves logits by its logarithm.
        ends = [(_logit(sigma) - math.log(self.shift) - self.mean) / self.std for sigma in (self.low, self.high)]
        sign = 1
        if ends[0] > 0:
            ends, sign = [-ends[1], -ends[0]], -1
        first, last = (math.erfc(-end / math.sqrt(2)) / 2 for end in ends)
        return first, last, sign


def _logit(value: float) -> float:
    if value in (0, 1):
        return math.inf if value else -math.inf
    return math.log(value) - math.log1p(-value)


def bell_weights(timesteps: Tensor) -> Tensor:
    """Loss weight of each entry of a whole table of timesteps [N] (0..1000): a bell around 500 with mean one.

    exp(-2 ((t - 500) / 1000)^2), lowered by its minimum and normalised over the table. A table of another length
    than 1,000 is scaled by length / 1000 and raised by its second entry, so that no step is left without weight
    (recipe: DiffSynth-Studio, `diffsynth/diffusion/flow_match.py`).
    """
    bell = torch.exp(-2 * ((timesteps - TRAIN_TIMESTEPS / 2) / TRAIN_TIMESTEPS) ** 2)
    raised = bell - bell.min()
    weights = raised * (TRAIN_TIMESTEPS / raised.sum())
    if timesteps.numel() != TRAIN_TIMESTEPS:
        weights = weights * (timesteps.numel() / TRAIN_TIMESTEPS)
        weights = weights + weights[1]
    return weights


def flow_matching_loss(predict: Predict, clean: Tensor, noise: Tensor, sigmas: Tensor, weights: Tensor,
                       known: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
    """Weighted mean squared error of the predicted velocity (scalar, float32).

    clean and noise [B, C, T, H, W] (normalised latents), sigmas and weights [B]. `predict(noisy, timesteps)` returns
    the velocity for timesteps [B] = 1000 * sigma. With `known` [B, T] bool, true for the latent frames that are shown
    clean, those are at timestep 0, the timesteps are [B, T], and only the other frames count. With `channels` [C] bool
    only those latent channels count.
    """
    shown = torch.zeros(clean.shape[0], clean.shape[2], dtype=torch.bool) if known is None else known
    levels = torch.where(shown, 0.0, sigmas[:, None])
    level = levels[:, None, :, None, None]
    velocity = predict((1 - level) * clean + level * noise, TRAIN_TIMESTEPS * (sigmas if known is None else levels))
    error = (velocity.float() - (noise - clean).float()).square()
    error = (error if channels is None else error[:, channels]).mean((1, 3, 4))
    error = error.masked_fill(shown, 0).sum(1) / (~shown).sum(1)
    return (error * weights).mean()
