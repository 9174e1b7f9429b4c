"""The stream of tokens between a block's layers: what is added to it, and the normed tokens that layers are given.

The stream is float32; what layers give and take is in the type of their products. Each function is one pass over the
stream where there are kernels for it (see `fused`), and else a few operations of PyTorch, whose numbers are the
reference. Without gradients it is changed in place.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .fused import kernels_for
from .layers import LayerNorm, add_residual, modulated_norm
from .time import TimeRows


def modulated(x: Tensor, time: TimeRows, index: int, eps: float, dtype: torch.dtype) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift in `dtype`, for x [B, L, D] and time [B, rows, D] for each run.

    The shift is row `index`, the scale the one behind it.
    """
    kernels = kernels_for(x, dtype)
    if kernels is None:
        def norm(part: Tensor, row: Tensor) -> Tensor:
            return modulated_norm(part, row[:, index:index + 1], row[:, index + 1:index + 2], eps).to(dtype)

        return time.per_run(norm, x)
    normed = torch.empty_like(x, dtype=dtype)
    for row, part, out in _runs(time, x, normed):
        kernels.stream_pass(part, out=out, scale=row[:, index + 1], shift=row[:, index], offset=1.0, eps=eps)
    return normed


def add_gated(x: Tensor, update: Tensor, time: TimeRows, index: int) -> Tensor:
    """x + gate * update, the gate being row `index` of `time`."""
    kernels = kernels_for(x, update)
    if kernels is not None:
        for row, part, change in _runs(time, x, update):
            kernels.stream_pass(part, update=change, gate=row[:, index])
        return x
    parts = [add_residual(part, change, row[:, index:index + 1]) for row, part, change in _runs(time, x, update)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1) if torch.is_grad_enabled() else x


def add_gated_and_norm(x: Tensor, update: Tensor, time: TimeRows, index: int, norm: LayerNorm,
                       dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`add_gated`, and `norm` of it in `dtype`."""
    kernels = kernels_for(x, update, norm.weight, dtype)
    if kernels is None:
        x = add_gated(x, update, time, index)
        return x, norm(x).to(dtype)
    normed = torch.empty_like(x, dtype=dtype)
    for row, part, change, out in _runs(time, x, update, normed):
        kernels.stream_pass(part, update=change, gate=row[:, index], out=out, scale=norm.weight, shift=norm.bias,
                            eps=norm.eps)
    return x, normed


def add_and_modulate(x: Tensor, update: Tensor, time: TimeRows, index: int, eps: float,
                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + update, and it `modulated`."""
    kernels = kernels_for(x, update, dtype)
    if kernels is None:
        x = add_residual(x, update)
        return x, modulated(x, time, index, eps, dtype)
    normed = torch.empty_like(x, dtype=dtype)
    for row, part, change, out in _runs(time, x, update, normed):
        kernels.stream_pass(part, update=change, out=out, scale=row[:, index + 1], shift=row[:, index], offset=1.0,
                            eps=eps)
    return x, normed


def _runs(time: TimeRows, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The row of each run, and its part of each of `tensors` [B, L, D]."""
    return zip(time.rows, *(tensor.split(time.lengths, 1) for tensor in tensors))
