"""The Wan diffusion transformer: released parameter names, one attention function, rotary tables."""

from .attention import BACKENDS, attention, check_backend
from .model import TextTokens, WanTransformer

__all__ = ["BACKENDS", "TextTokens", "WanTransformer", "attention", "check_backend"]
