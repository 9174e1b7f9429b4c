"""Blocks that work on a part of the tokens at a time: the same numbers, in less memory."""

from dataclasses import replace

import pytest
import torch

from tests.small_models import SMALL
from wan_core.dit import ModelInputs, VaceTransformer, WanTransformer
from wan_core.dit.inputs import VaceControl
from wan_core.memory.meter import MemoryMeter

SPECS = {**SMALL, "clip": replace(SMALL["i2v"], image_dim=32, image_tokens=257)}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_of(kind):
    torch.manual_seed(2)
    spec = SPECS[kind]
    return (VaceTransformer if spec.vace_layers else WanTransformer)(spec).requires_grad_(False).eval()


def inputs_for(model, kind, batch=1):
    """Inputs with 72 tokens, and with frames at different times where the model knows such."""
    spec = model.spec
    timestep = torch.full((batch,), 600.0)
    if kind == "ti2v":
        timestep = torch.tensor([[0.0, 600.0, 600.0]]).repeat(batch, 1)
    return ModelInputs(
        randn(batch, spec.in_dim, 3, 8, 12), timestep, model.prepare_text(randn(batch, 6, 96, seed=1)),
        model.prepare_image(randn(batch, 257, 32, seed=4)) if kind == "clip" else None,
        (VaceControl(randn(batch, 96, 3, 8, 12, seed=3), 0.8),) if kind == "vace" else ())


@pytest.mark.parametrize("chunk", [1, 7, 24, 71])
@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_chunks_change_nothing(kind, chunk):
    """Promise: in every kind of model a step in chunks, also such as cut a frame, equals the whole step within 1e-6."""
    model = model_of(kind)
    for batch in (1, 2):
        inputs = inputs_for(model, kind, batch)
        whole = model(inputs)
        assert (model(inputs, chunk=chunk) - whole).abs().max() <= 1e-6 * max(1.0, whole.abs().max().item())
        assert torch.equal(model(inputs, chunk=72), whole) and torch.equal(model(inputs, chunk=None), whole)


@torch.no_grad()
def test_chunks_take_less_memory():
    """Promise: all that a step holds for each token beside the stream, queries, keys and values is bounded by the
    chunk."""
    # The feed-forward network is what needs most, as in released models.
    model = WanTransformer(replace(SMALL["t2v"], ffn_dim=5 * SMALL["t2v"].dim)).requires_grad_(False).eval()
    inputs = ModelInputs(randn(1, 16, 3, 64, 64), torch.tensor([500.0]), model.prepare_text(randn(1, 6, 96)))
    peaks = []
    for chunk in (None, 256):
        with MemoryMeter("cpu") as meter:
            model(inputs, chunk=chunk)
        peaks.append(meter.peak)
    token = model.spec.dim * 4
    # The stream, q, k, v, attention's result; and rope's table, which is complex.
    held = 3 * 32 * 32 * (5 * token + model.spec.dim * 4)
    assert peaks[1] < held + 256 * 12 * token < peaks[0]
