"""Checks and decodes the header of a GGUF file.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian): magic, version, two
counts, a table of typed values, a table of tensors, then the tensors' bytes from the next multiple of the alignment on.
The header comes from a download and is trusted in nothing: counts are bounded, every length is checked against the
file's size before it is followed, and no two tensors may share bytes.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from .safetensors_header import HeaderError

MAGIC = b"GGUF"

# Far above any model's: a text encoder has 256,384 tokens, the largest transformer 1,500 tensors.
_MAX_ITEMS = 1 << 20
_MAX_DIMS = 8

# Type number -> struct code of the values that have a fixed size. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Value = int | float | bool | str | list


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: ggml's type number, shape in PyTorch's order, and where its bytes begin in the file."""

    kind: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class GGUFHeader:
    """The table of values and the tensors of a file."""

    values: dict[str, Value]
    tensors: dict[str, GGUFTensor]


def parse_gguf(data: memoryview, nbytes_of: Callable[[str, int, tuple[int, ...]], int]) -> GGUFHeader:
    """The header of the file `data`. `nbytes_of(name, type, shape)` says how many bytes a tensor takes.

    Raises HeaderError, which completes "this file ...", for anything that the format does not allow, and what
    `nbytes_of` raises.
    """
    reader = _Reader(data)
    reader.take(len(MAGIC))
    version = reader.scalar("I")
    if version not in (2, 3):
        swapped = version >> 24 in (2, 3)
        raise HeaderError(f"is a GGUF file {'of a big-endian machine' if swapped else f'of version {version}'}, which "
                          "this version cannot read")
    tensor_count, value_count = reader.scalar("Q"), reader.scalar("Q")
    if max(tensor_count, value_count) > _MAX_ITEMS:
        raise HeaderError(f"promises {tensor_count} tensors and {value_count} values, which is damage")
    values: dict[str, Value] = {}
    for _ in range(value_count):
        name = reader.string()
        if name in values:
            raise HeaderError(f"has a header that gives the value {name!r} twice")
        values[name] = reader.value(reader.scalar("I"))
    entries = {}
    for _ in range(tensor_count):
        name = reader.string()
        if name in entries:
            raise HeaderError(f"has a header that names the tensor {name!r} twice")
        entries[name] = _entry(reader, name)
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
        raise HeaderError(f"has the impossible alignment {alignment!r}")
    for name, entry in entries.items():
        if entry.start % alignment:
            raise HeaderError(f"has the tensor {name!r} at byte {entry.start}, which is no multiple of {alignment}")
    start = -(-reader.position // alignment) * alignment
    tensors = {name: GGUFTensor(entry.kind, entry.shape, start + entry.start) for name, entry in entries.items()}
    _check_places(tensors, len(data), nbytes_of)
    return GGUFHeader(values, tensors)


def _entry(reader: "_Reader", name: str) -> GGUFTensor:
    count = reader.scalar("I")
    if count > _MAX_DIMS:
        raise HeaderError(f"gives the tensor {name!r} {count} dimensions")
    # ggml writes the innermost dimension first.
    shape = tuple(reversed([reader.scalar("Q") for _ in range(count)]))
    if math.prod(shape) >= 1 << 62 or any(size >= 1 << 62 for size in shape):
        raise HeaderError(f"gives the tensor {name!r} the impossible shape {list(shape)}")
    return GGUFTensor(reader.scalar("I"), shape, reader.scalar("Q"))


def _check_places(tensors: dict[str, GGUFTensor], size: int,
                  nbytes_of: Callable[[str, int, tuple[int, ...]], int]) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise HeaderError(f"has the tensor {name!r} at byte {tensor.start}, inside the one before it")
        end = tensor.start + nbytes_of(name, tensor.kind, tensor.shape)
        if end > size:
            raise HeaderError(f"is truncated: its tensor {name!r} ends at byte {end} of {size}")


class _Reader:
    """Reads one value after the other and never past the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> int:
        """Moves on by `count` bytes; returns where they begin."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise HeaderError("is truncated: its header goes on past the end of the file")
        return start

    def scalar(self, code: str) -> int | float | bool:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        try:
            return str(self.data[start:start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise HeaderError("has a header with text that is not UTF-8") from error

    def value(self, kind: int) -> Value:
        if kind == _ARRAY:
            return self._array()
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise HeaderError(f"has a header with a value of the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ITEMS:
            raise HeaderError(f"has a header with a list of {count} values")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise HeaderError(f"has a header with a list of the unsupported type {kind}")
        code = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack_from(code, self.data, self.take(struct.calcsize(code))))
