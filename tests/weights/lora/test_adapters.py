"""The mathematics of each kind of adapter, against formulas written out in float64."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from wan_core.weights.lora import Delta, DoRA, LoHa, LoKr, LowRank, Replacement
from wan_core.weights.lora.adapters import fits

OUT, IN, RANK, KERNEL = 12, 20, 3, (1, 2, 2)


def r(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cases():
    """Name -> (adapter, shape of its weight, the delta by indices)."""
    torch.manual_seed(1)
    down, up, mid = r(RANK, IN), r(OUT, RANK), r(4, RANK, *KERNEL)
    yield "lora", LowRank(down, up, scale=0.7), (OUT, IN), 0.7 * torch.einsum("or,ri->oi", up, down)
    conv = r(RANK, 5, *KERNEL)
    yield ("lora_conv", LowRank(conv, up[..., None, None, None], scale=2.0), (OUT, 5, *KERNEL),
           2 * torch.einsum("or,rithw->oithw", up, conv))
    up4 = r(OUT, 4)
    yield ("lora_mid", LowRank(down[..., None, None, None], up4, mid, 0.5), (OUT, IN, *KERNEL),
           0.5 * torch.einsum("om,mnthw,ni->oithw", up4, mid, down))
    w1, w2 = r(3, 4), r(4, 5)
    kron = torch.einsum("ab,cd->acbd", w1, w2).reshape(OUT, IN)
    yield "lokr", LoKr((w1,), (w2,), scale=1.5), (OUT, IN), 1.5 * kron
    w1a, w1b, w2a, w2b = r(3, 2), r(2, 4), r(4, 2), r(2, 5)
    kron = torch.einsum("ar,rb,cs,sd->acbd", w1a, w1b, w2a, w2b).reshape(OUT, IN)
    yield "lokr_factors", LoKr((w1a, w1b), (w2a, w2b), scale=0.25), (OUT, IN), 0.25 * kron
    conv2 = r(4, 5, *KERNEL)
    yield ("lokr_conv", LoKr((w1,), (conv2,)), (OUT, IN, *KERNEL),
           torch.einsum("ab,cdthw->acbdthw", w1, conv2).reshape(OUT, IN, *KERNEL))
    core, a, b = r(2, 3, *KERNEL), r(2, 4), r(3, 5)
    yield ("lokr_core", LoKr((w1,), (a, b), core, 3.0), (OUT, IN, *KERNEL),
           3 * torch.einsum("xy,ijthw,ip,jq->xpyqthw", w1, core, a, b).reshape(OUT, IN, *KERNEL))
    a1, b1, a2, b2 = r(OUT, 3), r(3, IN), r(OUT, 3), r(3, IN)
    product = torch.einsum("or,ri->oi", a1, b1) * torch.einsum("or,ri->oi", a2, b2)
    yield "loha", LoHa((a1, b1), (a2, b2), scale=0.5), (OUT, IN), 0.5 * product
    a1, b1 = r(OUT, 1), r(1, IN)
    product = torch.einsum("or,ri->oi", a1, b1) * torch.einsum("or,ri->oi", a2[:, :2], b2[:2])
    yield "loha_low_rank", LoHa((a1, b1), (a2[:, :2], b2[:2]), scale=0.5), (OUT, IN), 0.5 * product
    t1, t2, a1, b1, a2, b2 = r(2, 3, *KERNEL), r(2, 3, *KERNEL), r(2, OUT), r(3, 5), r(2, OUT), r(3, 5)
    halves = [torch.einsum("ijthw,ip,jq->pqthw", *three) for three in ((t1, a1, b1), (t2, a2, b2))]
    yield "loha_cores", LoHa((a1, b1), (a2, b2), (t1, t2), 2.0), (OUT, 5, *KERNEL), 2 * halves[0] * halves[1]
    value = r(OUT, IN)
    yield "delta", Delta(value, 0.3), (OUT, IN), 0.3 * value


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("name", CASES)
def test_delta_is_the_formula(name):
    """`delta` is the formula of its kind, to float64 rounding, and in float32 by default."""
    adapter, shape, expected = CASES[name]
    assert torch.allclose(adapter.delta(shape, torch.float64), expected, rtol=1e-12, atol=1e-12)
    single = adapter.delta(shape)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_shape_is_that_of_the_weight(name):
    """An adapter knows the weight that it is for, and refuses another with both shapes in the message."""
    adapter, shape, expected = CASES[name]
    assert fits(adapter, shape) and fits(adapter, (shape[0], expected[0].numel()))
    assert not fits(adapter, (shape[0] + 1, *shape[1:]))
    with pytest.raises(ValueError, match=r"shape \[12, \d+.*\[13, "):
        adapter.delta((shape[0] + 1, *shape[1:]))


@pytest.mark.parametrize("name", CASES)
def test_on_activations_as_in_the_weight(name):
    """`apply` gives what a linear layer with the delta as its weight gives, for inputs of any number of axes."""
    adapter, _, expected = CASES[name]
    matrix = expected.flatten(1)
    for lead in ((), (2, 3)):
        x = r(*lead, matrix.shape[1])
        assert torch.allclose(adapter.apply(x), F.linear(x, matrix), rtol=1e-11, atol=1e-11)
    assert adapter.to(dtype=torch.bfloat16).apply(x.bfloat16()).dtype == torch.bfloat16


def test_both_ways_of_a_hadamard_product_are_tried():
    """LoHa's product of rank r² is used where it is smaller than the weight: the cases above hold one of each."""
    def smaller(adapter):
        rank = adapter.first[1].shape[0] * adapter.second[1].shape[0]
        return rank * sum(adapter.shape) < adapter.shape[0] * adapter.shape[1]
    assert smaller(CASES["loha_low_rank"][0]) and not smaller(CASES["loha"][0])


