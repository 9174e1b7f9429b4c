"""A block's work on single tokens in one pass over memory on a GPU: residual and norm, RMS norm and rotation.

The stream of tokens is as large as all else that a block holds, and such work takes the time that reading and writing
it takes. In PyTorch's operations it is read and written several times over, and copies of it in float32 come and go.
Here a program takes one token: it reads the token's row once, keeps it in registers, and writes what is wanted of it
once. Everything is computed in float32.

This module imports Triton, which may be missing and takes long to import: `fused` imports it when it is needed.
Reference: Tillet et al. 2019, "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations".
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def stream_pass(x: Tensor, *, update: Tensor | None = None, gate: Tensor | None = None,
                out: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
                offset: float = 0.0, eps: float = 0.0) -> None:
    """x += gate * update in place, then out = layer_norm(x) * (offset + scale) + shift.

    x [B, L, D] float32, `update` and `out` of its shape in any type. `gate`, `scale` and `shift` are [B, D] or [D], the
    same for all tokens. Without `update` x stays as it is, without `gate` the update is added whole, without `out`
    there is no norm. Of all of them the last dimension is contiguous.
    """
    batch, length, width = x.shape
    if not x.numel():
        return
    # What is not there is never read; the kernel has to be given some tensor for it.
    change, target = x if update is None else update, x if out is None else out
    gate_rows, scale_rows, shift_rows = (_rows(given, x) for given in (gate, scale, shift))
    tile = triton.next_power_of_2(width)
    with _current(x.device):
        _stream[(batch * length,)](
            x, change, gate_rows, scale_rows, shift_rows, target, length, *x.stride()[:2], *change.stride()[:2],
            *target.stride()[:2], gate_rows.stride(0), scale_rows.stride(0), shift_rows.stride(0), eps, OFFSET=offset,
            ADDS=update is not None, GATED=gate is not None, NORMS=out is not None, WIDTH=width, TILE=tile,
            num_warps=_warps(tile), enable_fp_fusion=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, turns: Tensor | None = None) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension; then heads' channel pairs are rotated.

    x and `out` [B, L, D] in any types; `out` may be x. `weight` [D]. `turns` [L, 1, head_dim / 2] complex64, a factor
    for each adjacent pair of a head's channels, the same for all heads; None: no rotation. Of all of them the last
    dimension is contiguous.
    """
    batch, length, width = x.shape
    if not x.numel():
        return
    table = weight if turns is None else torch.view_as_real(turns)
    head = 0 if turns is None else 2 * turns.shape[-1]
    tile = triton.next_power_of_2(width)
    with _current(x.device):
        _rms[(batch * length,)](
            x, weight, table, out, length, *x.stride()[:2], *out.stride()[:2], table.stride(0), eps, HEAD=head,
            WIDTH=width, TILE=tile, num_warps=_warps(tile), enable_fp_fusion=True)


def _rows(given: Tensor | None, x: Tensor) -> Tensor:
    """One row for each sample, without a copy; something else where there is none."""
    return x[:, 0] if given is None else given.expand(x.shape[0], x.shape[2])


def _warps(tile: int) -> int:
    """So many that a thread has 32 numbers of a row, as far as a program may have as many."""
    return min(max(tile // 1024, 1), 16)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tokens."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


# Rows that all programs read are to stay in the cache, and what is read once is the first to leave it.
@triton.jit
def _stream(x, update, gate, scale, shift, out, length, x_sample, x_token, update_sample, update_token, out_sample,
            out_token, gate_sample, scale_sample, shift_sample, eps, OFFSET: tl.constexpr, ADDS: tl.constexpr,
            GATED: tl.constexpr, NORMS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    sample = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    place = x + sample * x_sample + token * x_token + column
    numbers = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
    if ADDS:
        change = tl.load(update + sample * update_sample + token * update_token + column, mask=inside, other=0.0,
                         eviction_policy="evict_first").to(tl.float32)
        if GATED:
            change = change * tl.load(gate + sample * gate_sample + column, mask=inside, other=0.0,
                                      eviction_policy="evict_last").to(tl.float32)
        numbers = numbers + change
        tl.store(place, numbers, mask=inside)
    if NORMS:
        # In two steps, both in registers: mean of squares less square of mean would cancel.
        numbers = tl.where(inside, numbers - tl.sum(numbers, 0) / WIDTH, 0.0)
        numbers = numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
        factor = tl.load(scale + sample * scale_sample + column, mask=inside, other=0.0,
                         eviction_policy="evict_last").to(tl.float32) + OFFSET
        summand = tl.load(shift + sample * shift_sample + column, mask=inside, other=0.0,
                          eviction_policy="evict_last").to(tl.float32)
        numbers = numbers * factor + summand
        tl.store(out + sample * out_sample + token * out_token + column, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms(x, weight, table, out, length, x_sample, x_token, out_sample, out_token, table_token, eps, HEAD: tl.constexpr,
         WIDTH: tl.constexpr, TILE: tl.constexpr):
    sample = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    numbers = tl.load(x + sample * x_sample + token * x_token + column, mask=inside, other=0.0,
                      eviction_policy="evict_first").to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    numbers = numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps) * factor
    if HEAD:
        # Cosine and sine of a pair lie beside each other like its two channels.
        turns = tl.load(table + token * table_token + column % HEAD, mask=inside, other=0.0)
        cosine, sine = tl.split(tl.reshape(turns, (TILE // 2, 2)))
        first, second = tl.split(tl.reshape(numbers, (TILE // 2, 2)))
        pairs = tl.join(first * cosine - second * sine, first * sine + second * cosine)
        numbers = tl.reshape(pairs, (TILE,))
    tl.store(out + sample * out_sample + token * out_token + column, numbers.to(out.dtype.element_ty), mask=inside)
