"""What steers a run: one file per way to condition."""

from .text import SigmaRange, TextCondition, active

__all__ = ["SigmaRange", "TextCondition", "active"]
