"""Step caches: TeaCache, MagCache and EasyCache save transformer calls where little has changed since the last one."""

from .auto import FEW_STEPS, AutoCache, StepCache
from .calibration import (
    Calibration,
    Polynomial,
    fit_coefficients,
    magnitude_ratio,
    read_calibration,
    write_calibration,
)
from .easycache import EasyCache, EasyState
from .magcache import MagCache
from .plan import QUALITIES, PlannedCache, Report, RunSteps
from .run import CacheRun, begin_cache
from .teacache import TeaCache, relative_change

__all__ = ["FEW_STEPS", "QUALITIES", "AutoCache", "CacheRun", "Calibration", "EasyCache", "EasyState", "MagCache",
           "PlannedCache", "Polynomial", "Report", "RunSteps", "StepCache", "TeaCache", "begin_cache",
           "fit_coefficients", "magnitude_ratio", "read_calibration", "relative_change", "write_calibration"]
