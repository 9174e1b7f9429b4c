"""Products in FP8: the formula of their rounded factors, near the exact product, chosen only where they fit."""

import pytest
import torch

from wan_core.weights.fp8 import _finished, _why_not_by_row, can_multiply, fp8_product, has_fp8_products, rounded_rows
from wan_core.weights.gguf_blocks import FORMATS
from wan_core.weights.gguf_encode import quantise
from wan_core.weights.quantised import Blocks, Quantised, Scaled

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(scale_shape, dtype=E4M3, shape=(96, 64)):
    codes = (numbers(*shape) * 100).to(dtype)
    parts = {"codes": codes} if scale_shape is None else {
        "codes": codes, "scale": numbers(*scale_shape, seed=1).abs() / 1000 + 1e-4}
    return Quantised(Scaled(dtype), shape, parts)


@pytest.mark.parametrize("scale_shape", [None, (), (1,), (96,), (96, 1)], ids=str)
def test_the_product_is_that_of_rounded_factors(scale_shape):
    """Promise: as the formula in float64, with one scale for each row of the activations, within bfloat16."""
    stored, x, bias = weight(scale_shape), numbers(2, 7, 64, seed=2), numbers(96, seed=3)
    x[0, 3] = 0
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    rounded = (x / scale).to(E4M3).double() * scale.double()
    expected = rounded @ stored.dequantise(torch.float64).T + bias.double()
    y = fp8_product(x, stored, bias, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 7, 96)
    assert ((y.double() - expected).norm() / expected.norm()) < 0.005
    exact = x.double() @ stored.dequantise(torch.float64).T + bias.double()
    assert 0.001 < (y.double() - exact).norm() / exact.norm() < 0.04


@pytest.mark.parametrize("by_row", [True, False])
def test_numbers_are_rounded_over_scales_that_fit(by_row):
    """Promise: with a scale for each row or one for all, the largest number is the largest code, others are within half
    a step of e4m3, and zeros stay zeros."""
    x = numbers(5, 64) * torch.tensor([1, 100, 0, -3, 1e-3]).unsqueeze(1)
    codes, scale = rounded_rows(x.bfloat16(), by_row)
    assert scale.shape == ((5, 1) if by_row else ())
    peaks = codes.float().abs().amax(1)
    assert peaks.tolist() == [448, 448, 0, 448, 448] if by_row else peaks.max() == 448
    # bfloat16 before, e4m3 then: four bits, of the smallest numbers fewer.
    assert ((codes.float() * scale - x).abs() <= x.abs() * (2 ** -4 + 2 ** -7) + scale * 2 ** -10).all()


@pytest.mark.parametrize("scale", [None, numbers(1, 6, seed=1)], ids=["no scale", "scale"])
@pytest.mark.parametrize("bias", [None, numbers(6, seed=2)], ids=["no bias", "bias"])
def test_what_comes_behind_the_product(scale, bias):
    """Promise: scales of the output and bias are applied in float32 and rounded once, where the product was."""
    y = numbers(5, 6).bfloat16()
    expected = (y.float() * (1 if scale is None else scale) + (0 if bias is None else bias)).bfloat16()
    found = _finished(y, scale, bias)
    assert found.data_ptr() == y.data_ptr() and torch.equal(found, expected)


@pytest.mark.parametrize(("stored", "can"), [
    (weight(()), True), (weight((96, 1)), True), (weight(None), True),
    (weight((), E5M2), False), (weight((), shape=(96, 40)), False), (weight((96, 4, 1)), False),
    (Quantised(Scaled(torch.int8, 16), (96, 64), {"codes": torch.zeros(96, 64, dtype=torch.int8)}), False),
    (Quantised(Blocks(FORMATS["Q8_0"]), (96, 64), {"raw": quantise(numbers(96, 64), "Q8_0")}), False),
])
def test_only_weights_that_fit_are_multiplied(stored, can):
    """Promise: e4m3 with one scale or one a row and sides in steps of 16; every other weight is dequantised."""
    assert can_multiply(stored) is can


def test_a_cpu_does_not_choose_it():
    """Promise: chosen by itself only on cards with the arithmetic."""
    assert not has_fp8_products(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scale_shape", [(), (96, 1)], ids=str)
def test_on_a_card(scale_shape):
    """Promise: on a CUDA card the same as on the CPU, within bfloat16."""
    device = torch.device("cuda")
    if not has_fp8_products(device):
        pytest.skip("this card has no FP8 arithmetic")
    stored, x = weight(scale_shape), numbers(5, 64, seed=2)
    y = fp8_product(x.to(device), stored.to(device), None, torch.bfloat16)
    expected = fp8_product(x, stored, None, torch.bfloat16)
    assert (y.cpu().float() - expected.float()).norm() / expected.float().norm() < 0.05


def test_scales_by_row_are_tried(monkeypatch):
    """Promise: a product that takes scales of rows and gives other numbers counts as one that takes none; want of
    memory is no answer."""
    assert _why_not_by_row(torch.device("cpu"), torch.bfloat16) is None
    product = torch._scaled_mm

    def of_one_scale(a, b, scale_a, scale_b, **options):
        return product(a, b, scale_a=scale_a.mean(), scale_b=scale_b.mean(), **options)

    def without_memory(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "_scaled_mm", of_one_scale)
    assert _why_not_by_row(torch.device("cpu"), torch.bfloat16) == "its numbers are wrong"
    monkeypatch.setattr(torch, "_scaled_mm", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _why_not_by_row(torch.device("cpu"), torch.bfloat16)
