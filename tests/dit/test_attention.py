"""The attention function: its formula, its backends, its refusals."""

import pytest
import torch

from wan_core.dit import BACKENDS, attention

ON_CPU = ("sdpa", "sdpa-flash", "sdpa-math")


def tensors(batch=2, queries=9, keys=13, heads=3, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, heads, head_dim, generator=generator) for length in (queries, keys, keys)]


def exact(q, k, v, bias=None):
    """The formula in float64, one head of one sample at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            logits = q[b, :, h].double() @ k[b, :, h].double().mT / q.shape[3] ** 0.5
            logits = logits if bias is None else logits + bias.double()
            out[b, :, h] = logits.softmax(-1) @ v[b, :, h].double()
    return out.flatten(2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_backends_compute_the_formula(backend, biased):
    """Every backend that runs on a CPU gives softmax(q k / sqrt(d) + bias) v, heads joined in order."""
    q, k, v = tensors()
    bias = torch.linspace(-3, 6, k.shape[1]) if biased else None
    out = attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out.double(), exact(q, k, v, bias), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ON_CPU)
def test_backends_agree_in_bf16(backend):
    """In bf16, with a bias given in fp32, the result is bf16 and near the exact one."""
    q, k, v = (tensor.bfloat16() for tensor in tensors())
    bias = torch.linspace(-3, 3, k.shape[1])
    out = attention(q, k, v, bias=bias, backend=backend)
    expected = exact(q, k, v, bias)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the other kernels need a CUDA device")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa-flash"])
def test_backends_on_cuda(backend):
    """The kernels that take a bias agree with the formula on a CUDA device, too."""
    q, k, v = (tensor.to("cuda", torch.bfloat16) for tensor in tensors(head_dim=64))
    bias = torch.linspace(-3, 3, k.shape[1], device="cuda")
    expected = exact(q.cpu(), k.cpu(), v.cpu(), bias.cpu())
    out = attention(q, k, v, bias=bias, backend=backend)
    assert (out.cpu().double() - expected).norm() <= 2e-2 * expected.norm()


def test_plain_sdpa_is_the_default():
    """Without a choice the result is that of 'sdpa', bit for bit."""
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))
    assert set(ON_CPU) <= set(BACKENDS)


def test_unknown_backend_is_refused():
    """A wrong name is a ValueError that lists what there is."""
    with pytest.raises(ValueError, match="'sage'; choose one of sdpa, sdpa-flash"):
        attention(*tensors(), backend="sage")


def test_a_backend_without_a_kernel_is_refused():
    """A kernel that the device does not have is a ValueError that says what to use, not PyTorch's own."""
    with pytest.raises(ValueError, match="'sdpa-cudnn' cannot run float32 on a cpu device here; use sdpa"):
        attention(*tensors(), backend="sdpa-cudnn")


@pytest.mark.parametrize(("queries", "keys"), [(7, 5), (40, 1 << 17), (1, 1)])
def test_half_precision_on_a_cpu(queries, keys):
    """In bfloat16 on a CPU, where rows are taken in parts, attention stays within 1e-2 of float32."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 3, 32, generator=generator).bfloat16()
    k, v = (torch.randn(2, keys, 3, 32, generator=generator).bfloat16() for _ in range(2))
    with torch.no_grad():
        half = attention(q, k, v)
        exact = attention(q.float(), k.float(), v.float())
    assert half.dtype == torch.bfloat16 and (half - exact).norm() <= 1e-2 * exact.norm()
