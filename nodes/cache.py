"""The nodes that choose a step cache: a sampler then reuses what changes little from step to step.

What a cache saves and what it costs is said by its quality; numbers of one's own count with quality "custom" alone, so
that a saved graph shows which of the two it means.
"""

from dataclasses import replace
from pathlib import Path

from ..wan_core.cache import (
    QUALITIES,
    AutoCache,
    Calibration,
    EasyCache,
    MagCache,
    StepCache,
    TeaCache,
    read_calibration,
)
from ..wan_core.models import Model
from .host import HOST

CUSTOM = "custom"
AUTO, OFF = "auto", "off"
YES, NO = "yes", "no"
PUBLISHED = "published"

# Where calibrations are, in ComfyUI's user folder.
FOLDER = "wan-calibrations"

_MODEL = ("WAN_MODEL", {"tooltip": "A model or an expert pair; the one that goes in stays as it is."})
_QUALITY_TIP = ("How much a step may change before it is computed again: quality reuses the fewest steps, fast the "
                "most. custom: the numbers below count.")
_CALIBRATION_TIP = ("published: the numbers of its authors, which not all models have. Others: files in "
                    f"user/{FOLDER} that `python -m wan_core calibrate` has measured on this very model.")
_OUTPUT_TIP = "The model with this cache, for Wan Sampler."
_ALIASES = ("wan", "cache", "step cache", "speed up", "faster", "skip steps", "first block cache")


def _sigmas() -> dict[str, tuple]:
    level = {"min": 0.0, "max": 1.0, "step": 0.001, "round": False}
    return {
        "start_sigma": ("FLOAT", {
            "default": 1.0, **level, "tooltip": "The noise level from which steps may be reused: 1 is pure noise. "
                                                "Lower values compute more of the early steps, which make the "
                                                "motion."}),
        "end_sigma": ("FLOAT", {
            "default": 0.0, **level, "tooltip": "The noise level down to which steps may be reused; 0 is the clean "
                                                "video. Higher values compute more of the late steps, which make the "
                                                "detail."}),
    }


def _number(default: float, tooltip: str, maximum: float = 10.0) -> tuple:
    return "FLOAT", {"default": default, "min": 0.001, "max": maximum, "step": 0.001, "round": False,
                     "tooltip": tooltip}


class WanCoreStepCache:
    """The cache that suits the model and the number of steps, or none."""

    DESCRIPTION = ("Makes a Wan model faster by reusing steps in which little changes: TeaCache, MagCache or "
                   "EasyCache, whichever suits the model, and none for runs of few steps. The sampler reports which "
                   "steps were reused.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = [*_ALIASES, "teacache", "magcache", "easycache"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_OUTPUT_TIP,)
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": _MODEL,
            "cache": ([AUTO, OFF], {
                "default": AUTO,
                "tooltip": "auto: a run chooses by its model and steps, and says what it took. off: every step is "
                           "computed, whatever was chosen before."}),
            "quality": (list(QUALITIES), {
                "default": "balanced",
                "tooltip": "How much a step may change before it is computed again: quality reuses the fewest steps, "
                           "fast the most."}),
        }}

    def choose(self, model: Model, cache: str, quality: str) -> tuple[Model]:
        return (replace(model, cache=AutoCache(quality) if cache == AUTO else None),)


class WanCoreTeaCache:
    """TeaCache on a model."""

    DESCRIPTION = ("Makes a Wan model faster with TeaCache: steps are reused while the time embedding changes little. "
                   "Coefficients are published for Wan 2.1 T2V and I2V; for other models another model's are taken.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = [*_ALIASES, "teacache", "tea cache", "rel_l1_thresh"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_OUTPUT_TIP,)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": _MODEL,
            "quality": ([*QUALITIES, CUSTOM], {"default": "balanced", "tooltip": _QUALITY_TIP}),
            "threshold": _number(0.15, "custom: the change of the output that may add up before a step is computed "
                                       "again. 1.3B takes 0.05 to 0.1, the 14B models 0.1 to 0.3."),
            "retention": ([AUTO, YES, NO], {
                "default": AUTO,
                "tooltip": "yes: the first five steps are always computed. no: the first and the last one are. auto: "
                           "as the authors advise for the model."}),
            **_sigmas(),
            "calibration": _calibrations(),
        }}

    @classmethod
    def IS_CHANGED(cls, calibration: str, **_others: object) -> str:
        return _state(calibration)

    def add(self, model: Model, quality: str, threshold: float, retention: str, start_sigma: float, end_sigma: float,
            calibration: str) -> tuple[Model]:
        cache = TeaCache.for_preset(model.preset.name, _known(quality), None if retention == AUTO else retention == YES,
                                    _measured(calibration))
        if quality == CUSTOM:
            cache = replace(cache, threshold=threshold)
        return (_with(model, cache, start_sigma, end_sigma),)


