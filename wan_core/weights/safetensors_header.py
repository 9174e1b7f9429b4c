"""Checks and decodes the header of a safetensors file.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length, a JSON object of that
length mapping each tensor's name to {dtype, shape, data_offsets}, then the tensors' bytes. The header comes from a
download and is trusted in nothing: every length and offset is checked against the file's size before anything is
mapped, and the tensors must cover the data exactly, so that no two share bytes and a truncated file cannot pass.
"""
import json
import math
from typing import NamedTuple

import torch

MAX_HEADER = 100_000_000

# The type codes of the format that torch has a type for; torch names, because older versions lack some of them.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}


class Entry(NamedTuple):
    """One tensor: type, shape, and where its bytes are, counted from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class HeaderError(ValueError):
    """The header is damaged or not one; the text completes "this file ..."."""


class UnreadableType(HeaderError):
    """The file is whole and holds a type of numbers that this version has no reader for."""


def looks_like_header(start: bytes, file_size: int) -> bool:
    """Whether the first bytes of a file can be those of a safetensors file, be it a truncated one."""
    return (len(start) >= 9 and start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER
            and file_size > 8)


def parse_header(header: bytes, data_size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the tensors and the metadata of a header whose file has `data_size` bytes after it.

    Raises HeaderError for anything the format does not allow, and for a file longer or shorter than its header says.
    """
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"has a header that is not JSON ({type(error).__name__})") from error
    if not isinstance(table, dict):
        raise HeaderError("has a header that is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("has metadata that is not a table of strings")
    entries = {name: _entry(name, value) for name, value in table.items()}
    _check_cover(entries, data_size)
    return entries, metadata


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise HeaderError("has a header that names a tensor twice")
    return table


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise HeaderError(f"has a header entry {name!r} without dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = getattr(torch, DTYPES.get(code, ""), None) if isinstance(code, str) else None
    if dtype is None:
        raise UnreadableType(f"holds the tensor {name!r} of type {code!r}, which this version cannot read")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"has a header entry {name!r} with an impossible shape or offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise HeaderError(f"gives the tensor {name!r} {offsets[1] - offsets[0]} bytes, where its shape {shape} of "
                          f"{code} takes {math.prod(shape) * dtype.itemsize}")
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(entries: dict[str, Entry], data_size: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise HeaderError(f"has the tensor {name!r} at byte {entry.start} of its data, where {position} is due")
        position = entry.end
    if position > data_size:
        raise HeaderError(f"is truncated: its header promises {position} bytes of tensors and {data_size} are there")
    if position < data_size:
        raise HeaderError(f"has {data_size - position} bytes after its last tensor")
