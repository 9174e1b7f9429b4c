"""The block formats of GGUF: raw bytes to numbers; `gguf_encode` is the way back.

A format cuts each row into blocks of 32 or 256 numbers and stores each block as integer codes with one or two levels of
scales. Every format here comes out as scale * code + offset, computed in float32 in this order, which makes the result
bit-equal to that of the gguf package (`gguf/quants.py`); the layouts are those of llama.cpp's `ggml-common.h`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

# What the codes of the IQ4 formats stand for.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Codes [N, groups, size] as whole numbers, scale [N, groups or 1, 1] and offset of the same shape, or None, in float32.
Unpacked = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class BlockFormat:
    """`size` numbers in a block, and how its bytes are cut up: name of a field -> number of bytes."""

    name: str
    size: int
    fields: Mapping[str, int]
    unpack: Callable[[dict[str, Tensor]], Unpacked]

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(self.fields.values())

    def dequantise(self, raw: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of raw bytes [..., K * nbytes] uint8 as numbers [..., K * size], computed in float32."""
        blocks = raw.reshape(-1, self.nbytes)
        fields = dict(zip(self.fields, blocks.split(tuple(self.fields.values()), 1)))
        codes, scale, offset = self.unpack(fields)
        values = scale * codes.float()
        if offset is not None:
            values += offset
        return values.to(out_dtype).reshape(*raw.shape[:-1], -1)


def _half(field: Tensor) -> Tensor:
    """Two bytes of each block [N, 2] as a float16, in float32 [N, 1, 1]."""
    return field.contiguous().view(torch.float16).float().unsqueeze(-1)


def _planes(packed: Tensor, length: int, bits: int) -> Tensor:
    """Codes of `bits` bits [N, groups, length]: each run of `length` bytes holds 8 / bits groups, the lowest first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    runs = packed.reshape(len(packed), -1, 1, length)
    return (runs >> shifts & (1 << bits) - 1).flatten(1, 2)


def _bits(field: Tensor) -> Tensor:
    """The bits of four bytes [N, 4], the lowest first: [N, 1, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=field.device)
    return (field.unsqueeze(-1) >> shifts & 1).flatten(1).unsqueeze(1)


def _nibbles(field: Tensor) -> Tensor:
    """Low and high halves of 16 bytes: [N, 1, 32]."""
    return _planes(field, 16, 4).flatten(1).unsqueeze(1)


def _q4_0(block: dict[str, Tensor]) -> Unpacked:
    return _nibbles(block["codes"]).to(torch.int8) - 8, _half(block["scale"]), None


def _q4_1(block: dict[str, Tensor]) -> Unpacked:
    return _nibbles(block["codes"]), _half(block["scale"]), _half(block["minimum"])


def _q5(block: dict[str, Tensor]) -> Tensor:
    return _nibbles(block["codes"]) | _bits(block["high"]) << 4


def _q5_0(block: dict[str, Tensor]) -> Unpacked:
    return _q5(block).to(torch.int8) - 16, _half(block["scale"]), None


def _q5_1(block: dict[str, Tensor]) -> Unpacked:
    return _q5(block), _half(block["scale"]), _half(block["minimum"])


def _q8_0(block: dict[str, Tensor]) -> Unpacked:
    return block["codes"].view(torch.int8).unsqueeze(1), _half(block["scale"]), None


def _q2_k(block: dict[str, Tensor]) -> Unpacked:
    scales = block["scales"].unsqueeze(-1)
    codes = _planes(block["codes"], 32, 2).reshape(len(scales), 16, 16)
    return codes, _half(block["scale"]) * (scales & 15).float(), -(_half(block["minimum"]) * (scales >> 4).float())


def _q3_k(block: dict[str, Tensor]) -> Unpacked:
    low, high = block["scales"].split((8, 4), 1)
    scales = _planes(low, 8, 4).flatten(1) | _planes(high, 4, 2).flatten(1) << 4
    # A bit of the mask that is not set takes 4 away.
    high_bit = _planes(block["mask"], 32, 1)
    codes = (_planes(block["codes"], 32, 2) | high_bit << 2).to(torch.int8) - 4
    scale = _half(block["scale"]) * (scales.to(torch.int8) - 32).float().unsqueeze(-1)
    return codes.reshape(len(scales), 16, 16), scale, None


