"""Matrices to the formats of safetensors files, FP8, int8, MXFP8 and NVFP4; `quantised` has the way back.

Each function takes a weight [rows, columns] in float32 and gives the parts of its scheme; the rules of rounding are
those of ComfyUI's converters, comfy-kitchen's `backends/eager/quantization.py`. The layout of each says what its parts
are without making them: name -> type and shape.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantised import MXFP8, NVFP4

Encoder = Callable[[Tensor], dict[str, Tensor]]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
LayoutOf = Callable[[tuple[int, ...]], Layout]

# Beyond its largest number e4m3 has no infinity to fall back to.
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_LARGEST_FP4 = 6.0
# Middles between the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 of E2M1, and whether the upper one, of an even code, gets them.
_MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))

# Numbers that are worked on at a time, in whole rows.
_CHUNK = 1 << 22


def plain(dtype: torch.dtype) -> Encoder:
    """FP8 without a scale; what is too large becomes the largest number."""
    largest = torch.finfo(dtype).max
    return lambda weight: {"codes": weight.clamp(-largest, largest).to(dtype)}


def plain_layout(dtype: torch.dtype) -> LayoutOf:
    """See the module's text."""
    return lambda shape: {"codes": (dtype, shape)}


def per_tensor(weight: Tensor) -> dict[str, Tensor]:
    """FP8 e4m3 with one scale, which brings the largest number to the largest code."""
    return _scaled(weight, weight.abs().max())


def per_tensor_layout(shape: tuple[int, ...]) -> Layout:
    """See the module's text."""
    return {"codes": (torch.float8_e4m3fn, shape), "scale": (torch.float32, ())}


def per_row(weight: Tensor) -> dict[str, Tensor]:
    """FP8 e4m3 with a scale for each row."""
    return _scaled(weight, weight.abs().amax(1, keepdim=True))


def per_row_layout(shape: tuple[int, ...]) -> Layout:
    """See the module's text."""
    return {"codes": (torch.float8_e4m3fn, shape), "scale": (torch.float32, (shape[0], 1))}


def _scaled(weight: Tensor, peak: Tensor) -> dict[str, Tensor]:
    # A weight of zeros has any scale.
    scale = torch.where(peak == 0, 1.0, peak / _LARGEST)
    return {"codes": (weight / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), "scale": scale}


def int8(weight: Tensor) -> dict[str, Tensor]:
    """int8 with a scale for each row."""
    # As small as this where a row is of zeros.
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return {"codes": (weight / scale).round_().clamp_(-128, 127).to(torch.int8), "scale": scale}


def int8_layout(shape: tuple[int, ...]) -> Layout:
    """See the module's text."""
    return {"codes": (torch.int8, shape), "scale": (torch.float32, (shape[0], 1))}


def mxfp8(weight: Tensor) -> dict[str, Tensor]:
    """FP8 e4m3 with a power of two for each 32 columns: the least with which none of them is too large."""

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks = rows.unflatten(1, (-1, MXFP8.block))
        mantissa, exponent = (blocks.abs().amax(2) / _LARGEST).clamp(min=2.0 ** -127).frexp()
        # frexp's mantissa is 1/2 for powers of two. The exponent 0 stands for zeros.
        stored = (exponent - (mantissa == 0.5).to(exponent.dtype) + 127).clamp(0, 254)
        scaled = blocks.ldexp((127 - stored).unsqueeze(2)).clamp_(-_LARGEST, _LARGEST)
        return scaled.flatten(1).to(torch.float8_e4m3fn), stored.to(torch.uint8)

    codes, exponents = _by_rows(weight, encode)
    return {"codes": codes, "scale": _to_tiles(exponents)}


def mxfp8_layout(shape: tuple[int, ...]) -> Layout:
    """See the module's text."""
    return {"codes": (torch.float8_e4m3fn, shape), "scale": (torch.uint8, _tiled(shape[0], shape[1] // MXFP8.block))}


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """4-bit floats with an FP8 scale for each 16 columns and a number for the whole weight."""
    tensor_scale = weight.abs().max() / (_LARGEST * _LARGEST_FP4)

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks = rows.unflatten(1, (-1, NVFP4.block))
        scale = _quotient(blocks.abs().amax(2) / _LARGEST_FP4, tensor_scale).clamp(max=_LARGEST).to(torch.float8_e4m3fn)
        codes = _to_e2m1(_quotient(blocks, tensor_scale * scale.float().unsqueeze(2))).flatten(1)
        return codes[:, ::2] << 4 | codes[:, 1::2], scale.view(torch.uint8)

    codes, scale = _by_rows(weight, encode)
    return {"codes": codes, "scale": _to_tiles(scale).view(torch.float8_e4m3fn), "tensor_scale": tensor_scale}


def nvfp4_layout(shape: tuple[int, ...]) -> Layout:
    """See the module's text."""
    return {"codes": (torch.uint8, (shape[0], shape[1] // 2)), "tensor_scale": (torch.float32, ()),
            "scale": (torch.float8_e4m3fn, _tiled(shape[0], shape[1] // NVFP4.block))}


def _quotient(numbers: Tensor, scale: Tensor) -> Tensor:
    """numbers / scale; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, numbers / scale)


def _to_e2m1(numbers: Tensor) -> Tensor:
    """The codes of the nearest 4-bit floats; of two as near, that of the even code."""
    sizes = numbers.abs()
    codes = torch.zeros_like(sizes, dtype=torch.uint8)
    for middle, upper in _MIDDLES:
        codes += sizes >= middle if upper else sizes > middle
    return codes | numbers.signbit().to(torch.uint8) << 3


def _by_rows(weight: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Iterable[Tensor]:
    """Both results of `encode`, which gets some rows at a time, so that its intermediate results stay small."""
    parts = [encode(rows) for rows in weight.split(max(1, _CHUNK // weight.shape[1]))]
    return (torch.cat(of_all) for of_all in zip(*parts))


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    return math.ceil(rows / 128) * 128, math.ceil(columns / 4) * 4


def _to_tiles(scales: Tensor) -> Tensor:
    """Block scales [rows, columns] filled up with zeros to tiles of 128x4, each stored as 32 times 4 groups of 4."""
    rows, columns = _tiled(*scales.shape)
    whole = F.pad(scales, (0, columns - scales.shape[1], 0, rows - scales.shape[0]))
    # Axes: tile row, which 32, row in 32, tile column, column in 4.
    return whole.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, columns)
