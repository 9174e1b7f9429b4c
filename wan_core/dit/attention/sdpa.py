"""PyTorch's own attention, `scaled_dot_product_attention`: as it chooses, or held to one of its kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backend import Backend, CannotRun

# Kernels for a bias, in PyTorch's own order: an order of one's own can be asked for since 2.6 only.
_WITH_BIAS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# Logits of one head that are computed at a time on a CPU: 4 MB in bfloat16.
CACHED_LOGITS = 1 << 21

# What PyTorch says where none of the allowed kernels can run.
_NO_KERNEL = ("No viable backend", "No available kernel")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # PyTorch's own kernel for the CPU takes nearly twice the time of plain matrix products in bfloat16.
    if bias is None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return _by_matrix_products(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return _by_kernel(q, k, v, bias)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, q.shape[1], -1)
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def _by_matrix_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of tensors [B, heads, L, head_dim], head by head and in as many query rows as
    keep the logits in the cache."""
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


def _held_to(kernel: SDPBackend) -> Backend:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # Flash kernels of CUDA devices take no bias. Only the short attention to the text has one.
        is_alone = bias is None or kernel is SDPBackend.MATH
        try:
            with sdpa_kernel([kernel] if is_alone else [kernel, *_WITH_BIAS]):
                return _by_kernel(q, k, v, bias)
        except RuntimeError as error:
            if not any(phrase in str(error) for phrase in _NO_KERNEL):
                raise
            raise CannotRun(f"PyTorch has no such kernel for {str(q.dtype).removeprefix('torch.')} and heads of "
                            f"{q.shape[3]} on a {q.device.type} device here") from error

    return Backend(run, tolerance=0.05)


SDPA = Backend(_sdpa)
FLASH = _held_to(SDPBackend.FLASH_ATTENTION)
EFFICIENT = _held_to(SDPBackend.EFFICIENT_ATTENTION)
CUDNN = _held_to(SDPBackend.CUDNN_ATTENTION)
MATH = _held_to(SDPBackend.MATH)