def _k_scales(block: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and offset [N, 8, 1] of Q4_K and Q5_K: 6 bits each in 12 bytes, the upper two of the last four apart."""
    scale, minimum, last = block["scales"].split(4, 1)
    scales = torch.cat([scale & 63, last & 15 | scale >> 2 & 48], 1).float().unsqueeze(-1)
    minima = torch.cat([minimum & 63, last >> 4 | minimum >> 2 & 48], 1).float().unsqueeze(-1)
    return _half(block["scale"]) * scales, -(_half(block["minimum"]) * minima)


def _q4_k(block: dict[str, Tensor]) -> Unpacked:
    return _planes(block["codes"], 32, 4), *_k_scales(block)


def _q5_k(block: dict[str, Tensor]) -> Unpacked:
    return _planes(block["codes"], 32, 4) | _planes(block["high"], 32, 1) << 4, *_k_scales(block)


def _q6_k(block: dict[str, Tensor]) -> Unpacked:
    low = _planes(block["codes"], 64, 4).reshape(-1, 8, 32)
    codes = (low | _planes(block["high"], 32, 2) << 4).to(torch.int8) - 32
    scales = block["scales"].view(torch.int8).float().unsqueeze(-1)
    return codes.reshape(-1, 16, 16), _half(block["scale"]) * scales, None


def _iq4(codes: Tensor) -> Tensor:
    return _iq4_values(codes.device)[codes.int()]


@functools.cache
def _iq4_values(device: torch.device) -> Tensor:
    """Made once for each device, which would have to be waited for at every layer."""
    with torch.inference_mode(False):
        return torch.tensor(IQ4_VALUES, dtype=torch.int8).to(device)


def _iq4_nl(block: dict[str, Tensor]) -> Unpacked:
    return _iq4(_nibbles(block["codes"])), _half(block["scale"]), None


def _iq4_xs(block: dict[str, Tensor]) -> Unpacked:
    # Four bits of each scale lie in one field, two more in the other.
    low, high = _planes(block["scales_low"], 1, 4).flatten(1), _planes(block["scales_high"], 1, 2).flatten(1)
    scales = ((low | high << 4).to(torch.int8) - 32).float().unsqueeze(-1)
    codes = _planes(block["codes"], 16, 4).reshape(-1, 8, 32)
    return _iq4(codes), _half(block["scale"]) * scales, None


FORMATS: Mapping[str, BlockFormat] = MappingProxyType({item.name: item for item in (
    BlockFormat("Q4_0", 32, {"scale": 2, "codes": 16}, _q4_0),
    BlockFormat("Q4_1", 32, {"scale": 2, "minimum": 2, "codes": 16}, _q4_1),
    BlockFormat("Q5_0", 32, {"scale": 2, "high": 4, "codes": 16}, _q5_0),
    BlockFormat("Q5_1", 32, {"scale": 2, "minimum": 2, "high": 4, "codes": 16}, _q5_1),
    BlockFormat("Q8_0", 32, {"scale": 2, "codes": 32}, _q8_0),
    BlockFormat("Q2_K", 256, {"scales": 16, "codes": 64, "scale": 2, "minimum": 2}, _q2_k),
    BlockFormat("Q3_K", 256, {"mask": 32, "codes": 64, "scales": 12, "scale": 2}, _q3_k),
    BlockFormat("Q4_K", 256, {"scale": 2, "minimum": 2, "scales": 12, "codes": 128}, _q4_k),
    BlockFormat("Q5_K", 256, {"scale": 2, "minimum": 2, "scales": 12, "high": 32, "codes": 128}, _q5_k),
    BlockFormat("Q6_K", 256, {"codes": 128, "high": 64, "scales": 16, "scale": 2}, _q6_k),
    BlockFormat("IQ4_NL", 32, {"scale": 2, "codes": 16}, _iq4_nl),
    BlockFormat("IQ4_XS", 256, {"scale": 2, "scales_high": 2, "scales_low": 4, "codes": 128}, _iq4_xs),
)})
