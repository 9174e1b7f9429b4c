"""Guidance: push the velocity away from what the negative prompt gives, and the refinements of that.

Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) has the form of the official Wan code, where scale 1
means no guidance. Wan 2.2's two experts have a scale each: the high-noise expert lays out the motion, the low-noise one
draws the detail. What each step computes is known before a run begins: see `plan_guidance`. For the options and their
sources see `wan_core/guidance.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dit import NormalisedAttention
from ..guidance import GuidanceOptions, Projection, SkippedBlocks

# A schedule that begins at least this high starts from pure noise, as the official code does (UniPC's is 0.999).
PURE_NOISE_SIGMA = 0.999

# Keeps a velocity of zero from being divided by its own norm.
_EPS = 1e-8


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


@dataclass(frozen=True)
class StepGuidance:
    """What guides one step: the scale of classifier-free guidance (1: none), blocks that are skipped, if any, and how
    attention is guided, if it is. If `is_zero`, nothing is computed, and the velocity is zero."""

    scale: float
    is_zero: bool = False
    skipped: SkippedBlocks | None = None
    nag: NormalisedAttention | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        """The passes through the transformer, in order: of "positive", "negative" and "skipped", which is the prompt's
        without some blocks."""
        if self.is_zero:
            return ()
        wanted = {"positive": True, "negative": needs_uncond(self.scale),
                  "skipped": self.skipped is not None and self.skipped.scale > 0}
        return tuple(branch for branch, is_wanted in wanted.items() if is_wanted)

    @property
    def cached(self) -> tuple[str, ...]:
        """The branches by their names in a cache."""
        return tuple(map(self.cached_as, self.branches))

    @property
    def needs_negative(self) -> bool:
        """Whether a negative prompt is used."""
        return "negative" in self.branches or self.nag is not None and not self.is_zero

    def cached_as(self, branch: str) -> str:
        """A name for a branch in which it is known what computes it: what blocks have added in a step may be used again
        in steps of the same name."""
        skipped = self.without(branch)
        return branch + (f" without {', '.join(map(str, skipped))}" if skipped else "") + (
            " with NAG" if self.nag and branch != "negative" else "")

    def without(self, branch: str) -> tuple[int, ...]:
        """The blocks that are left out in a branch."""
        if self.skipped is None or branch != ("skipped" if self.skipped.scale else "negative"):
            return ()
        return self.skipped.blocks


def plan_guidance(guidance: Guidance, options: GuidanceOptions, sigmas: Sequence[float],
                  experts: Sequence[str]) -> tuple[StepGuidance, ...]:
    """What guides each step of a run: of steps that begin at `sigmas`, each computed by 'high' or 'low'."""
    zero_steps = options.zero_steps if sigmas[0] >= PURE_NOISE_SIGMA else 0
    steps = []
    for index, (sigma, expert) in enumerate(zip(sigmas, experts)):
        scale = options.scales[min(index, len(options.scales) - 1)] if options.scales else guidance.scale_for(expert)
        is_skipping = options.skipped is not None and options.skipped.sigmas.holds(sigma)
        steps.append(StepGuidance(scale if options.sigmas.holds(sigma) else 1.0, index < zero_steps,
                                  options.skipped if is_skipping else None,
                                  options.nag if sigma >= options.nag_end else None))
    return tuple(steps)


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


def guided_velocity(velocities: Mapping[str, Tensor], step: StepGuidance, options: GuidanceOptions,
                    average: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The guided velocity [B, C, T, H, W] of a step from those of its `branches`, and the running average of the
    differences between prompt and negative prompt.

    `average` is that of the expert's steps before this one, None for none; it is not written to. With neutral options
    this is `classifier_free_guidance`, or the prompt's velocity as it is.
    """
    cond, uncond = velocities["positive"], velocities.get("negative")
    guided = cond
    if uncond is not None:
        if options.zero_star:
            uncond = uncond.float() * zero_star_scale(cond, uncond)
        if options.projection is None:
            guided = classifier_free_guidance(cond, uncond, step.scale)
        else:
            update, average = projected(cond, uncond, options.projection, average)
            guided = cond.float() + (step.scale - 1) * update
    if "skipped" in velocities:
        guided = guided.float() + step.skipped.scale * (cond.float() - velocities["skipped"].float())
    return guided, average


def zero_star_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """CFG-Zero*: the factor [B, 1, ...] by which a negative prompt's velocity comes nearest to the prompt's, in fp32.

    <cond, uncond> / (<uncond, uncond> + 1e-8) for each sample of the batch (Fan et al. 2025, arXiv:2503.18886).
    """
    c, u = cond.float().flatten(1), uncond.float().flatten(1)
    factor = (c * u).sum(1) / (u.square().sum(1) + _EPS)
    return factor.view(-1, *[1] * (cond.ndim - 1))


def projected(cond: Tensor, uncond: Tensor, how: Projection, average: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What adaptive projected guidance adds for each unit of scale above 1, and the running average of differences.

    Per sample over all other dimensions, of velocities; the velocity is then cond + (scale - 1) * update, as in the
    paper (Sadat et al. 2024, arXiv:2410.02416, algorithm 1). Sums are float64, because the part that is taken away is
    most of the difference. The average is None without momentum.
    """
    cond = cond.float()
    difference = cond - uncond.float()
    if how.momentum:
        if average is not None:
            difference = difference + how.momentum * average.to(difference.device)
        average = difference
    dims = tuple(range(1, cond.ndim))
    if how.threshold:
        limit = how.threshold * (math.sqrt(cond[0].numel()) if how.per_element else 1.0)
        size = torch.linalg.vector_norm(difference, dim=dims, keepdim=True)
        difference = difference * (limit / size.clamp(min=limit))
    along = (difference.double() * cond).sum(dims, keepdim=True) / cond.double().square().sum(dims, keepdim=True)
    # A velocity of zero has no direction.
    update = difference + (how.eta - 1) * along.nan_to_num(0.0).float() * cond
    return update, average if how.momentum else None
