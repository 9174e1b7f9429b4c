"""Where weights live while a model runs."""

from .placement import OneAtATime, Placement, default_device, working_dtype

__all__ = ["OneAtATime", "Placement", "default_device", "working_dtype"]
