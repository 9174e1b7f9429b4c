"""Numbers to GGUF's block formats: the gguf package's bytes where it has a writer, small errors where it has none."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from wan_core.weights.gguf_blocks import FORMATS
from wan_core.weights.gguf_encode import quantise

# Relative root mean square errors on normal random numbers; the optimal scalar quantiser of 4 bits has 0.097.
BOUNDS = {"Q8_0": 0.006, "Q6_K": 0.018, "Q5_K": 0.037, "Q5_1": 0.039, "Q5_0": 0.044, "Q4_K": 0.073, "IQ4_NL": 0.074,
          "IQ4_XS": 0.075, "Q4_1": 0.08, "Q4_0": 0.088, "Q3_K": 0.146, "Q2_K": 0.275}
# The gguf package writes these.
REFERENCE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# These have no other writer in Python.
OWN = tuple(name for name in FORMATS if name not in REFERENCE)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(values, name):
    """What is read from the written bytes."""
    return FORMATS[name].dequantise(quantise(values, name))


def error(values, name):
    return ((stored(values, name) - values).norm() / values.norm()).item()


@pytest.mark.parametrize("name", REFERENCE)
def test_quantised_as_by_the_gguf_package(name):
    """Promise: the same bytes as the package writes, for ordinary numbers, zeros, ties and huge ones."""
    values = numbers(64, 256, seed=1) * 0.05
    values[0], values[1, ::2], values[2] = 0, 0.5, torch.arange(256) - 127.5
    values[3] *= 1e5
    values[4, :32] = torch.tensor([1.0, -1.0]).repeat(16)
    values[5] = -0.3
    theirs = quants.quantize(values.numpy(), GGMLQuantizationType[name])
    assert np.array_equal(quantise(values, name).numpy(), theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_small(name):
    """Promise: on normal random numbers of any size, and more of them than are worked on at a time, the error is
    below the format's bound; the gguf package reads the same numbers."""
    values = numbers(1100, 256) * torch.logspace(-3, 2, 1100).unsqueeze(1)
    raw = quantise(values, name)
    read = FORMATS[name].dequantise(raw)
    relative = (read - values).norm(dim=1) / values.norm(dim=1)
    assert relative.square().mean().sqrt() < BOUNDS[name]
    # No row is an exception, wherever it was cut off.
    assert relative.max() < 1.3 * BOUNDS[name]
    assert np.array_equal(read.numpy(), quants.dequantize(raw.numpy(), GGMLQuantizationType[name]))


def test_more_bits_mean_smaller_errors():
    """Promise: the order of the formats by size is that of their errors, and of two of a size the newer is better."""
    values = numbers(64, 1024)
    errors = {name: error(values, name) for name in FORMATS}
    order = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    assert [errors[name] for name in order] == sorted(errors[name] for name in order)
    assert errors["Q4_K"] < errors["Q4_1"] < errors["Q4_0"] and errors["Q5_K"] < errors["Q5_1"] < errors["Q5_0"]
    assert errors["IQ4_NL"] < errors["Q4_0"] and errors["IQ4_XS"] < errors["Q4_0"]


@pytest.mark.parametrize("name", OWN)
def test_least_squares_beat_the_plain_rule(name):
    """Promise: the search is better than one scale from the largest number of a group, stored without any loss."""
    values, form = numbers(64, 1024), FORMATS[name]
    size = {"Q4_K": 32, "Q5_K": 32, "IQ4_NL": 32, "IQ4_XS": 32}.get(name, 16)
    groups, bits = values.view(64, -1, size), int(name.removeprefix("I")[1])
    scale = groups.abs().amax(2, keepdim=True) / 2 ** (bits - 1)
    plain = (groups / scale).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1) * scale
    assert (form.dequantise(quantise(values, name)) - values).norm() < (plain.flatten(1) - values).norm()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    """Promise: a block of zeros is read as zeros, alone and beside others."""
    values = numbers(4, 512)
    values[1], values[2, 256:] = 0, 0
    read = stored(values, name)
    assert not read[1].any() and not read[2, 256:].any() and read[3].any()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("value", [0.07, -0.07, 1e4, -1e4])
def test_constant_blocks_are_kept(value, name):
    """Promise: a block of one number is read as that number, to the accuracy of the stored scales."""
    values = torch.full((2, 512), value)
    torch.testing.assert_close(stored(values, name), values, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("size", [1e4, 1e-4, 1e-6, 1e-7, 1e-8, 1e-30, 1e30])
def test_huge_and_tiny_numbers(size, name):
    """Promise: what float16 scales can reach is as good as ever; beyond them all stays finite and no worse than 0."""
    values = numbers(8, 512) * size
    read = stored(values, name)
    relative = ((read / size - values / size).norm() / (values / size).norm()).item()
    assert read.isfinite().all() and relative <= 1
    if size in (1e4, 1e-4):
        assert relative < (1.1 if size == 1e4 else 2) * BOUNDS[name]


@pytest.mark.parametrize("name", OWN)
def test_numbers_of_one_sign_and_outliers(name):
    """Promise: rows of one sign, and rows with one number far beyond the others, come out better than as zeros, and
    the outlier itself is kept."""
    values = numbers(4, 512).abs() * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    values[2:] = numbers(2, 512) * 0.01
    values[2, 40], values[3, 300] = 5, -5
    read = stored(values, name)
    assert ((read - values).norm(dim=1) / values.norm(dim=1)).max() < 2 * BOUNDS[name]
    assert read[2, 40] == pytest.approx(5, rel=0.02) and read[3, 300] == pytest.approx(-5, rel=0.02)


def test_what_cannot_be_written_is_refused():
    """Promise: an unknown format, and rows that do not fill blocks, are refused by name."""
    with pytest.raises(ValueError, match="cannot be written as IQ2_S; choose Q4_0, Q4_1"):
        quantise(torch.zeros(2, 256), "IQ2_S")
    with pytest.raises(ValueError, match="rows of 40 numbers are no whole number of Q8_0 blocks of 32"):
        quantise(torch.zeros(2, 40), "Q8_0")
