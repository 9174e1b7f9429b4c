"""Layers: where they compute in float32, and that the fused paths equal the plain ones."""

import pytest
import torch

from wan_core.dit.layers import Float32Linear, LayerNorm, Linear, RMSNorm, add_residual, modulated_norm


def rms(norm, x):
    """The two factors of an RMS norm multiplied."""
    value, scale = norm.parts(x)
    return value * scale


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
    """Norms and the float32 linear layer widen bf16 weights and inputs; the plain layer works in its weights' dtype."""
    x = randn(2, 5, 24)
    for layer in (Float32Linear(24, 8), LayerNorm(24, eps=1e-6), RMSNorm(24, 1e-6)):
        run = layer if not isinstance(layer, RMSNorm) else lambda x, norm=layer: rms(norm, x)
        torch.nn.init.normal_(layer.weight)
        layer.weight.data = layer.weight.data.bfloat16().float()
        exact = run(x.bfloat16().float())
        layer.bfloat16()
        assert run(x.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(run(x.bfloat16()), exact, atol=5e-3, rtol=0)
    plain = Linear(24, 8).bfloat16()
    assert plain(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_linear_with_gelu_behind_it(recorded, gelu, dtype):
    """Fused or not, the layer is x W^T + b, then the tanh form of GELU where it is asked for."""
    layer = Linear(24, 40).to(dtype)
    x = randn(2, 5, 24)
    expected = x.to(dtype).double() @ layer.weight.double().mT + layer.bias.double()
    if gelu:
        expected = expected / 2 * (1 + (2 ** 0.5 / torch.pi ** 0.5 * (expected + 0.044715 * expected ** 3)).tanh())
    with torch.set_grad_enabled(recorded):
        out = layer(x, gelu=gelu)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_rms_norm_is_its_formula():
    """The product of its parts is x / sqrt(mean(x^2) + eps) * weight over all channels, not per head."""
    norm = RMSNorm(24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = randn(3, 5, 24)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(rms(norm, x).double(), expected, atol=1e-5, rtol=0)
