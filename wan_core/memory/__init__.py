"""Where weights live while a model runs."""

from .budget import Memory
from .layout import RESIDENT, Layout, below
from .placement import OneAtATime, Placement, default_device, working_dtype
from .plan import Plan

__all__ = ["RESIDENT", "Layout", "Memory", "OneAtATime", "Placement", "Plan", "below", "default_device",
           "working_dtype"]
