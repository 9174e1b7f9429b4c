"""FlexAttention: PyTorch's attention kernel that is compiled for a bias or a mask of one's own (Dong et al. 2024).

Compiling takes some seconds at the first use of each kind of shape, and Triton on a GPU, a C++ compiler on a CPU.
Reference: `torch.nn.attention.flex_attention`.
"""

from collections.abc import Hashable
from functools import cache

import torch
from torch import Tensor

from ..compiled import why_not_compiled, with_room
from .backend import Backend, CannotRun, Case


class Flex:
    """FlexAttention, compiled. Uncompiled it would hold all logits: so it fails where it cannot be compiled, and where
    it has been for too many kinds of shapes.

    What has failed for a kind of tensors fails at once from then on: a compiler takes seconds to fail, and every block
    of every step would ask it again.
    """

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        # Graphs are counted by the code that they are made of, and that of PyTorch's function is also others' code.
        def own(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            return flex_attention(q, k, v, **options)

        self._run = torch.compile(own, fullgraph=True)
        self._reasons: dict[Hashable, str] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        """Of q, k, v [B, heads, L, head_dim]. Raises CannotRun where it cannot be compiled."""
        kind = (q.device, q.dtype, q.shape[3], *(name for name, option in options.items() if option is not None))
        if kind not in self._reasons:
            try:
                return with_room(self._run, q, k, v, **options)
            except Exception as error:
                reason = why_not_compiled(error)
                if reason is None:
                    raise
                self._reasons[kind] = reason
        raise CannotRun(self._reasons[kind])


@cache
def flex() -> Flex:
    """The one of this process."""
    return Flex()


def _run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[key]

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return flex()(q, k, v, score_mod=None if bias is None else biased).transpose(1, 2)


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
