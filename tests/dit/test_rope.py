"""Rotary tables and rotation against complex128."""

import pytest
import torch

from wan_core.dit.rope import axis_split, rope_table, rotate


def exact_table(grid, head_dim):
    """[T, H, W, head_dim / 2] complex128, position by position."""
    axes = []
    for axis, dim in enumerate(axis_split(head_dim)):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        positions = torch.arange(grid[axis], dtype=torch.float64)
        turns = torch.exp(1j * positions[:, None] / 10000.0 ** exponents)
        axes.append(turns.view([-1 if i == axis else 1 for i in range(3)] + [dim // 2]).expand(*grid, -1))
    return torch.cat(axes, -1)


def test_released_heads_are_split_44_42_42():
    """A head of 128 channels gives time 44, height and width 42 each; every head is used up."""
    assert axis_split(128) == (44, 42, 42)
    assert all(sum(axis_split(dim)) == dim for dim in range(8, 257, 2))


@pytest.mark.parametrize("grid", [(1024, 1, 1), (1, 1024, 1), (1, 1, 1024), (5, 4, 7)])
@pytest.mark.parametrize("head_dim", [128, 16])
def test_tables_are_those_of_float64(grid, head_dim):
    """Up to the last position, 1023, on every axis: within 1e-6 of complex128, time slowest and width fastest."""
    table = rope_table(grid, head_dim)
    assert table.dtype == torch.complex64 and table.shape == (grid[0] * grid[1] * grid[2], 1, head_dim // 2)
    assert (table.squeeze(1) - exact_table(grid, head_dim).flatten(0, 2)).abs().max() <= 1e-6


@pytest.mark.parametrize("recorded", [True, False])
def test_rotation_turns_adjacent_pairs(recorded):
    """Channels 2i and 2i + 1 are one complex number; in place (inference) or not (training), the same result."""
    generator = torch.Generator().manual_seed(0)
    grid = (3, 4, 5)
    x = torch.randn(2, 60, 3, 32, generator=generator)
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double())
    turned = pairs * exact_table(grid, 32).flatten(0, 2).unsqueeze(1)
    with torch.set_grad_enabled(recorded):
        ours = rotate(x.clone(), rope_table(grid, 32))
    assert ours.shape == x.shape and ours.dtype == torch.float32
    torch.testing.assert_close(ours[..., 0::2].double(), turned.real, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[..., 1::2].double(), turned.imag, atol=1e-5, rtol=0)


def test_attention_depends_on_distance_alone():
    """The dot product of two rotated vectors is the same wherever the pair stands."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 128, generator=generator)
    table = rope_table((900, 1, 1), 128)

    def product(i, j):
        return float((rotate(q.clone(), table[i:i + 1]) * rotate(k.clone(), table[j:j + 1])).sum())

    assert abs(product(3, 10) - product(803, 810)) < 1e-3
    assert abs(product(3, 10) - product(3, 60)) > 1e-1
