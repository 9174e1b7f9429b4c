"""The Wan diffusion transformer: released parameter names, one attention function, rotary tables."""

from .attention import BACKENDS, Attention, AttentionRange, Radial, attention, check_backend, describe_backends
from .compiled import MODES, Compile, use_compiled
from .inputs import ModelInputs, NegativeText, TextTokens, VaceControl
from .model import Shortcut, WanTransformer
from .nag import NormalisedAttention
from .vace import VaceTransformer

__all__ = ["BACKENDS", "MODES", "Attention", "AttentionRange", "Compile", "ModelInputs", "NegativeText",
           "NormalisedAttention", "Radial", "Shortcut", "TextTokens", "VaceControl", "VaceTransformer",
           "WanTransformer", "attention", "check_backend", "describe_backends", "use_compiled"]
