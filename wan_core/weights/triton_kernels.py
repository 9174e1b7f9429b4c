"""Numbers of packed weights in one pass on a GPU: raw bytes are read once, the numbers are written once.

The same arithmetic in PyTorch makes several intermediate tensors, each larger than the weight. The kernels compute in
float32 and in the order of `gguf_blocks` and `Scaled`, so the numbers are theirs, bit for bit; a compiler that joins a
product and a sum into one operation, although it is told not to, changes the last rounding of formats with an offset.

This module imports Triton, which may be missing and takes long to import: `fused` imports it when it is needed. A
tile is [rows, width]; whatever is the same for the numbers of a row (scales, shifts, the place of its first byte) is
computed once a row. Blocks have odd sizes, so everything is read byte by byte. FP8 is decoded by way of float16, since
Triton knows e4m3 on new cards only. Reference: Tillet et al. 2019, "Triton: An Intermediate Language and Compiler for
Tiled Neural Network Computations".
"""

from collections.abc import Callable, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gguf_blocks import IQ4_VALUES, BlockFormat

# Numbers that a program makes: a multiple of every block's size.
_TILE = 2048


def dequantise_blocks(form: BlockFormat, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of raw bytes [..., K * nbytes] uint8 as numbers [..., K * size] in float32, bfloat16 or float16.

    The device of `raw` has to be the current one.
    """
    kernel, constants = kernel_of(form)
    raw = raw.contiguous()
    count = raw.numel() // form.nbytes
    out = torch.empty(*raw.shape[:-1], raw.shape[-1] // form.nbytes * form.size, dtype=dtype, device=raw.device)
    if count:
        kernel[(triton.cdiv(count * form.size, _TILE),)](raw, _as_bits(out), count, enable_fp_fusion=False, **constants)
    return out


def kernel_of(form: BlockFormat) -> tuple[Callable[..., Any], dict[str, int]]:
    """The kernel of a block format and its constants: sizes, where the fields of a block begin, and options."""
    kernel, options = _BLOCK_KERNELS[form.name]
    ends = accumulate(form.fields.values())
    fields = {name.upper(): end - form.fields[name] for name, end in zip(form.fields, ends)}
    return kernel, {"NBYTES": form.nbytes, "TILE": _TILE, **fields, **options}


def dequantise_scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [...] of FP8 or int8 times their scales, one for each of N equal parts in the order of memory.

    `scale` has N numbers, and N divides the number of codes. The result is in float32, bfloat16 or float16. The device
    of `codes` has to be the current one.
    """
    codes, scale = codes.contiguous(), scale.float().contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not codes.numel():
        return out
    parts = scale.numel()
    length = codes.numel() // parts
    width = min(triton.next_power_of_2(length), _TILE)
    height = _TILE // width
    tiles = triton.cdiv(length, width)
    _scaled[(triton.cdiv(parts, height) * tiles,)](
        codes.view(torch.uint8), scale, _as_bits(out), parts, length, tiles, KIND=_KINDS[codes.dtype], HEIGHT=height,
        WIDTH=width, enable_fp_fusion=False)
    return out


def round_rows(rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [N, K] in e4m3 of `rows` [N, K] over their scales, and the scales.

    `scale` is one for all rows, a number; None: one of each row is measured, [N, 1], with which its largest number
    becomes the largest code. No number may be larger than that. The device of `rows` has to be the current one, and to
    know e4m3.
    """
    rows = rows.contiguous()
    count, width = rows.shape
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    scales = torch.empty(count, 1, device=rows.device) if scale is None else scale
    if rows.numel():
        tile = triton.next_power_of_2(width)
        info = torch.finfo(codes.dtype), torch.finfo(torch.float32)
        _rounded[(count,)](rows, codes, scales, MEASURED=scale is None, LARGEST=info[0].max, SMALLEST=info[1].tiny,
                           WIDTH=width, TILE=tile, num_warps=min(max(tile // 1024, 1), 16), enable_fp_fusion=True)
    return codes, scales


def _as_bits(out: Tensor) -> Tensor:
    """Kernels write bfloat16 as int16, see `_write`."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


@triton.jit
def _byte(raw, place, inside):
    return tl.load(raw + place, mask=inside, other=0).to(tl.int32)


@triton.jit
def _signed(byte):
    return byte.to(tl.int8).to(tl.int32)


@triton.jit
def _half(raw, place, inside):
    """The float16 in two bytes, as float32."""
    bits = _byte(raw, place, inside) | _byte(raw, place + 1, inside) << 8
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rows(count, SIZE: tl.constexpr, NBYTES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Of the rows of `WIDTH` numbers in this program's blocks of `SIZE`: where their block begins, which row of the
    block each is, and whether the block exists."""
    row = tl.arange(0, TILE // WIDTH)
    block = tl.program_id(0).to(tl.int64) * (TILE // SIZE) + row // (SIZE // WIDTH)
    return block * NBYTES, row % (SIZE // WIDTH), block < count


@triton.jit
def _planes(raw, field, row, inside, WIDTH: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr):
    """Codes of `BITS` bits [rows, WIDTH]: each run of `LENGTH` bytes of a field holds 8 / BITS groups of as many
    numbers, the lowest bits first."""
    group = row * WIDTH // LENGTH
    place = field + group // (8 // BITS) * LENGTH + row * WIDTH % LENGTH
    byte = _byte(raw, place[:, None] + tl.arange(0, WIDTH)[None, :], inside[:, None])
    return byte >> (group % (8 // BITS) * BITS)[:, None] & ((1 << BITS) - 1)


@triton.jit
def _iq4(codes, LOW: tl.constexpr, HIGH: tl.constexpr):
    """What codes of the IQ4 formats stand for: one of the sixteen bytes of two words."""
    words = tl.where(codes < 8, LOW, HIGH)
    return _signed(words >> ((codes & 7) * 8).to(tl.int64))


@triton.jit
def _write(out, place, values, inside):
    """Store float32 values in the type of `out`, int16 being the bits of bfloat16: the cards before Ampere have no
    instruction that rounds to it."""
    if out.dtype.element_ty == tl.int16:
        bits = values.to(tl.uint32, bitcast=True)
        # To the nearest, and of two equally near ones to the even one.
        bits = bits + 0x7FFF + (bits >> 16 & 1)
        bits = tl.where(values == values, bits >> 16, 0x7FC0)
        tl.store(out + place, bits.to(tl.int16), mask=inside)
    else:
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _write_rows(out, values, inside, WIDTH: tl.constexpr, TILE: tl.constexpr):
    place = tl.arange(0, TILE // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    _write(out, tl.program_id(0).to(tl.int64) * TILE + place, values, inside[:, None])


@triton.jit
def _blocks_of_32(raw, out, count, NBYTES: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, CODES: tl.constexpr,
                  BITS: tl.constexpr, MINIMUM: tl.constexpr = -1, HIGH: tl.constexpr = -1,
                  IQ4_LOW: tl.constexpr = 0, IQ4_HIGH: tl.constexpr = 0):
    """Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL; a field that the format lacks is at -1."""
    block, row, inside = _rows(count, 32, NBYTES, 16, TILE)
    if BITS == 8:
        codes = _signed(_planes(raw, block + CODES, row, inside, 16, 32, 8))
    else:
        codes = _planes(raw, block + CODES, row, inside, 16, 16, 4)
    if HIGH >= 0:
        place = block + HIGH + row * 2
        high = _byte(raw, place, inside) | _byte(raw, place + 1, inside) << 8
        codes = codes | (high[:, None] >> tl.arange(0, 16)[None, :] & 1) << 4
    if IQ4_LOW != 0:
        codes = _iq4(codes, IQ4_LOW, IQ4_HIGH)
    elif BITS < 8 and MINIMUM < 0:
        codes = codes - (1 << BITS - 1)
    values = _half(raw, block + SCALE, inside)[:, None] * codes.to(tl.float32)
    if MINIMUM >= 0:
        values = values + _half(raw, block + MINIMUM, inside)[:, None]
    _write_rows(out, values, inside, 16, TILE)


@triton.jit
def _q2_k(raw, out, count, NBYTES: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, CODES: tl.constexpr,
          SCALE: tl.constexpr, MINIMUM: tl.constexpr):
    block, row, inside = _rows(count, 256, NBYTES, 16, TILE)
    codes = _planes(raw, block + CODES, row, inside, 16, 32, 2)
    scales = _byte(raw, block + SCALES + row, inside)
    scale = _half(raw, block + SCALE, inside) * (scales & 15).to(tl.float32)
    minimum = _half(raw, block + MINIMUM, inside) * (scales >> 4).to(tl.float32)
    _write_rows(out, scale[:, None] * codes.to(tl.float32) - minimum[:, None], inside, 16, TILE)


@triton.jit
def _q3_k(raw, out, count, NBYTES: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, CODES: tl.constexpr,
          SCALES: tl.constexpr, SCALE: tl.constexpr):
    block, row, inside = _rows(count, 256, NBYTES, 16, TILE)
    low = _byte(raw, block + SCALES + row % 8, inside) >> row // 8 * 4 & 15
    high = _byte(raw, block + SCALES + 8 + row % 4, inside) >> row // 4 * 2 & 3
    scale = _half(raw, block + SCALE, inside) * ((low | high << 4) - 32).to(tl.float32)
    codes = _planes(raw, block + CODES, row, inside, 16, 32, 2)
    # A bit of the mask that is not set takes 4 away.
    codes = (codes | _planes(raw, block + MASK, row, inside, 16, 32, 1) << 2) - 4
    _write_rows(out, scale[:, None] * codes.to(tl.float32), inside, 16, TILE)


@triton.jit
def _q4_k_q5_k(raw, out, count, NBYTES: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, MINIMUM: tl.constexpr,
               SCALES: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr = -1):
    """Q4_K has no field of high bits: it is at -1."""
    block, row, inside = _rows(count, 256, NBYTES, 32, TILE)
    codes = _planes(raw, block + CODES, row, inside, 32, 32, 4)
    if HIGH >= 0:
        codes = codes | _planes(raw, block + HIGH, row, inside, 32, 32, 1) << 4
    place = block + SCALES + row % 4
    # Six bits each; the upper two of the last four scales and minima lie apart.
    first, second, last = _byte(raw, place, inside), _byte(raw, place + 4, inside), _byte(raw, place + 8, inside)
    scales = tl.where(row < 4, first & 63, last & 15 | first >> 2 & 48).to(tl.float32)
    minima = tl.where(row < 4, second & 63, last >> 4 | second >> 2 & 48).to(tl.float32)
    scale = _half(raw, block + SCALE, inside) * scales
    minimum = _half(raw, block + MINIMUM, inside) * minima
    _write_rows(out, scale[:, None] * codes.to(tl.float32) - minimum[:, None], inside, 32, TILE)


@triton.jit
def _q6_k(raw, out, count, NBYTES: tl.constexpr, TILE: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr,
          SCALES: tl.constexpr, SCALE: tl.constexpr):
    block, row, inside = _rows(count, 256, NBYTES, 16, TILE)
    low = _planes(raw, block + CODES, row, inside, 16, 64, 4)
    codes = (low | _planes(raw, block + HIGH, row, inside, 16, 32, 2) << 4) - 32
    scales = _signed(_byte(raw, block + SCALES + row, inside)).to(tl.float32)
    scale = _half(raw, block + SCALE, inside) * scales
    _write_rows(out, scale[:, None] * codes.to(tl.float32), inside, 16, TILE)


@triton.jit
def _iq4_xs(raw, out, count, NBYTES: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, SCALES_HIGH: tl.constexpr,
            SCALES_LOW: tl.constexpr, CODES: tl.constexpr, IQ4_LOW: tl.constexpr, IQ4_HIGH: tl.constexpr):
    block, row, inside = _rows(count, 256, NBYTES, 16, TILE)
    # Two rows have a scale in common.
    group = row // 2
    low = _byte(raw, block + SCALES_LOW + group // 2, inside) >> group % 2 * 4 & 15
    high = _byte(raw, block + SCALES_HIGH + group // 4, inside) >> group % 4 * 2 & 3
    scale = _half(raw, block + SCALE, inside) * ((low | high << 4) - 32).to(tl.float32)
    codes = _iq4(_planes(raw, block + CODES, row, inside, 16, 16, 4), IQ4_LOW, IQ4_HIGH)
    _write_rows(out, scale[:, None] * codes.to(tl.float32), inside, 16, TILE)


@triton.jit
def _scaled(codes, scale, out, parts, length, tiles, KIND: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of `HEIGHT` parts and `WIDTH` of the `length` columns of each; `tiles` are needed for all columns."""
    program = tl.program_id(0)
    part = (program // tiles).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = (program % tiles).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    place = part[:, None] * length + column[None, :]
    inside = (part < parts)[:, None] & (column < length)[None, :]
    byte = _byte(codes, place, inside)
    if KIND == "int8":
        numbers = _signed(byte).to(tl.float32)
    elif KIND == "e5m2":
        # The upper half of a float16.
        numbers = (byte << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # The fields of e4m3 put in those of float16 are a number that is 2^8 times too small, subnormal ones too; of
        # the codes with all bits set, which are NaN, NaN is made apart.
        size = byte & 0x7F
        bits = tl.where(size == 0x7F, 0x7E00, (byte & 0x80) << 8 | size << 7)
        numbers = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    numbers = numbers * tl.load(scale + part, mask=part < parts, other=0)[:, None]
    _write(out, place, numbers, inside)


@triton.jit
def _rounded(rows, codes, scales, MEASURED: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
             WIDTH: tl.constexpr, TILE: tl.constexpr):
    """A row of numbers, read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    numbers = tl.load(rows + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if MEASURED:
        # A row of zeros has a scale, too.
        scale = tl.maximum(tl.max(tl.abs(numbers), 0) / LARGEST, SMALLEST)
        tl.store(scales + row, scale)
    else:
        scale = tl.load(scales)
    tl.store(codes + row * WIDTH + column, (numbers / scale).to(codes.dtype.element_ty), mask=inside)


_KINDS = MappingProxyType({torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"})

_IQ4 = MappingProxyType({
    f"IQ4_{half}": int.from_bytes((value & 255 for value in values), "little", signed=True)
    for half, values in (("LOW", IQ4_VALUES[:8]), ("HIGH", IQ4_VALUES[8:]))})

# Kernel and options of each block format; the places of its fields come from its `BlockFormat`.
_BLOCK_KERNELS: Mapping[str, tuple[Callable[..., Any], Mapping[str, int]]] = MappingProxyType({
    "Q4_0": (_blocks_of_32, {"BITS": 4}),
    "Q4_1": (_blocks_of_32, {"BITS": 4}),
    "Q5_0": (_blocks_of_32, {"BITS": 5}),
    "Q5_1": (_blocks_of_32, {"BITS": 5}),
    "Q8_0": (_blocks_of_32, {"BITS": 8}),
    "IQ4_NL": (_blocks_of_32, {"BITS": 4, **_IQ4}),
    "Q2_K": (_q2_k, {}),
    "Q3_K": (_q3_k, {}),
    "Q4_K": (_q4_k_q5_k, {}),
    "Q5_K": (_q4_k_q5_k, {}),
    "Q6_K": (_q6_k, {}),
    "IQ4_XS": (_iq4_xs, dict(_IQ4)),
})
