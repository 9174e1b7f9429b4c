"""The attention function: its formula, its backends, its refusals."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_core.dit import BACKENDS, attention, describe_backends
from wan_core.dit.attention import sdpa

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


# How far the numbers of less exact backends may be off.
COARSE = {"sage": 0.1, "sage3": 0.4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the other kernels need a CUDA device")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_on_cuda(backend, biased):
    """What runs on a CUDA device agrees with the formula there; what does not gives way to what does."""
    q, k, v = (tensor.to("cuda", torch.bfloat16) for tensor in tensors(head_dim=64))
    bias = torch.linspace(-3, 3, k.shape[1], device="cuda") if biased else None
    expected = exact(q.cpu(), k.cpu(), v.cpu(), bias.cpu() if biased else None)
    out = attention(q, k, v, bias=bias, backend=backend)
    assert (out.cpu().double() - expected).norm() <= COARSE.get(backend, 2e-2) * expected.norm()


@pytest.mark.parametrize("biased", [False, True])
def test_kernels_are_chosen_in_pytorch_2_5(biased, monkeypatch, caplog, fresh):
    """Backends of PyTorch's own kernels need no more than which ones are allowed: their order came with 2.6."""
    chosen = []

    def older(backends):
        chosen.append(backends)
        return sdpa_kernel(backends)

    monkeypatch.setattr(sdpa, "sdpa_kernel", older)
    q, k, v = tensors()
    bias = torch.linspace(-3, 6, k.shape[1]) if biased else None
    for backend in ("sdpa-flash", "sdpa-math"):
        torch.testing.assert_close(attention(q, k, v, bias=bias, backend=backend).double(), exact(q, k, v, bias),
                                   atol=1e-5, rtol=0)
    assert chosen[-1] == [SDPBackend.MATH] and not caplog.records


@pytest.mark.slow
def test_flex_attention_has_room_for_many_kinds_of_calls(monkeypatch, caplog, fresh):
    """More kinds of calls than PyTorch's own limit of graphs run by FlexAttention, too."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    q, k, v = tensors()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float64):
            by_kind = [tensor.to(dtype) for tensor in (q, k, v)]
            out = attention(*by_kind, backend="flex")
            torch.testing.assert_close(out.double(), exact(q, k, v), atol=1e-5, rtol=0)
    assert not [record for record in caplog.records if record.name.startswith("wan_core")]


@torch.no_grad()
def test_a_compiler_that_fails_is_asked_once(monkeypatch, caplog, fresh):
    """Where FlexAttention cannot be compiled, later calls do not wait for the compiler again; want of memory is for
    whoever can make room."""
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Failed to find C compiler.")]

    def compiler(graph, inputs):
        raise errors.pop(0)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    q, k, v = tensors()
    with pytest.raises(torch.OutOfMemoryError):
        attention(q, k, v, backend="flex")
    for length in (9, 7, 5):
        assert torch.equal(attention(q[:, :length], k, v, backend="flex"), attention(q[:, :length], k, v))
    assert not errors and len([one for one in caplog.records if one.name.startswith("wan_core")]) == 1


def test_plain_sdpa_is_the_default():
    """Without a choice the result is that of 'sdpa', bit for bit."""
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="sdpa"))
    assert set(ON_CPU) <= set(BACKENDS)


def test_unknown_backend_is_refused():
    """A wrong name is a ValueError that lists what there is."""
    with pytest.raises(ValueError, match="'saga'; choose one of sdpa, sdpa-flash"):
        attention(*tensors(), backend="saga")


@pytest.mark.parametrize("biased", [False, True])
def test_a_backend_without_a_kernel_gives_way(biased, caplog, fresh):
    """A kernel that the device does not have is replaced by PyTorch's choice, and one warning says so."""
    q, k, v = tensors()
    bias = torch.linspace(-3, 6, k.shape[1]) if biased else None
    for _ in range(3):
        assert torch.equal(attention(q, k, v, bias=bias, backend="sdpa-cudnn"), attention(q, k, v, bias=bias))
    assert [record.getMessage() for record in caplog.records] == [
        "Attention 'sdpa-cudnn' cannot run here, and sdpa takes its place: PyTorch has no such kernel for float32 and "
        "heads of 16 on a cpu device here."]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_said_to_run_runs(dtype, caplog, fresh):
    """Where `describe_backends` names no reason, a backend computes the formula itself; where it does, sdpa does."""
    q, k, v = (tensor.to(dtype) for tensor in tensors())
    reasons = describe_backends(q.device, dtype, q.shape[3])
    assert list(reasons) == list(BACKENDS) and not any(reasons[name] for name in (*ON_CPU, "auto"))
    for name, reason in reasons.items():
        if name != "flex":
            caplog.clear()
            out = attention(q, k, v, backend=name)
            assert (out.double() - exact(q, k, v)).norm() <= 2e-2 * exact(q, k, v).norm()
            assert [record.args[2] for record in caplog.records] == ([reason] if reason else [])


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
def test_flex_attention_computes_the_formula(biased, caplog, fresh):
    """FlexAttention, compiled for a CPU, gives the formula with and without a bias; for any lengths."""
    for queries, keys in ((9, 13), (140, 40)):
        q, k, v = tensors(queries=queries, keys=keys)
        bias = torch.linspace(-3, 6, keys) if biased else None
        with torch.no_grad():
            out = attention(q, k, v, bias=bias, backend="flex")
        torch.testing.assert_close(out.double(), exact(q, k, v, bias), atol=1e-5, rtol=0)
    assert not [record for record in caplog.records if record.name.startswith("wan_core")]


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
