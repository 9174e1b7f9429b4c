"""GGUF block formats against the gguf package: every byte pattern gives the same number, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from wan_core.weights.gguf_blocks import FORMATS, quantise


def random_blocks(name, rows, blocks, seed=0):
    """Random bytes, with the float16 scales kept finite: [rows, blocks * nbytes]."""
    form = FORMATS[name]
    raw = torch.randint(0, 256, (rows, blocks, form.nbytes), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))
    offset = 0
    for field, nbytes in form.fields.items():
        if field in ("scale", "minimum"):
            # An exponent with all bits set would be infinity or NaN, which no writer stores.
            raw[:, :, offset + 1] &= 0xBB
        offset += nbytes
    return raw.flatten(1)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_as_by_the_gguf_package(name):
    """Promise: bit-equal on random blocks, in the shape of the weight."""
    raw = random_blocks(name, 6, 40)
    ours = FORMATS[name].dequantise(raw)
    theirs = quants.dequantize(raw.numpy(), GGMLQuantizationType[name])
    assert ours.shape == (6, 40 * FORMATS[name].size) and ours.dtype == torch.float32
    assert np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_have_the_size_that_ggml_gives_them(name):
    """Promise: numbers and bytes of a block are those of ggml's table."""
    assert (FORMATS[name].size, FORMATS[name].nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_quantised_as_by_the_gguf_package(name):
    """Promise: the same bytes as the package writes, for ordinary numbers, zeros, ties and huge ones."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    values[0], values[1, ::2], values[2] = 0, 0.5, torch.arange(256) - 127.5
    values[3] *= 1e5
    values[4, :32] = torch.tensor([1.0, -1.0]).repeat(16)
    theirs = quants.quantize(values.numpy(), GGMLQuantizationType[name])
    assert np.array_equal(quantise(values, name).numpy(), theirs)


def test_what_cannot_be_written_is_refused():
    """Promise: a format without a writer, and rows that do not fill blocks, are refused by name."""
    with pytest.raises(ValueError, match="cannot be written as Q4_K; choose Q8_0 or Q4_0"):
        quantise(torch.zeros(2, 256), "Q4_K")
    with pytest.raises(ValueError, match="rows of 40 numbers are no whole number of Q8_0 blocks of 32"):
        quantise(torch.zeros(2, 40), "Q8_0")


def test_every_format_of_released_files_is_there():
    """Promise: the types in which Wan's transformers and text encoders are published can all be read."""
    published = {"Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"}
    assert published == set(FORMATS) and published <= set(gguf.GGMLQuantizationType.__members__)
