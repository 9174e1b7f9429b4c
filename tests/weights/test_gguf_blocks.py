"""GGUF block formats against the gguf package: every byte pattern gives the same number, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from wan_core.weights.gguf_blocks import FORMATS


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


def test_every_format_of_released_files_is_there():
    """Promise: the types in which Wan's transformers and text encoders are published can all be read."""
    published = {"Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"}
    assert published == set(FORMATS) and published <= set(gguf.GGMLQuantizationType.__members__)
