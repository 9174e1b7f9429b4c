"""Opens a GGUF file as a checkpoint: plain types as tensors, block formats as `Quantised` weights, nothing read.

GGUF files of diffusion models keep the official tensor names. Tensors of more than four dimensions, which ggml lacks,
are stored flat, with their shape as a value `comfy.gguf.orig_shape.NAME` (a convention of ComfyUI-GGUF's writer).
"""

import math
import mmap
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .gguf_blocks import FORMATS, BlockFormat
from .gguf_header import GGUFHeader, GGUFTensor, parse_gguf
from .mapping import mapped_tensor
from .quantised import Blocks, Quantised, blocks_nbytes
from .safetensors_header import HeaderError, UnreadableType

# ggml's type numbers (ggml.h, enum ggml_type).
_PLAIN = MappingProxyType({
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16})
_BLOCKS: Mapping[int, BlockFormat] = MappingProxyType({number: FORMATS[name] for number, name in (
    (2, "Q4_0"), (3, "Q4_1"), (6, "Q5_0"), (7, "Q5_1"), (8, "Q8_0"), (10, "Q2_K"), (11, "Q3_K"), (12, "Q4_K"),
    (13, "Q5_K"), (14, "Q6_K"), (20, "IQ4_NL"), (23, "IQ4_XS"))})
# Known and not supported, so that a refusal can name them.
_NAMES = MappingProxyType({
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"})

_SHAPE = "comfy.gguf.orig_shape."


class GGUFContents:
    """The tensors of a mapped GGUF file. Raises HeaderError for a damaged file or a type that cannot be read."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        with memoryview(mapping) as data:
            self.header = parse_gguf(data, _nbytes)
        self.shapes = {name: _shape(self.header, name, tensor) for name, tensor in self.header.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The values that are no lists, as text."""
        return {name: str(value) for name, value in self.header.values.items() if not isinstance(value, list)}

    @property
    def kept(self) -> dict[str, tuple[str, int]]:
        """Block format and bytes of each tensor that has one."""
        return {name: (_BLOCKS[tensor.kind].name, _nbytes(name, tensor.kind, tensor.shape))
                for name, tensor in self.header.tensors.items() if tensor.kind in _BLOCKS}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of each tensor that has one; that of a block format is the type it is computed in."""
        return {name: _PLAIN.get(tensor.kind, torch.bfloat16) for name, tensor in self.header.tensors.items()}

    def read(self, name: str) -> Tensor | Quantised:
        """The tensor as a view of the file."""
        tensor, shape = self.header.tensors[name], self.shapes[name]
        count = _nbytes(name, tensor.kind, tensor.shape)
        if tensor.kind in _PLAIN:
            dtype = _PLAIN[tensor.kind]
            if not count:
                return torch.empty(shape, dtype=dtype)
            return mapped_tensor(self._mapping, dtype, count // dtype.itemsize, tensor.start).view(shape)
        form = _BLOCKS[tensor.kind]
        raw = mapped_tensor(self._mapping, torch.uint8, count, tensor.start)
        return Quantised(Blocks(form), shape, {"raw": raw.view(-1, tensor.shape[-1] // form.size * form.nbytes)})


def _nbytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind in _PLAIN:
        return math.prod(shape) * _PLAIN[kind].itemsize
    if kind not in _BLOCKS:
        raise UnreadableType(f"holds the tensor {name!r} of type {_NAMES.get(kind, kind)}, which this version cannot "
                             "read")
    if not math.prod(shape):
        raise HeaderError(f"holds the tensor {name!r} of type {_BLOCKS[kind].name} without any numbers")
    try:
        return blocks_nbytes(_BLOCKS[kind], shape)
    except ValueError as error:
        raise HeaderError(f"holds the tensor {name!r}, of which {error}") from error


def _shape(header: GGUFHeader, name: str, tensor: GGUFTensor) -> tuple[int, ...]:
    shape = header.values.get(_SHAPE + name)
    if shape is None:
        return tensor.shape
    sound = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sound or math.prod(shape) != math.prod(tensor.shape):
        raise HeaderError(f"gives the tensor {name!r} of {list(tensor.shape)} the shape {shape}")
    return tuple(shape)
