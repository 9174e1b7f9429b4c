"""What the Wan 2.2 VAE alone has: patches of pixels and shortcuts without parameters, against plain loops."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.vae.small import SMALL, randn
from wan_core.vae import WanVAE
from wan_core.vae.layers import Stream, through
from wan_core.vae.wan22 import DownLevel, UpLevel, patchify, unpatchify


def test_patches_are_in_the_official_order():
    """A pixel's channel is colour, column, row, slowest first; unpatchify undoes it."""
    x = randn(2, 3, 2, 4, 6)
    patches = patchify(x)
    assert patches.shape == (2, 12, 2, 2, 3)
    for colour, column, row in product(range(3), range(2), range(2)):
        assert torch.equal(patches[:, colour * 4 + column * 2 + row], x[:, colour, :, row::2, column::2])
    assert torch.equal(unpatchify(patches), x)


def position(index, factors):
    """Which of a cell's frames, rows and columns the official flat index means: time slowest, width fastest."""
    time, height, width = factors
    return index // (height * width) % time, index // width % height, index % width


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("widening", [1, 2, 4])
def test_averages_on_the_way_down(widening, temporal):
    """The shortcut is the mean of equally many (channel, time, row, column) entries in a row, zeros before the clip."""
    in_dim, factors = 2, (2 if temporal else 1, 2, 2)
    cell = factors[0] * 4
    level = DownLevel(in_dim, in_dim * widening, 1, temporal=temporal)
    x = randn(1, in_dim, 5, 4, 6)
    padded = torch.cat([torch.zeros(1, in_dim, factors[0] - 1, 4, 6), x], 2)
    flat = torch.stack([padded[0, channel, t::factors[0], row::2, column::2] for channel in range(in_dim)
                        for t, row, column in (position(i, factors) for i in range(cell))])
    expected = flat.unflatten(0, (in_dim * widening, cell // widening)).mean(1)
    with torch.no_grad():
        shortcut = level(x, Stream()) - through(level.downsamples, x, Stream())
    torch.testing.assert_close(shortcut[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("narrowing", [1, 2, 4])
def test_copies_on_the_way_up(narrowing, temporal, first):
    """Every channel fills equally many (channel, time, row, column) entries; a clip's first frame is not doubled."""
    out_dim, factors = 2, (2 if temporal else 1, 2, 2)
    cell = factors[0] * 4
    level = UpLevel(out_dim * narrowing, out_dim, 1, temporal=temporal)
    x = randn(1, out_dim * narrowing, 3, 2, 3)
    expected = torch.empty(out_dim, 3 * factors[0], 4, 6)
    for channel, index in product(range(out_dim), range(cell)):
        t, row, column = position(index, factors)
        expected[channel, t::factors[0], row::2, column::2] = x[0, (channel * cell + index) * narrowing // cell]
    streams = Stream(), Stream()
    for stream in streams:
        stream.first = first
    with torch.no_grad():
        shortcut = level(x, streams[0]) - through(level.upsamples, x, streams[1])
    torch.testing.assert_close(shortcut[0], expected[:, factors[0] - 1 if first else 0:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("multipliers", "message"), [
    ((1, 2, 4, 8), "between 32 and 64 channels with resampling .1, 1, 1."), ((1, 3, 3, 3), "between 8 and 24 channels"),
    ((2, 1, 1, 1), "between 16 and 8 channels"),
])
def test_widths_without_a_shortcut_are_refused(multipliers, message):
    """Levels that widen by other factors than their resampling can fill are an error that names both widths."""
    with pytest.raises(ValueError, match=message):
        WanVAE(replace(SMALL["wan22"], dim_mult=multipliers))
