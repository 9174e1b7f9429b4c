"""The one attention function of the engine, with selectable backends.

All attention of the transformer goes through `attention`, so that a faster kernel is one more entry in `BACKENDS` and
nothing else. The `sdpa` backends are PyTorch's `scaled_dot_product_attention`: plain, or held to one of its kernels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

_WITH_BIAS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# Logits of one head that are computed at a time on a CPU: 4 MB in bfloat16.
CACHED_LOGITS = 1 << 21

# What PyTorch says where none of the allowed kernels can run.
_NO_KERNEL = ("No viable backend", "No available kernel")


def attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v.

    q [B, Lq, heads, head_dim], k and v [B, Lk, heads, head_dim], bias [Lk] (added to the logits of each key) ->
    [B, Lq, heads * head_dim]. Raises ValueError for an unknown `backend`, and for one that has no kernel for the
    tensors' device and dtype.
    """
    check_backend(backend)
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, q.shape[1], -1)
    try:
        out = BACKENDS[backend](q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in _NO_KERNEL):
            raise
        raise ValueError(f"attention backend {backend!r} cannot run {str(q.dtype).removeprefix('torch.')} on a "
                         f"{q.device.type} device here; use sdpa.") from error
    return out.transpose(1, 2).flatten(2)


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is known."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}.")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # PyTorch's own kernel for the CPU takes nearly twice the time of plain matrix products in bfloat16.
    if mask is None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return _by_matrix_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _by_matrix_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, head by head and in as many query rows as keep the logits in the cache."""
    batch, heads, length, dim = q.shape
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    rows = max(1, CACHED_LOGITS // k.shape[2])
    unused = q.new_empty(())
    for sample in range(batch):
        for head in range(heads):
            keys, values = k[sample, head].mT, v[sample, head]
            for queries, result in zip(q[sample, head].split(rows), out[sample, head].split(rows)):
                logits = torch.addmm(unused, queries, keys, beta=0, alpha=dim ** -0.5)
                torch.mm(logits.softmax(-1), values, out=result)
    return out


def _sdpa_with(kernel: SDPBackend) -> Backend:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # Flash kernels of CUDA devices take no bias. Only the short attention to the text has one.
        with sdpa_kernel([kernel] if mask is None else [kernel, *_WITH_BIAS], set_priority=True):
            return _sdpa(q, k, v, mask)
    return run


BACKENDS: dict[str, Backend] = {
    "sdpa": _sdpa,
    "sdpa-flash": _sdpa_with(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": _sdpa_with(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": _sdpa_with(SDPBackend.CUDNN_ATTENTION),
    "sdpa-math": _sdpa_with(SDPBackend.MATH),
}
