"""Numbers to GGUF's block formats; `gguf_blocks` is the way back.

Q8_0 and the formats of 4 and 5 bits in blocks of 32 follow the gguf package bit for bit. That package cannot write the
K formats and IQ4: here each group of 16 or 32 numbers tries some steps, fits scale and minimum to the codes of each by
least squares, and keeps the best; the scales of a block are then brought to their own few bits, and the codes rounded
once more with what is stored. All numbers count the same, because nothing is known here of the inputs that they are
going to be multiplied with. Layouts: llama.cpp's `ggml-common.h`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from .gguf_blocks import FORMATS, IQ4_VALUES

# Numbers that are worked on at a time: few enough for a processor's cache.
_CHUNK = 1 << 18

_LARGEST_HALF = 65504.0

Fields = dict[str, Tensor]
Rounding = Callable[[Tensor], Tensor]


def quantise(values: Tensor, name: str) -> Tensor:
    """Numbers [..., n] as raw bytes [..., n / size * nbytes] uint8 of a format of `gguf_blocks.FORMATS`.

    Raises ValueError for another format, or rows that are no whole number of blocks.
    """
    if name not in _WRITERS:
        raise ValueError(f"weights cannot be written as {name}; choose {', '.join(_WRITERS)}.")
    form = FORMATS[name]
    if values.shape[-1] % form.size:
        raise ValueError(f"rows of {values.shape[-1]} numbers are no whole number of {name} blocks of {form.size}.")
    blocks = values.reshape(-1, form.size)
    raw = torch.empty(len(blocks), form.nbytes, dtype=torch.uint8, device=values.device)
    count = _CHUNK // form.size
    for source, target in zip(blocks.split(count), raw.split(count)):
        fields = _WRITERS[name](source.float())
        torch.cat([fields[field] for field in form.fields], 1, out=target)
    return raw.reshape(*values.shape[:-1], -1)


def _bytes(scale: Tensor) -> Tensor:
    """A number for each block as float16: [N, 2]."""
    return scale.half().reshape(-1, 1).view(torch.uint8)


def _planes(codes: Tensor, length: int, bits: int) -> Tensor:
    """Codes of `bits` bits [N, ...] packed: each run of `length` bytes holds 8 / bits groups, the lowest first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    runs = codes.reshape(len(codes), -1, 8 // bits, length)
    return (runs << shifts).sum(2, dtype=torch.uint8).flatten(1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def _q8_0(blocks: Tensor) -> Fields:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    # Halves are rounded away from zero.
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()
    return {"scale": _bytes(scale), "codes": codes.to(torch.int8).view(torch.uint8)}


def _signed(blocks: Tensor, half: int) -> Fields:
    """Q4_0 and Q5_0: the code `half` stands for 0. The number of the largest size gets the code 0, so that the whole
    range of codes is used on its side."""
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -half
    codes = (blocks * _inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1).to(torch.uint8)
    return {"scale": _bytes(scale), "codes": _planes(codes & 15, 16, 4), "high": _planes(codes >> 4, 1, 1)}


def _ranged(blocks: Tensor, top: int) -> Fields:
    """Q4_1 and Q5_1: codes from 0 for the smallest number to `top` for the largest."""
    low, high = blocks.aminmax(dim=1, keepdim=True)
    scale = (high - low) / top
    codes = ((blocks - low) * _inverse(scale) + 0.5).trunc().clamp(0, top).to(torch.uint8)
    return {"scale": _bytes(scale), "minimum": _bytes(low), "codes": _planes(codes & 15, 16, 4),
            "high": _planes(codes >> 4, 1, 1)}


def _best_scale(groups: Tensor, rounding: Rounding, sides: Sequence[float]) -> Tensor:
    """The scale [N, G, 1] of the least squared error of scale * code for groups [N, G, S]: of the codes with which the
    number of the largest size becomes one of `sides`, those that fit best."""
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    inverse = _inverse(largest)
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    for side in sides:
        codes = rounding(groups * (inverse * side))
        product = (groups * codes).sum(2, keepdim=True)
        fitted = product * _inverse(codes.square().sum(2, keepdim=True))
        # How much less the squared error is than that of zeros.
        gain = fitted * product
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale


def _best_range(groups: Tensor, top: int, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and minimum [N, G, 1], neither below 0, of the least squared error of scale * code - minimum for groups
    [N, G, S]: of the codes with which smallest and largest number are `top` plus one of `steps` apart."""
    count, total = groups.shape[2], groups.sum(2, keepdim=True)
    low, high = groups.aminmax(dim=2, keepdim=True)
    low = low.clamp(max=0)
    shifted, inverse = groups - low, _inverse(high - low)
    # To begin with, one number for all of a group.
    scale, offset = torch.zeros_like(low), (total / count).clamp(max=0)
    best = offset * total
    for step in steps:
        codes = (shifted * (inverse * (top + step))).round_().clamp_(0, top)
        sums, squares = codes.sum(2, keepdim=True), codes.square().sum(2, keepdim=True)
        product = (groups * codes).sum(2, keepdim=True)
        determinant = _inverse(count * squares - sums.square())
        moved = (squares * total - sums * product) * determinant
        # An offset above 0 cannot be stored, and equal codes do not tell it from the scale.
        none = (moved > 0) | (determinant == 0)
        fitted = torch.where(none, product * _inverse(squares), (count * product - total * sums) * determinant)
        moved = torch.where(none, 0.0, moved)
        gain = fitted * product + moved * total
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
        offset = torch.where(better, moved, offset)
    return scale, -offset


def _stored(scales: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scales [N, G, 1] as whole multiples [N, G, 1] of a float16 number [N, 1, 1]; that of the largest size becomes
    `largest`, and where that is below 0, the others reach to -largest - 1."""
    peak = scales.gather(1, scales.abs().argmax(1, keepdim=True)) / largest
    peak = peak.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    unit = peak.half()
    # Never smaller: the multiples would not reach, by far where float16 runs out of digits.
    unit = torch.where(unit.float().abs() < peak.abs(), (unit.view(torch.int16) + 1).view(torch.float16), unit).float()
    bounds = (largest, -largest - 1) if largest < 0 else (0, largest)
    return unit, (scales * _inverse(unit)).round().clamp(*bounds)


def _symmetric(blocks: Tensor, half: int, largest: int, sides: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Q3_K and Q6_K: codes [N, 16, 16] from 0, `half` for the number 0; unit and multiples as `_stored` gives them."""
    groups = blocks.unflatten(1, (16, 16))

    def rounding(numbers: Tensor) -> Tensor:
        return numbers.round_().clamp_(-half, half - 1)

    unit, multiples = _stored(_best_scale(groups, rounding, sides), largest)
    codes = rounding(groups * _inverse(unit * multiples)) + half
    return codes.to(torch.uint8), unit, multiples.squeeze(2)


def _q3_k(blocks: Tensor) -> Fields:
    codes, unit, multiples = _symmetric(blocks, 4, -32, _spaced(-5, -3, 9))
    scales = (multiples + 32).to(torch.uint8)
    return {"mask": _planes(codes >> 2, 32, 1), "codes": _planes(codes & 3, 32, 2), "scale": _bytes(unit),
            "scales": torch.cat([_planes(scales & 15, 8, 4), _planes(scales >> 4, 4, 2)], 1)}


def _q6_k(blocks: Tensor) -> Fields:
    codes, unit, multiples = _symmetric(blocks, 32, -128, _spaced(-33, -30, 7))
    return {"codes": _planes(codes & 15, 64, 4), "high": _planes(codes >> 4, 32, 2), "scale": _bytes(unit),
            "scales": multiples.to(torch.int8).view(torch.uint8)}


def _with_minima(blocks: Tensor, size: int, top: int, largest: int, steps: Sequence[float]) -> tuple[Tensor, Fields]:
    """Q2_K, Q4_K and Q5_K: codes [N, G, size] and the fields that they share; `multiples` of the scale and `minima`,
    multiples of the minimum [N, G], are still to be packed."""
    groups = blocks.unflatten(1, (-1, size))
    scale, minimum = _best_range(groups, top, steps)
    (unit, scales), (step, minima) = _stored(scale, largest), _stored(minimum, largest)
    stored = unit * scales

    def codes() -> Tensor:
        return ((groups + step * minima) * _inverse(stored)).round_().clamp_(0, top)

    # The minima that suit the scales as they are stored.
    minima = ((stored * codes() - groups).mean(2, keepdim=True) * _inverse(step)).round_().clamp_(0, largest)
    fields = {"scale": _bytes(unit), "minimum": _bytes(step)}
    whole = {"multiples": scales.squeeze(2).to(torch.uint8), "minima": minima.squeeze(2).to(torch.uint8)}
    return codes().to(torch.uint8), fields | whole


def _q2_k(blocks: Tensor) -> Fields:
    codes, fields = _with_minima(blocks, 16, 3, 15, _spaced(-0.8, 0.8, 9))
    return fields | {"scales": fields["multiples"] | fields["minima"] << 4, "codes": _planes(codes, 32, 2)}


def _q4_q5_k(blocks: Tensor, top: int) -> Fields:
    codes, fields = _with_minima(blocks, 32, top, 63, _spaced(-2, 1, 13))
    # Six bits each in 12 bytes; of the last four, the upper two stand apart.
    (first, last), (low, high) = fields["multiples"].split(4, 1), fields["minima"].split(4, 1)
    scales = torch.cat([first | last >> 4 << 6, low | high >> 4 << 6, last & 15 | high << 4], 1)
    return fields | {"scales": scales, "codes": _planes(codes & 15, 32, 4), "high": _planes(codes >> 4, 32, 1)}


def _spaced(first: float, last: float, count: int) -> Sequence[float]:
    return [first + (last - first) * index / (count - 1) for index in range(count)]


# The values reach farther on one side, and either can be the better one for the number of the largest size.
_IQ4_SIDES = (*_spaced(-140, -104, 7), *_spaced(100, 118, 4))


def _iq4_index(numbers: Tensor) -> Tensor:
    """For each number the place of the nearest among IQ4's values."""
    values = torch.tensor(IQ4_VALUES, device=numbers.device)
    # The middles between neighbours are whole or half numbers: between two of these, one value is nearest to all.
    middles = (torch.arange(-256, 256, device=numbers.device).unsqueeze(1) + 0.5) / 2
    nearest = (middles - values).abs().argmin(1).int()
    places = (numbers * 2).floor_().clamp_(-256, 255).add_(256).int()
    return nearest.index_select(0, places.flatten()).view(numbers.shape)


def _iq4_values(numbers: Tensor) -> Tensor:
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=numbers.device)
    return values.index_select(0, _iq4_index(numbers).flatten()).view(numbers.shape)


def _iq4_nl(blocks: Tensor) -> Fields:
    groups = blocks.unsqueeze(1)
    unit, sign = _stored(_best_scale(groups, _iq4_values, _IQ4_SIDES), -1)
    codes = _iq4_index(groups * _inverse(unit * sign)).to(torch.uint8)
    return {"scale": _bytes(unit * sign), "codes": _planes(codes, 16, 4)}


def _iq4_xs(blocks: Tensor) -> Fields:
    groups = blocks.unflatten(1, (8, 32))
    unit, multiples = _stored(_best_scale(groups, _iq4_values, _IQ4_SIDES), -32)
    codes = _iq4_index(groups * _inverse(unit * multiples)).to(torch.uint8)
    scales = (multiples + 32).to(torch.uint8)
    return {"scale": _bytes(unit), "scales_low": _planes(scales & 15, 1, 4), "scales_high": _planes(scales >> 4, 1, 2),
            "codes": _planes(codes, 16, 4)}


_WRITERS: Mapping[str, Callable[[Tensor], Fields]] = MappingProxyType({
    "Q4_0": partial(_signed, half=8), "Q4_1": partial(_ranged, top=15),
    "Q5_0": partial(_signed, half=16), "Q5_1": partial(_ranged, top=31), "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": partial(_q4_q5_k, top=15), "Q5_K": partial(_q4_q5_k, top=31), "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
})
