"""FlexAttention: PyTorch's attention kernel that is compiled for a bias or a mask of one's own (Dong et al. 2024).

Compiling takes some seconds at the first use of each kind of shape, and Triton on a GPU, a C++ compiler on a CPU.
Reference: `torch.nn.attention.flex_attention`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .backend import Backend, Case


@cache
def compiled() -> Callable:
    """FlexAttention, compiled. Uncompiled it would hold all logits: so it fails where it cannot be compiled, and where
    it has been for too many kinds of shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def _run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[key]

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return compiled()(q, k, v, score_mod=None if bias is None else biased).transpose(1, 2)


def why_not_flex(case: Case) -> str | None:
    """Why FlexAttention does not run, as far as can be told without compiling it."""
    if case.device.type not in ("cuda", "xpu", "cpu"):
        return f"FlexAttention is not compiled for a {case.device.type} device"
    if case.device.type != "cpu":
        try:
            import triton  # noqa: F401
        except Exception:
            return "FlexAttention needs Triton; on Windows install the package triton-windows"
    return None


FLEX = Backend(_run, why_not_flex)
