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

from . import encode
from .encode import Encoder, Layout, LayoutOf
from .gguf_blocks import FORMATS
from .gguf_encode import quantise
from .quantised import MXFP8, NVFP4, Blocks, Quantised, Scaled, Scheme, dense
from .tensor_file import TensorFile

_MATRIX = re.compile(r"(^|\.)(vace_)?blocks\.\d+\..*weight$")


@dataclass(frozen=True)
class Target:
    """A format that weights can be brought into: how a matrix becomes its parts, and what these are like.

    `rows` and `columns` of a matrix must be multiples; where blocks may run across rows, in memory but not in a file,
    `columns` counts for the number of elements. `stated` is what the newer kind of safetensors files calls the format.
    """

    container: str
    scheme: Scheme
    parts: Encoder
    layout: LayoutOf
    rows: int = 1
    columns: int = 1
    stated: str | None = None

    def fits(self, name: str, shape: tuple[int, ...], in_file: bool = False) -> bool:
        """Whether a weight of that name and shape is one of those that are quantised, in memory or in a file."""
        if len(shape) != 2 or not math.prod(shape) or not _MATRIX.search(name):
            return False
        across = isinstance(self.scheme, Blocks) and not in_file
        return not (shape[0] % self.rows or (math.prod(shape) if across else shape[1]) % self.columns)


def _gguf(name: str) -> Target:
    form = FORMATS[name]

    def parts(weight: Tensor) -> dict[str, Tensor]:
        # Where rows are no whole number of blocks, each block is a row.
        return {"raw": quantise(weight.reshape(-1, form.size) if weight.shape[1] % form.size else weight, name)}

    def layout(shape: tuple[int, ...]) -> Layout:
        count = math.prod(shape) // form.size
        rows = count if shape[1] % form.size else shape[0]
        return {"raw": (torch.uint8, (rows, count // rows * form.nbytes))}

    return Target("gguf", Blocks(form), parts, layout, columns=form.size)


def _plain(dtype: torch.dtype) -> Target:
    return Target("safetensors", Scaled(dtype), encode.plain(dtype), encode.plain_layout(dtype))


TARGETS: Mapping[str, Target] = MappingProxyType({
    "fp8_scaled": Target("safetensors", Scaled(torch.float8_e4m3fn), encode.per_tensor, encode.per_tensor_layout),
    "fp8_scaled_rows": Target("safetensors", Scaled(torch.float8_e4m3fn), encode.per_row, encode.per_row_layout),
    "fp8_e4m3": _plain(torch.float8_e4m3fn),
    "fp8_e5m2": _plain(torch.float8_e5m2),
    **{name.lower(): _gguf(name) for name in (
        "Q8_0", "Q4_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")},
    "int8": Target("safetensors", Scaled(torch.int8), encode.int8, encode.int8_layout, stated="int8_tensorwise"),
    # Other programs expect whole blocks of rows, too.
    "mxfp8": Target("safetensors", MXFP8(), encode.mxfp8, encode.mxfp8_layout, MXFP8.block, MXFP8.block, "mxfp8"),
    "nvfp4": Target("safetensors", NVFP4(), encode.nvfp4, encode.nvfp4_layout, NVFP4.block, NVFP4.block, "nvfp4"),
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
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.target.layout(self.shape).values())

    def read(self, read: Callable[[str], Tensor | Quantised]) -> Quantised:
        """The quantised weight, from a function that gives the one in the file; without numbers where that has none."""
        weight = read(self.name)
        if isinstance(weight, Tensor) and weight.is_meta:
            layout = self.target.layout(self.shape)
            return Quantised(self.target.scheme, self.shape, {
                part: torch.empty(shape, dtype=dtype, device="meta") for part, (dtype, shape) in layout.items()})
        return Quantised(self.target.scheme, self.shape, self.target.parts(dense(weight, torch.float32)))


def converted(file: TensorFile, form: str, in_file: bool = False) -> TensorFile:
    """`file`, under official names, with its matrices quantised when they are read.

    Those that the file has quantised already stay as they are, and so do those whose sizes do not fit the format; for
    a file that is written (`in_file`) the rules of its kind count. Raises ValueError for an unknown format, or a file
    in which there is nothing to quantise.
    """
    if form not in TARGETS:
        raise ValueError(f"unknown weight format {form!r}; choose {', '.join(TARGETS)}.")
    target = TARGETS[form]
    recipes = {name: Conversion(name, target, shape) for name, shape in file.shapes().items()
               if target.fits(name, shape, in_file) and name not in file.quantised}
    if not recipes:
        whole = any(_MATRIX.search(name) and name not in file.quantised for name in file)
        why = f"the sizes of its matrices are no multiples of {target.columns}, choose another format" if whole else \
            "it may be quantised already, or no transformer"
        raise ValueError(f"{file.path.name} holds no weights that could be quantised to {form}; {why}.")
    return file.renamed({**{name: name for name in file}, **recipes})
