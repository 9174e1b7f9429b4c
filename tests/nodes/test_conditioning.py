"""CONDITIONING to the engine's conditions: ranges, strengths, and refusals."""

import logging

import pytest
import torch

EMBEDDING = torch.ones(1, 4, 8)


@pytest.fixture
def convert(module):
    """Converts one entry with these options."""
    def run(embedding=EMBEDDING, batch=1, shift=5.0, **options):
        return module("nodes.conditioning").text_conditions([[embedding, options]], shift, batch, "positive")[0]

    return run


@pytest.mark.parametrize(("percent", "shift", "sigma"), [
    (0.0, 5.0, 1.0), (1.0, 5.0, 0.0), (0.5, 1.0, 0.5), (0.5, 5.0, 2.5 / 3), (0.25, 8.0, 6 / 6.25)])
def test_percent_to_sigma(module, percent, shift, sigma):
    """Promise: percents become noise levels as in ComfyUI's flow models, shift * t / (1 + (shift - 1) * t)."""
    assert module("nodes.conditioning").percent_to_sigma(percent, shift) == pytest.approx(sigma)


def test_range_and_strength(convert):
    """Promise: start, end and strength reach the engine; without them a prompt holds for the whole run."""
    condition = convert(start_percent=0.5, end_percent=1.0, strength=0.3)
    assert condition.strength == 0.3
    assert (condition.sigmas.start, condition.sigmas.end) == (pytest.approx(2.5 / 3), 0.0)
    assert (convert().sigmas.start, convert().sigmas.end) == (1.0, 0.0)
    assert convert().context is EMBEDDING


@pytest.mark.parametrize("key", ["area", "mask", "control", "hooks", "concat_latent_image", "vace_frames"])
def test_what_is_not_supported_is_refused(convert, key):
    """Promise: an option that would change the picture and is not supported is an error that names it."""
    with pytest.raises(ValueError, match=rf"\({key}\), which this sampler does not support"):
        convert(**{key: object()})


def test_unknown_options_are_named(convert, caplog):
    """Promise: an option that nobody knows is named in one warning; those without effect on Wan are not."""
    with caplog.at_level(logging.WARNING):
        convert(pooled_output=None, guidance=3.5)
        assert not caplog.records
        convert(strange=1)
    assert "carries strange, which has no effect here" in caplog.text


@pytest.mark.parametrize(("arguments", "message"), [
    ({"start_percent": 0.8, "end_percent": 0.2}, "active from 80% to 20%"),
    ({"strength": 0.0}, "strength is 0"),
    ({"embedding": torch.ones(2, 4, 8), "batch": 3}, "holds 2 embeddings and the latent 3 videos"),
])
def test_bad_values(convert, arguments, message):
    """Promise: values that make no sense are errors that say what came."""
    with pytest.raises(ValueError, match=message):
        convert(**arguments)


def test_empty_conditioning(module):
    """Promise: a conditioning without entries is an error that names the socket."""
    with pytest.raises(ValueError, match="negative is an empty conditioning"):
        module("nodes.conditioning").text_conditions([], 5.0, 1, "negative")