class WanCoreMagCache:
    """MagCache on a model."""

    DESCRIPTION = ("Makes a Wan model faster with MagCache: steps are reused while a table says that what the blocks "
                   "add keeps its magnitude. Tables are published for Wan 2.1 T2V, I2V and VACE and for Wan 2.2.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = [*_ALIASES, "magcache", "mag cache"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_OUTPUT_TIP,)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": _MODEL,
            "quality": ([*QUALITIES, CUSTOM], {"default": "balanced", "tooltip": _QUALITY_TIP}),
            "threshold": _number(0.12, "custom: the error of the magnitude that may add up before a step is computed "
                                       "again. Wan 2.1 takes 0.12 to 0.24, VACE 0.02, Wan 2.2 0.04 to 0.06."),
            "longest": ("INT", {
                "default": 4, "min": 1, "max": 100,
                "tooltip": "custom: how many steps may be reused in a row (K). 2 to 6 are usual."}),
            "retention": ("FLOAT", {
                "default": 0.2, "min": 0.0, "max": 1.0, "step": 0.01,
                "tooltip": "custom: the share of the steps, from the first on, that is always computed; with an expert "
                           "pair, of each expert's."}),
            **_sigmas(),
            "calibration": _calibrations(),
        }}

    @classmethod
    def IS_CHANGED(cls, calibration: str, **_others: object) -> str:
        return _state(calibration)

    def add(self, model: Model, quality: str, threshold: float, longest: int, retention: float, start_sigma: float,
            end_sigma: float, calibration: str) -> tuple[Model]:
        cache = MagCache.for_preset(model.preset.name, _known(quality), _measured(calibration))
        if quality == CUSTOM:
            cache = replace(cache, threshold=threshold, longest=longest, retention=retention)
        return (_with(model, cache, start_sigma, end_sigma),)


class WanCoreEasyCache:
    """EasyCache on a model."""

    DESCRIPTION = ("Makes any Wan model faster with EasyCache: steps are reused while the run itself shows that little "
                   "changes. Needs no numbers of the model and skips the whole transformer.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = [*_ALIASES, "easycache", "easy cache", "lazycache", "reuse_threshold"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = (_OUTPUT_TIP,)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": _MODEL,
            "quality": ([*QUALITIES, CUSTOM], {"default": "balanced", "tooltip": _QUALITY_TIP}),
            "threshold": _number(0.05, "custom: the relative change of the output that may add up before a step is "
                                       "computed again. The authors take 0.05, and name 0.1 and 0.2 as faster."),
            "warm_up": ("FLOAT", {
                "default": 0.2, "min": 0.0, "max": 1.0, "step": 0.01,
                "tooltip": "custom: the share of the steps, from the first on, that is always computed. The authors "
                           "take 10 of 50."}),
            **_sigmas(),
        }}

    def add(self, model: Model, quality: str, threshold: float, warm_up: float, start_sigma: float,
            end_sigma: float) -> tuple[Model]:
        cache = EasyCache(threshold, warm_up) if quality == CUSTOM else EasyCache.of_quality(quality)
        return (_with(model, cache, start_sigma, end_sigma),)


def _with(model: Model, cache: StepCache, start: float, end: float) -> Model:
    return replace(model, cache=replace(cache, start=start, end=end))


def _known(quality: str) -> str:
    """A quality whose numbers are replaced where they are the user's own."""
    return "balanced" if quality == CUSTOM else quality


def _calibrations() -> tuple:
    found = sorted(path.name for path in HOST.user_folder(FOLDER).glob("*.json"))
    return [PUBLISHED, *found], {"default": PUBLISHED, "tooltip": _CALIBRATION_TIP}


def _measured(calibration: str) -> Calibration | None:
    """The calibration in a file of the list, None for published numbers."""
    return None if calibration == PUBLISHED else read_calibration(_file(calibration))


def _file(calibration: str) -> Path:
    """Raises ValueError for a name that leads out of the folder."""
    if Path(calibration).name != calibration:
        raise ValueError(f"there is no calibration {calibration!r}; put it into the folder {FOLDER} of ComfyUI's user "
                         "folder, and choose it from the list.")
    return HOST.user_folder(FOLDER) / calibration


def _state(calibration: str) -> str:
    """Changes when the file is replaced."""
    try:
        found = _file(calibration).stat()
    except (OSError, ValueError):
        return "missing"
    return f"{found.st_mtime_ns}-{found.st_size}"
