"""Norm and activation before a convolution in one pass on a GPU: features are read once, the result is written once,
at the place where the convolution reads it.

PyTorch's operations pass over the features seven times for it. Imports Triton, which may be missing and takes long to
import: `fused` imports this module when it is needed.
"""

import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program holds.
_TILE = 4096


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Writes SiLU(x / ||x||_2 * sqrt(C) * gamma) into `out`, norms over channels, in float32.

    x and `out` are [B, C, T, H, W]; in each clip of the batch [T, H, W, C] is contiguous, see `is_rows`. The device of
    x has to be the current one.
    """
    batch, channels = x.shape[:2]
    rows = x[0, 0].numel()
    block = triton.next_power_of_2(channels)
    height = max(1, _TILE // block)
    if x.numel():
        grid = triton.cdiv(rows, height), batch
        _norm_silu[grid](x, gamma, out, rows, x.stride(0), out.stride(0), channels ** 0.5,
                         CHANNELS=channels, BLOCK=block, ROWS=height)


def is_rows(x: Tensor) -> bool:
    """Whether the pixels of each clip lie one after another, each with all its channels."""
    return x[0].movedim(0, -1).is_contiguous()


@triton.jit
def _norm_silu(x, gamma, out, rows, x_step, out_step, root, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
               ROWS: tl.constexpr):
    clip = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < CHANNELS)[None, :]
    place = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
    numbers = tl.load(x + clip * x_step + place, inside, other=0.0).to(tl.float32)
    scale = root / tl.maximum(tl.sqrt(tl.sum(numbers * numbers, 1)), 1e-12)
    weight = tl.load(gamma + column, column < CHANNELS, other=0.0).to(tl.float32)
    normed = numbers * scale[:, None] * weight[None, :]
    result = normed / (1.0 + tl.exp(-normed))
    tl.store(out + clip * out_step + place, result.to(out.dtype.element_ty), inside)
