"""The Wan diffusion transformer: released parameter names, one attention function, rotary tables."""

from .attention import BACKENDS, attention, check_backend
from .inputs import ModelInputs, TextTokens, VaceControl
from .model import WanTransformer
from .vace import VaceTransformer

__all__ = ["BACKENDS", "ModelInputs", "TextTokens", "VaceControl", "VaceTransformer", "WanTransformer", "attention",
           "check_backend"]
