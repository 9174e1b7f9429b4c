"""Rotary position tables for video tokens on a (time, height, width) grid.

Each head's channels are adjacent pairs, split over the three axes; pair i of an axis of d channels turns by
position * 10000^(-2i/d) (Su et al. 2021; split and layout: Wan2.1 `wan/modules/model.py`). Angles are computed in
float64 and stored as complex64: at the longest positions (1,024) that keeps every factor to 1e-7, without complex128
copies of q and k.
"""

import torch
from torch import Tensor


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode time, height and width: 44, 42, 42 for the released models' 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit complex numbers [T * H * W, 1, head_dim / 2] for a grid of T x H x W tokens, time slowest."""
    axes = []
    for axis, (length, dim) in enumerate(zip(grid, axis_split(head_dim))):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        # A few rows for each axis go over, and the table is put together there: nobody waits.
        axes.append(turns.to(device, non_blocking=True).view(shape).expand(*grid, dim // 2))
    return torch.cat(axes, -1).flatten(0, 2).unsqueeze(1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of x [B, L, heads, head_dim] (float32) by `table` [L, 1, head_dim / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned = pairs * table if torch.is_grad_enabled() else pairs.mul_(table)
    return torch.view_as_real(turned).flatten(-2)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` by cosines and sines [L, 1, head_dim / 2, 2]: PyTorch's compiler has no code for complex numbers."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table.unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)
