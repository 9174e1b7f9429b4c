"""Quantises a model's weights: while it is loaded, or into a new file.

Quantised are the matrices of the blocks, as in the files that are published; embeddings, norms, biases, modulation and
head stay as they are: they are a few percent of the weights, and most of the loss would come from them.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from .gguf_blocks import FORMATS, quantise
from .quantised import Blocks, Quantised, Scaled, Scheme, blocks_nbytes, dense
from .tensor_file import TensorFile

_MATRIX = re.compile(r"(^|\.)(vace_)?blocks\.\d+\..*weight$")

# Largest numbers of the FP8 types; beyond them e4m3 has no infinity to fall back to.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@dataclass(frozen=True)
class Target:
    """A format that weights can be brought into: what it is called in files, and how a matrix becomes its parts."""

    container: str
    scheme: Scheme
    parts: Callable[[Tensor], dict[str, Tensor]]
    columns: int = 1

    @property
    def scaled(self) -> bool:
        """Whether weights have scales of their own beside them in the file."""
        return self.parts in (_per_tensor, _per_row)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight of that name and shape is one of those that are quantised."""
        return len(shape) == 2 and bool(_MATRIX.search(name)) and not shape[1] % self.columns


def _plain(dtype: torch.dtype) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda weight: {"codes": weight.clamp(-_LARGEST[dtype], _LARGEST[dtype]).to(dtype)}


def _scaled(weight: Tensor, peak: Tensor) -> dict[str, Tensor]:
    """FP8 codes and the scale that brings the `peak` of each part to the largest code."""
    largest = _LARGEST[torch.float8_e4m3fn]
    # A weight of zeros has any scale.
    scale = torch.where(peak == 0, 1.0, peak / largest)
    return {"codes": (weight / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), "scale": scale}


def _per_tensor(weight: Tensor) -> dict[str, Tensor]:
    return _scaled(weight, weight.abs().max())


def _per_row(weight: Tensor) -> dict[str, Tensor]:
    return _scaled(weight, weight.abs().amax(1, keepdim=True))


def _gguf(name: str) -> Target:
    return Target("gguf", Blocks(FORMATS[name]), lambda weight: {"raw": quantise(weight, name)}, FORMATS[name].size)


TARGETS: Mapping[str, Target] = MappingProxyType({
    "fp8_scaled": Target("safetensors", Scaled(torch.float8_e4m3fn), _per_tensor),
    "fp8_scaled_rows": Target("safetensors", Scaled(torch.float8_e4m3fn), _per_row),
    "fp8_e4m3": Target("safetensors", Scaled(torch.float8_e4m3fn), _plain(torch.float8_e4m3fn)),
    "fp8_e5m2": Target("safetensors", Scaled(torch.float8_e5m2), _plain(torch.float8_e5m2)),
    "q8_0": _gguf("Q8_0"),
    "q4_0": _gguf("Q4_0"),
})


@dataclass(frozen=True)
class Conversion:
    """A weight of a file, quantised whenever it is read."""

    name: str
    target: Target
    shape: tuple[int, ...]

    @property
    def scheme(self) -> Scheme:
        return self.target.scheme

    def nbytes(self, file: TensorFile) -> int:
        """See `Recipe`. By arithmetic, because PyTorch's first reckoning with tensors without data takes seconds."""
        if isinstance(self.target.scheme, Blocks):
            return blocks_nbytes(self.target.scheme.format, self.shape)
        scales = {_per_tensor: 1, _per_row: self.shape[0]}.get(self.target.parts, 0)
        return math.prod(self.shape) + 4 * scales

    def read(self, read: Callable[[str], Tensor | Quantised]) -> Quantised:
        """The quantised weight, from a function that gives the one in the file."""
        return Quantised(self.target.scheme, self.shape, self.target.parts(dense(read(self.name), torch.float32)))


def converted(file: TensorFile, form: str) -> TensorFile:
    """`file`, under official names, with its matrices quantised when they are read.

    Those that the file has quantised already stay as they are. Raises ValueError for an unknown format, or a file in
    which there is nothing to quantise.
    """
    if form not in TARGETS:
        raise ValueError(f"unknown weight format {form!r}; choose {', '.join(TARGETS)}.")
    target = TARGETS[form]
    recipes = {name: Conversion(name, target, shape) for name, shape in file.shapes().items()
               if target.fits(name, shape) and name not in file.quantised and math.prod(shape)}
    if not recipes:
        raise ValueError(f"{file.path.name} holds no weights that could be quantised to {form}; it may be quantised "
                         "already, or no transformer.")
    return file.renamed({**{name: name for name in file}, **recipes})
