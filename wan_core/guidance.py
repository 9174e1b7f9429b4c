"""Options of guidance, as frozen values that a model carries: when it is active, how strong, and its refinements.

Neutral options are plain classifier-free guidance at the sampler's scale. References: guidance in an interval of noise
levels, Kynkäänniemi et al. 2024, arXiv:2404.07724; CFG-Zero*, Fan et al. 2025, arXiv:2503.18886; adaptive projected
guidance, Sadat et al. 2024, arXiv:2410.02416; skipped blocks, as Stable Diffusion 3.5 does it; normalised attention
guidance, see `dit/nag.py`.
"""

import math
import re
from dataclasses import asdict, dataclass, field

from .conditioning import SigmaRange
from .dit import NormalisedAttention

__all__ = ["BATCHED_TOKENS", "BATCHING", "GuidanceOptions", "NormalisedAttention", "Projection", "SigmaRange",
           "SkippedBlocks", "parse_blocks", "parse_scales"]

BATCHING = ("auto", "on", "off")

# Above this many tokens of a branch a GPU is busy with one branch alone.
BATCHED_TOKENS = 4096


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance: of what guidance adds, the part along the prompt's velocity saturates the picture.

    `eta`: how much of that part is kept, 1 all of it. `momentum` above -1 and below 1: how much of the previous steps'
    differences is added to each; below 0 it pushes away from where they led. `threshold` above 0: how large the
    difference may be, 0 without limit; `per_element` its root mean square (the same for every size of video), else the
    norm of the whole tensor as it is published (55 for 81 frames of 832x480 is 0.038 per element). Raises ValueError
    for numbers outside of these.
    """

    eta: float = 0.0
    momentum: float = -0.75
    threshold: float = 0.038
    per_element: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.eta):
            raise ValueError(f"eta of projected guidance is {self.eta}; expected a number, mostly 0 to 1.")
        if not -1 < self.momentum < 1:
            raise ValueError(f"the momentum of projected guidance is {self.momentum}; expected a number above -1 and "
                             "below 1, or it would grow without end.")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"the threshold of projected guidance is {self.threshold}; expected 0 (no limit) or a "
                             "number above it.")


@dataclass(frozen=True)
class SkippedBlocks:
    """Skip-layer guidance: away from what the model makes without some of its `blocks`, at noise levels `sigmas`.

    With `scale` 0 they are left out of the pass for the negative prompt, which costs nothing; it has no effect where
    there is no such pass. With a scale above 0, as it was published, a third pass goes without them, for the prompt,
    and scale * (prompt - third pass) is added. Raises ValueError for negative numbers, or if no block is named.
    """

    blocks: tuple[int, ...]
    scale: float = 0.0
    sigmas: SigmaRange = field(default_factory=SigmaRange)

    def __post_init__(self) -> None:
        if not self.blocks or min(self.blocks) < 0:
            raise ValueError(f"blocks to skip are {list(self.blocks)}; name at least one by its index, the first is 0.")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"the scale of skip-layer guidance is {self.scale}; expected 0 (blocks are left out of "
                             "the pass for the negative prompt) or a number above it.")


@dataclass(frozen=True)
class GuidanceOptions:
    """Everything about guidance but the sampler's scales; neutral if nothing is given.

    - `sigmas`: noise levels at which there is classifier-free guidance. Elsewhere the prompt works alone, and the pass
      for the negative prompt is spared.
    - `scales`: a scale for each step of the run, in place of the sampler's; the last one holds for the steps that
      follow, and those beyond the run are not used.
    - `zero_star`: CFG-Zero*, which scales the negative prompt's velocity to fit the prompt's best.
    - `zero_steps`: the velocity of so many first steps is zero and nothing is computed for them; only in runs that
      begin with pure noise.
    - `projection`, `skipped`, `nag`: see there. `nag_end` is the noise level down to which `nag` works.
    - `batched`: whether both prompts go through the model together where they can. "auto": for small videos on a GPU.

    Raises ValueError for numbers out of range.
    """

    sigmas: SigmaRange = field(default_factory=SigmaRange)
    scales: tuple[float, ...] = ()
    zero_star: bool = False
    zero_steps: int = 0
    projection: Projection | None = None
    skipped: SkippedBlocks | None = None
    nag: NormalisedAttention | None = None
    nag_end: float = 0.0
    batched: str = "auto"

    def __post_init__(self) -> None:
        for scale in self.scales:
            if not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"a guidance scale of the list is {scale}; each must be a number of 0 or more.")
        if self.zero_steps < 0:
            raise ValueError(f"{self.zero_steps} first steps are to be zero; expected 0 or more.")
        if not (math.isfinite(self.nag_end) and self.nag_end >= 0):
            raise ValueError(f"normalised attention guidance ends at sigma {self.nag_end}; expected 0 to 1.")
        if self.batched not in BATCHING:
            raise ValueError(f"batching of both prompts is {self.batched!r}; choose one of {', '.join(BATCHING)}.")

    @property
    def has_momentum(self) -> bool:
        """Whether a step needs to know of earlier ones."""
        return self.projection is not None and self.projection.momentum != 0

    def is_batched(self, device: str, tokens: int) -> bool:
        """Whether branches of so many tokens go through the model together on a kind of device ("cuda", "cpu")."""
        return self.batched == "on" or self.batched == "auto" and device == "cuda" and tokens <= BATCHED_TOKENS

    def check_blocks(self, count: int) -> None:
        """Raise ValueError where a block is to be skipped that a transformer of `count` blocks does not have."""
        beyond = [] if self.skipped is None else [block for block in self.skipped.blocks if block >= count]
        if beyond:
            raise ValueError(f"block {beyond[0]} is to be skipped, and the model has blocks 0 to {count - 1}. Name "
                             "blocks of this model.")

    def record(self) -> dict[str, object]:
        """What differs from neutral options, as plain values for people and JSON."""
        return {name: value for name, value in _plain(asdict(self)).items()
                if value != _plain(asdict(GuidanceOptions()))[name]}


def parse_scales(text: str) -> tuple[float, ...]:
    """The scales in "6, 6, 5" or, with repetitions, "6*2, 5"; none in an empty text. Raises ValueError for others."""
    scales: list[float] = []
    for part in filter(None, re.split(r"[,;\s]+", re.sub(r"\s*\*\s*", "*", text))):
        match = re.fullmatch(r"([\d.eE+-]+)(?:\*(\d+))?", part)
        try:
            value = float(match[1]) if match else None
        except ValueError:
            value = None
        if value is None:
            raise ValueError(f"{part!r} is not a guidance scale. Write one for each step, such as 6, 5, 4 or, with "
                             "repetitions, 6*10, 4.")
        scales += [value] * (int(match[2]) if match[2] else 1)
    return tuple(scales)


def parse_blocks(text: str) -> tuple[int, ...]:
    """The blocks in "9, 10" or, with ranges, "9-11"; ordered, each once. Raises ValueError for others, and for none."""
    blocks: set[int] = set()
    for part in filter(None, re.split(r"[,;\s]+", text)):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"{part!r} is not a block. Write indices such as 9, 10 or 9-11; the first block is 0.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 1000:
            raise ValueError(f"{part!r} is not a range of blocks. Write the lower index first; models have up to 40.")
        blocks.update(range(first, last + 1))
    if not blocks:
        raise ValueError("no block is named. Write indices such as 9, 10 or 9-11; the first block is 0.")
    return tuple(sorted(blocks))


def _plain(value: object) -> object:
    """With tuples as lists and, for a noise level without limit, which JSON cannot say, the highest one."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return 1.0 if value == math.inf else value
