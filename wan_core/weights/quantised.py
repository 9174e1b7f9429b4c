"""Weights that stay as they are stored, and the numbers that they stand for.

A `Quantised` weight is a few raw tensors (codes, scales, packed blocks), usually views of the mapped file, and the
scheme that says what they mean. It takes the place of a tensor wherever weights are read; whoever needs numbers asks it
for them and forgets them again.

FP8 and int8: codes * scale, with one scale for the whole weight, one a row, or one for each of equal parts of a row
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). MXFP8 (OCP Microscaling Formats 1.0) and NVFP4 have a scale
for each block of columns, in the order in which NVIDIA's matrix units want them. GGUF: see `gguf_blocks`.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .fused import fused_blocks, fused_scaled
from .gguf_blocks import BlockFormat


class Scheme(Protocol):
    """What the parts of a quantised weight mean."""

    @property
    def name(self) -> str:
        """For people: 'Q4_K', 'FP8 e4m3, scaled'."""

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The numbers, [rows, columns], computed in float32 and returned in `dtype`."""


@runtime_checkable
class RowScheme(Scheme, Protocol):
    """One of whose weights some rows can be had alone, as an embedding needs them."""

    def rows(self, parts: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """The parts of some rows; `index` [N]."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight of `shape` as it is stored."""

    scheme: Scheme
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return next(iter(self.parts.values())).device

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, of `shape` and in `dtype`, on the device of the parts."""
        return self.scheme.dequantise(self.parts, dtype).view(self.shape)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight of a `RowScheme`, as an embedding gives them: index [...] -> [..., columns]."""
        numbers = self.scheme.dequantise(self.scheme.rows(self.parts, index.flatten()), dtype)
        return numbers.view(*index.shape, -1)

    def check(self) -> None:
        """Raise ValueError if one of the float32 or half-precision parts, the scales, holds NaN or infinity."""
        for name, part in self.parts.items():
            scales = name != "codes" and part.dtype.is_floating_point and not part.is_meta
            if scales and not part.float().isfinite().all():
                raise ValueError(f"its {name.replace('_', ' ')} holds NaN or infinite values")

    def to(self, device: torch.device | str) -> "Quantised":
        """A copy on `device`; itself where it is there."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})


@dataclass(frozen=True)
class Scaled:
    """`codes` [rows, columns] of FP8 or int8, or its bytes; `scale`, if there is one: see the module's text.

    With `rotation` the weight was turned by a Hadamard matrix in groups of that many columns, which spreads outliers.
    """

    dtype: torch.dtype
    rotation: int | None = None

    @property
    def name(self) -> str:
        kinds = {torch.float8_e4m3fn: "FP8 e4m3", torch.float8_e5m2: "FP8 e5m2"}
        kind = kinds.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{kind}, rotated" if self.rotation else kind

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = self._codes(parts)
        if "scale" not in parts:
            return codes.to(dtype)
        numbers = None if self.rotation else fused_scaled(codes, parts["scale"], dtype)
        if numbers is not None:
            return numbers
        scale, rows = parts["scale"].float(), codes.shape[0] if codes.ndim else 1
        if scale.numel() == 1:
            numbers = codes.float() * scale.reshape(())
        else:
            # One scale a row is one part a row.
            equal_parts = codes.float().view(rows, scale.numel() // rows, -1)
            numbers = (equal_parts * scale.view(rows, -1, 1)).view(codes.shape)
        if self.rotation:
            numbers = (numbers.unflatten(-1, (-1, self.rotation)) @ _hadamard(self.rotation, codes.device)).flatten(-2)
        return numbers.to(dtype)

    def rows(self, parts: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        # Few kernels can pick rows of FP8; as bytes any can.
        codes = self._codes(parts)
        chosen = {"codes": codes.view(torch.uint8)[index].view(self.dtype) if codes.itemsize == 1 else codes[index]}
        if "scale" in parts:
            scale = parts["scale"]
            chosen["scale"] = scale.view(codes.shape[0], -1)[index] if scale.numel() > 1 else scale
        return chosen

    def _codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        codes = parts["codes"]
        return codes if codes.dtype == self.dtype else codes.view(self.dtype)


@dataclass(frozen=True)
class MXFP8:
    """`codes` [rows, columns] e4m3; `scale`, a power of two for each 32 columns (exponent + 127), swizzled."""

    block = 32
    codes_per_byte = 1

    @property
    def name(self) -> str:
        return "MXFP8"

    def scale_count(self, shape: tuple[int, ...]) -> int:
        """How many block scales a weight of `shape` has, those that only fill up tiles included."""
        return _tiled_count(shape[0], shape[1] // self.block)

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = parts["codes"].view(torch.float8_e4m3fn).float()
        exponents = _from_tiles(parts["scale"].view(torch.uint8), codes.shape[0], codes.shape[1] // self.block)
        # The exponent 0 marks a block of zeros.
        scale = torch.where(exponents == 0, 0.0, torch.exp2(exponents.float() - 127))
        return (codes.unflatten(1, (-1, self.block)) * scale.unsqueeze(-1)).flatten(1).to(dtype)


@dataclass(frozen=True)
class NVFP4:
    """`codes` [rows, columns / 2], two 4-bit floats a byte, the first in the upper half; `scale`, e4m3 for each 16
    columns, swizzled; `tensor_scale`, a number; `column_scale` [columns], if there is one."""

    block = 16
    codes_per_byte = 2

    @property
    def name(self) -> str:
        return "NVFP4"

    def scale_count(self, shape: tuple[int, ...]) -> int:
        """See `MXFP8`."""
        return _tiled_count(shape[0], shape[1] // self.block)

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        packed = parts["codes"].view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
        values = _fp4_numbers(codes.device)[codes.int()]
        scale = _from_tiles(parts["scale"].view(torch.float8_e4m3fn).float(), *codes.shape[:1],
                            codes.shape[1] // self.block)
        scale = scale * parts["tensor_scale"].float().reshape(())
        values = (values.unflatten(1, (-1, self.block)) * scale.unsqueeze(-1)).flatten(1)
        if "column_scale" in parts:
            values = values * parts["column_scale"].float()
        return values.to(dtype)


# Constants are made once for each device: to bring one there, the device would have to be waited for at every layer.
@functools.cache
def _fp4_numbers(device: torch.device) -> Tensor:
    """What the 16 codes of E2M1 stand for."""
    with torch.inference_mode(False):
        numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        return torch.cat([numbers, -numbers]).to(device)


@functools.cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """A symmetric Hadamard matrix over the root of its size, a power of 4: it is its own inverse."""
    with torch.inference_mode(False):
        quarter = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
        matrix = quarter
        while len(matrix) < size:
            matrix = torch.kron(matrix, quarter)
        return matrix.to(device)


def _tiled_count(rows: int, columns: int) -> int:
    return math.ceil(rows / 128) * 128 * math.ceil(columns / 4) * 4


def _from_tiles(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [rows, columns] from tiles of 128x4, each stored as 32 times 4 groups of 4 (cuBLAS, "1D Block
    Scaling Factors Layout")."""
    tiles = stored.flatten().view(math.ceil(rows / 128), math.ceil(columns / 4), 32, 4, 4)
    # Axes: tile row, tile column, row in 32, which 32, column in 4.
    return tiles.permute(0, 3, 2, 1, 4).reshape(math.ceil(rows / 128) * 128, -1)[:rows, :columns]


@dataclass(frozen=True)
class Blocks:
    """`raw` [rows, bytes] of a GGUF block format."""

    format: BlockFormat

    @property
    def name(self) -> str:
        return self.format.name

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        numbers = fused_blocks(self.format, parts["raw"], dtype)
        return self.format.dequantise(parts["raw"], dtype) if numbers is None else numbers

    def rows(self, parts: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        return {"raw": parts["raw"][index]}


def dense(weight: Tensor | Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers of a weight, whatever it is stored as; without `dtype` a tensor stays as it is."""
    if isinstance(weight, Quantised):
        return weight.dequantise(dtype or torch.float32)
    return weight if dtype is None else weight.to(dtype)


def blocks_nbytes(form: BlockFormat, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of `shape` in a block format. Raises ValueError where rows are no whole number of blocks."""
    if not shape or shape[-1] % form.size:
        raise ValueError(f"rows of {shape[-1] if shape else 1} numbers are no whole number of {form.name} blocks of "
                         f"{form.size}")
    return math.prod(shape) // form.size * form.nbytes
