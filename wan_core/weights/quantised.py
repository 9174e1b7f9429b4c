"""Weights that stay as they are stored, and the numbers that they stand for.

A `Quantised` weight is a few raw tensors (codes, scales, packed blocks), usually views of the mapped file, and the
scheme that says what they mean. It takes the place of a tensor wherever weights are read; whoever needs numbers asks it
for them and forgets them again.

FP8 and int8: codes * scale, with one scale for the whole weight or one a row (Micikevicius et al. 2022, "FP8 Formats
for Deep Learning"). GGUF: see `gguf_blocks`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .gguf_blocks import BlockFormat


class Scheme(Protocol):
    """What the parts of a quantised weight mean."""

    @property
    def name(self) -> str:
        """For people: 'Q4_K', 'FP8 e4m3, scaled'."""

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The numbers, [rows, columns], computed in float32 and returned in `dtype`."""

    def rows(self, parts: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        """The parts of some rows only; `index` [N]."""


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

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, of `shape` and in `dtype`, on the device of the parts."""
        return self.scheme.dequantise(self.parts, dtype).view(self.shape)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight [rows, columns], as an embedding gives them: index [...] -> [..., columns]."""
        numbers = self.scheme.dequantise(self.scheme.rows(self.parts, index.flatten()), dtype)
        return numbers.view(*index.shape, -1)

    def to(self, device: torch.device | str) -> "Quantised":
        """A copy on `device`; itself where it is there."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})


@dataclass(frozen=True)
class Scaled:
    """`codes` [rows, columns] of FP8 or int8; `scale`, if there is one, a number, [1] or [rows, 1]."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        kinds = {torch.float8_e4m3fn: "FP8 e4m3", torch.float8_e5m2: "FP8 e5m2", torch.int8: "int8"}
        return kinds[self.dtype]

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        if "scale" not in parts:
            return parts["codes"].to(dtype)
        return (parts["codes"].float() * parts["scale"].float()).to(dtype)

    def rows(self, parts: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        # Few kernels can pick rows of FP8; as bytes any can.
        codes = parts["codes"].view(torch.uint8)[index].view(self.dtype)
        if "scale" not in parts:
            return {"codes": codes}
        scale = parts["scale"]
        return {"codes": codes, "scale": scale[index] if scale.numel() > 1 else scale}


@dataclass(frozen=True)
class Blocks:
    """`raw` [rows, bytes] of a GGUF block format."""

    format: BlockFormat

    @property
    def name(self) -> str:
        return self.format.name

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return self.format.dequantise(parts["raw"], dtype)

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
