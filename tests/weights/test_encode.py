"""Matrices to FP8, int8, MXFP8 and NVFP4: the formulas in float64, exact at ties and ends, laid out as stated."""

import math

import pytest
import torch

from wan_core.weights.convert import TARGETS
from wan_core.weights.quantised import Quantised

FORMS = tuple(form for form, target in TARGETS.items() if target.container == "safetensors")
# The 4-bit floats of even codes first: of two that are as near, the first is taken.
E2M1 = torch.tensor([0, 1, 2, 4, 0.5, 1.5, 3, 6], dtype=torch.float64)


def read(form, weight):
    """What a weight becomes."""
    return Quantised(TARGETS[form].scheme, tuple(weight.shape), TARGETS[form].parts(weight)).dequantise()


def by_formula(weight, form):
    """The same, written down without regard to speed."""
    exact, e4m3 = weight.double(), torch.float8_e4m3fn
    match form:
        case "fp8_e4m3":
            return weight.clamp(-448, 448).to(e4m3).float()
        case "fp8_e5m2":
            return weight.clamp(-57344, 57344).to(torch.float8_e5m2).float()
        case "fp8_scaled" | "fp8_scaled_rows":
            peak = exact.abs().amax(1, keepdim=True) if form == "fp8_scaled_rows" else exact.abs().max()
            scale = (peak / 448).float()
            return torch.where(peak == 0, 0.0, (weight / scale).to(e4m3).double() * scale.double()).float()
        case "int8":
            scale = (exact.abs().amax(1, keepdim=True) / 127).float()
            return torch.where(scale == 0, 0.0, (weight / scale).round().double() * scale.double()).float()
    size = {"mxfp8": 32, "nvfp4": 16}[form]
    blocks = exact.unflatten(1, (-1, size))
    peak = blocks.abs().amax(2, keepdim=True)
    if form == "mxfp8":
        scale = 2.0 ** (peak / 448).log2().ceil()
        return torch.where(peak == 0, 0.0, (blocks / scale).float().to(e4m3).double() * scale).flatten(1).float()
    whole = (exact.abs().max() / (448 * 6)).float()
    scale = whole * (peak.float() / 6 / whole).to(e4m3).float()
    distance = (blocks.float().abs() / scale).double().unsqueeze(-1) - E2M1
    return torch.where(peak == 0, 0.0, E2M1[distance.abs().argmin(-1)] * blocks.sign() * scale).flatten(1).float()


def example():
    """Rows of different sizes, one of zeros, blocks of zeros, and sizes that fill no tile of scales."""
    weight = torch.randn(160, 224, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 1, 160).unsqueeze(1)
    weight[5], weight[6, 32:96] = 0, 0
    return weight


@pytest.mark.parametrize("form", FORMS)
def test_encoded_by_the_formula(form):
    """Promise: what is read back is what the format's formula gives in float64; zeros stay zeros."""
    weight = example()
    numbers = read(form, weight)
    torch.testing.assert_close(numbers, by_formula(weight, form), rtol=2e-7, atol=0)
    assert not numbers[5].any() and not numbers[6, 32:96].any() and numbers.isfinite().all()


@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("shape", [(160, 256), (32, 96), (256, 32)], ids=str)
def test_layouts_tell_what_the_parts_are(form, shape):
    """Promise: the stated types and shapes are those of the parts, in any shape that fits, within rows or across."""
    target = TARGETS[form]
    assert target.fits("blocks.0.ffn.0.weight", shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = target.parts(weight)
    assert target.layout(shape) == {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    numbers = Quantised(target.scheme, shape, parts).dequantise()
    assert numbers.shape == shape and (numbers - weight).norm() < 0.3 * weight.norm()


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.008), ("mxfp8", 0.028), ("nvfp4", 0.1)])
def test_errors_are_small(form, bound):
    """Promise: relative root mean square errors on normal random numbers, over more rows than are taken at a time."""
    weight = torch.randn(8200, 512, generator=torch.Generator().manual_seed(0))
    assert (read(form, weight) - weight).norm() < bound * weight.norm()


def test_ties_of_4_bit_floats_go_to_the_even_code():
    """Promise: a number in the middle between two is rounded as IEEE 754 says, and signs are kept."""
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weight = torch.zeros(16, 16)
    weight[0, :8] = torch.tensor([*middles, 6.0])
    weight[0, 8:15] = -weight[0, :7]
    # Scales of exactly one: the tensor's 1 / 448 and the block's 448.
    weight[1, 0] = 6.0
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -1, -2, -2, -4, -4, 0])
    torch.testing.assert_close(read("nvfp4", weight)[0], expected, rtol=1e-6, atol=0)


def test_powers_of_two_are_the_least_that_hold_a_block():
    """Promise: the largest number of a block lies between half the largest code and the largest, ends included."""
    weight = torch.zeros(32, 32)
    weight[:, 0] = torch.tensor([448 * 2.0 ** (k - 16) for k in range(32)])
    weight[:, 0] = torch.where(torch.arange(32) % 2 == 0, weight[:, 0], weight[:, 0].nextafter(torch.tensor(math.inf)))
    codes = TARGETS["mxfp8"].parts(weight)["codes"].float()[:, 0]
    assert codes[::2].eq(448).all() and codes[1::2].eq(224).all()


@pytest.mark.parametrize("form", ("fp8_scaled", "fp8_scaled_rows", "int8", "mxfp8", "nvfp4"))
@pytest.mark.parametrize("size", [0, 1e-20, 1e-8, 1e4, 1e20])
def test_huge_and_tiny_weights(form, size):
    """Promise: scales take up any size, and a weight of zeros is one."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    numbers = read(form, weight * size)
    assert (numbers.double() - weight.double() * size).norm() <= 0.11 * size * weight.norm()
