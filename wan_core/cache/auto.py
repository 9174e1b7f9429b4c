"""Which step cache suits a run, where nobody has chosen one.

Few steps are all needed. TeaCache is taken where its authors published numbers, because what decides it follows any
schedule; MagCache, whose tables are of one schedule, where only it has numbers for a model of one transformer; else,
Wan 2.2 included, EasyCache, which needs none.
"""

from dataclasses import dataclass

from . import magcache, teacache
from .easycache import EasyCache
from .magcache import MagCache
from .plan import RunSteps, of_quality
from .teacache import TeaCache

# Up to so many steps a model was distilled for them, and none can be spared.
FEW_STEPS = 8

_ONE_TRANSFORMER = ("wan21_vace_1_3b", "wan21_vace_14b")


@dataclass(frozen=True)
class AutoCache:
    """Let each run choose, with one of "quality", "balanced" and "fast". Raises ValueError for another name."""

    quality: str = "balanced"

    def __post_init__(self) -> None:
        of_quality((0, 0, 0), self.quality)

    def __str__(self) -> str:
        return f"automatic step cache, {self.quality}"

    def choose(self, steps: RunSteps) -> tuple[TeaCache | MagCache | EasyCache | None, str]:
        """The cache for a run, None for none, and why, as a line for people."""
        count = sum(bool(names) for names in steps.branches)
        if count <= FEW_STEPS:
            return None, f"no step cache: {count} steps are too few to reuse any"
        cache = self.suited(steps.preset)
        why = ("it needs no numbers of the model" if isinstance(cache, EasyCache) else
               "its numbers for this model are published")
        return cache, f"{type(cache).__name__} ({self.quality}): {why}"

    def suited(self, preset: str) -> TeaCache | MagCache | EasyCache:
        """The cache for a model, where there are enough steps."""
        if teacache.is_published(preset):
            return TeaCache.for_preset(preset, self.quality)
        if magcache.is_published(preset) and preset in _ONE_TRANSFORMER:
            return MagCache.for_preset(preset, self.quality)
        return EasyCache.of_quality(self.quality)


StepCache = TeaCache | MagCache | EasyCache | AutoCache
