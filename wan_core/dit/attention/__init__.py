"""The one attention function of the engine, with selectable backends, ranges of noise levels and sparse masks.

All attention of the transformer goes through `attention`, so that a faster kernel is one more entry in `BACKENDS` and
nothing else. A backend that cannot run the tensors at hand gives way to PyTorch's own, and the log says why, once.
"""

from .choice import Attention, AttentionRange
from .dispatch import BACKENDS, attention, check_backend, describe_backends
from .radial import BlockPattern, Radial, sparse_attention
from .sdpa import CACHED_LOGITS

__all__ = ["BACKENDS", "CACHED_LOGITS", "Attention", "AttentionRange", "BlockPattern", "Radial", "attention",
           "check_backend", "describe_backends", "sparse_attention"]
