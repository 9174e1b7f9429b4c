"""Layers: where they compute in float32, and that the fused paths equal the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from wan_core.dit.layers import Float32Linear, LayerNorm, Linear, RMSNorm, add_residual, modulated_norm


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_modulated_norm_is_its_formula(batch):
    """norm(x) * (1 + scale) + shift in float64, for one sample (fused into the norm) and for several (broadcast)."""
    x, shift, scale = 3 * randn(batch, 7, 32) + 1, randn(batch, 1, 32, seed=1), randn(batch, 1, 32, seed=2)
    normed = (x.double() - x.double().mean(-1, keepdim=True)) / (x.double().var(-1, correction=0, keepdim=True)
                                                                + 1e-6).sqrt()
    expected = normed * (1 + scale.double()) + shift.double()
    torch.testing.assert_close(modulated_norm(x, shift, scale, 1e-6).double(), expected, atol=1e-5, rtol=0)


def test_fused_norm_of_one_sample_equals_the_broadcast_one():
    """The same sample alone and twice in a batch: within 1e-6."""
    x, shift, scale = randn(1, 7, 32), randn(1, 1, 32, seed=1), randn(1, 1, 32, seed=2)
    alone = modulated_norm(x, shift, scale, 1e-6)
    twice = modulated_norm(*(tensor.expand(2, -1, -1) for tensor in (x, shift, scale)), 1e-6)
    torch.testing.assert_close(twice, alone.expand(2, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gated", [True, False])
def test_residual_in_place_and_recorded_are_the_same(gated):
    """x + gate * update: written into x in inference, a new tensor where gradients are recorded."""
    x, update = randn(2, 7, 32), randn(2, 7, 32, seed=1).bfloat16()
    gate = randn(2, 1, 32, seed=2) if gated else None
    expected = x + update.float() * (1 if gate is None else gate)
    recorded = add_residual(x.clone().requires_grad_(), update, gate)
    with torch.no_grad():
        target = x.clone()
        written = add_residual(target, update, gate)
    assert written.data_ptr() == target.data_ptr()
    torch.testing.assert_close(recorded, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(written, expected, atol=1e-6, rtol=0)


def test_float32_islands_compute_in_float32_from_bf16_weights():
    """Norms and the float32 linear layer widen bf16 weights; the plain linear layer works in the weights' dtype."""
    x = randn(2, 5, 24)
    for layer in (Float32Linear(24, 8), LayerNorm(24, eps=1e-6), RMSNorm(24, 1e-6)):
        exact = layer(x)
        assert layer.bfloat16()(x).dtype == torch.float32
        rounded = layer(x)
        assert (rounded - exact).norm() <= 5e-3 * exact.norm()
    plain = Linear(24, 8).bfloat16()
    assert plain(x).dtype == torch.bfloat16
    assert torch.equal(plain(x), F.linear(x.bfloat16(), plain.weight, plain.bias))


def test_rms_norm_is_its_formula():
    """x / sqrt(mean(x^2) + eps) * weight over all channels, not per head."""
    norm = RMSNorm(24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = randn(3, 5, 24)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=0)