@pytest.mark.parametrize("name", CASES)
def test_merging_is_in_proportion(name):
    """A merged weight is base + strength * delta, in the base's type; strength 0 gives the base bit for bit."""
    adapter, shape, expected = CASES[name]
    base = r(*shape)
    for strength in (1.0, -0.5, 2.0):
        assert torch.allclose(adapter.merged(base, strength), base + strength * expected, rtol=1e-12, atol=1e-12)
    half = base.to(torch.bfloat16)
    assert torch.equal(adapter.merged(half, 0.0), half)
    assert adapter.merged(half, 1.0).dtype == torch.bfloat16 and torch.equal(half, base.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["lora", "lokr_factors", "loha", "delta", "lora_conv"])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora(name, axis):
    """DoRA gives every row, or column, of W + ΔW the learned length; strength goes straight from W to that."""
    inner, shape, delta = CASES[name]
    base = r(*shape)
    turned = base + delta
    rest = [d for d in range(len(shape)) if d != axis]
    magnitude = r(shape[axis]).abs() + 0.5
    column = magnitude.view(-1, *[1] * (len(shape) - 1)) if axis == 0 else magnitude.view(1, -1, *[1] * len(shape[2:]))
    expected = column * turned / turned.pow(2).sum(dim=rest, keepdim=True).sqrt()
    adapter = DoRA(inner, column)
    assert torch.allclose(adapter.merged(base, 1.0), expected, rtol=1e-12)
    assert torch.allclose(adapter.merged(base, 1.0).pow(2).sum(dim=rest).sqrt(), magnitude, rtol=1e-12)
    assert torch.allclose(adapter.merged(base, 0.4), base + 0.4 * (expected - base), rtol=1e-11, atol=1e-12)
    assert torch.equal(adapter.merged(base, 0.0), base)
    if axis == 0:
        assert torch.allclose(DoRA(inner, magnitude).merged(base, 1.0), expected, rtol=1e-12)
        x, gain = r(4, base[0].numel()), adapter.gain(base).flatten()
        plain = F.linear(x, base.flatten(1))
        applied = plain + 0.4 * ((gain - 1) * plain + gain * inner.apply(x))
        assert torch.allclose(applied, F.linear(x, adapter.merged(base, 0.4).flatten(1)), rtol=1e-10, atol=1e-10)


def test_dora_layouts():
    """Which axis a magnitude is for is told by its layout, in a square weight too; PEFT's [1, out, 1, ...] is rows."""
    inner = LowRank(r(2, 6), r(6, 2))
    assert DoRA(inner, r(6, 1)).axis((6, 6)) == DoRA(inner, r(6)).axis((6, 6)) == 0
    assert DoRA(inner, r(1, 6)).axis((6, 6)) == 1
    assert DoRA(inner, r(1, 8, 1, 1, 1)).axis((8, 3, 1, 2, 2)) == 0
    with pytest.raises(ValueError, match=r"\[5\] fit neither .* \[6, 6\]"):
        DoRA(inner, r(5)).axis((6, 6))


def test_dora_of_zero_rows():
    """A row that is zero stays zero instead of becoming NaN."""
    adapter = DoRA(LowRank(torch.zeros(1, 4), torch.zeros(3, 1)), torch.ones(3))
    assert torch.equal(adapter.merged(torch.zeros(3, 4), 1.0), torch.zeros(3, 4))


def test_replacement():
    """A replaced tensor is the model's at strength 0, the file's at 1, and between them on a straight line."""
    base, value = r(5), r(1, 5)
    adapter = Replacement(value)
    assert torch.equal(adapter.merged(base, 0.0), base)
    assert torch.allclose(adapter.merged(base, 1.0), value[0])
    assert torch.allclose(adapter.merged(base, 0.25), 0.75 * base + 0.25 * value[0])
    with pytest.raises(ValueError, match=r"\[1, 5\].*\[6\]"):
        adapter.merged(r(6), 1.0)


@pytest.mark.parametrize("name", CASES)
def test_moving(name):
    """`to` moves every tensor, also those in pairs and inside DoRA, and leaves scale and original alone."""
    adapter = DoRA(CASES[name][0], r(OUT))
    moved = adapter.to("meta", torch.float16)

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if dataclasses.is_dataclass(value):
            return [t for field in dataclasses.fields(value) for t in tensors(getattr(value, field.name))]
        return [t for item in value for t in tensors(item)] if isinstance(value, tuple) else []

    assert len(tensors(moved)) == len(tensors(adapter)) >= 2
    assert all(t.is_meta and t.dtype == torch.float16 for t in tensors(moved))
    assert all(t.dtype == torch.float64 for t in tensors(adapter)) and moved.inner.scale == adapter.inner.scale
    assert all(a is b for a, b in zip(tensors(adapter.to()), tensors(adapter), strict=True))


def test_factors_of_fp8_are_computed_wide():
    """Factors stored in FP8 are computed in the type that is asked for."""
    down, up = torch.randn(2, 4).to(torch.float8_e4m3fn), torch.randn(3, 2).to(torch.float8_e4m3fn)
    adapter = LowRank(down, up)
    assert torch.equal(adapter.delta((3, 4)), up.float() @ down.float())
    assert torch.allclose(adapter.apply(torch.ones(4)), (up.float() @ down.float()).sum(1), atol=1e-5)
