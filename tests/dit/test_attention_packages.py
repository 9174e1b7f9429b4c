"""Backends that are packages. A module of the documented signature stands for each, whose maths is PyTorch's.

So layouts, conventions of the results, guards and refusals are run on any machine; the kernels themselves are not.
"""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.dit.test_attention import exact, tensors
from wan_core.dit import BACKENDS, attention
from wan_core.dit.attention import sage
from wan_core.dit.attention.backend import Case, anywhere
from wan_core.dit.attention.dispatch import trial, why_not

CPU = torch.device("cpu")
NAMES = ("flash_attn", "flash_attn_3", "flash_attn_3.flash_attn_interface", "flash_attn_interface", "sageattention",
         "sageattn", "sageattn3")


def by_torch(q, k, v):
    """PyTorch's attention of tensors [B, L, heads, head_dim]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
           alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return by_torch(q, k, v)


def flash3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
           sm_margin=0, return_attn_probs=False):
    return by_torch(q, k, v)


def old_flash3(q, k, v, softmax_scale=None, causal=False):
    """As before July 2025."""
    return by_torch(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def sage1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    k -= k.mean(2 if tensor_layout == "HND" else 1, keepdim=True)
    given = (q, k, v.half().to(v.dtype))
    if tensor_layout == "HND":
        return by_torch(*(x.transpose(1, 2) for x in given)).transpose(1, 2)
    return by_torch(*given)


def sage2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and not kwargs
    return sage1(q, k.clone(), v, tensor_layout)


def sage3(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    assert attn_mask is None and not kwargs
    sage3.had_means_of_blocks = per_block_mean
    return sage1(q, k, v)


# Module -> what it holds, for each package in each of its forms.
FORMS = {
    "flash2": ("flash2", {"flash_attn": {"flash_attn_func": flash2}}),
    "flash3": ("flash3", {"flash_attn_3": {}, "flash_attn_3.flash_attn_interface": {"flash_attn_func": flash3}}),
    "flash3, older": ("flash3", {"flash_attn_interface": {"flash_attn_func": old_flash3}}),
    "sage 1": ("sage", {"sageattention": {"sageattn": sage1}}),
    "sage 2": ("sage", {"sageattention": {"sageattn": sage2, "sageattn_qk_int8_pv_fp16_triton": sage2}}),
    "sage3": ("sage3", {"sageattn3": {"sageattn3_blackwell": sage3}}),
    "sage3, older": ("sage3", {"sageattn": {"sageattn_blackwell": sage3}}),
}


@pytest.fixture
def install(monkeypatch, fresh):
    """Puts one form of a package in place of all that may be installed."""
    def put(form):
        name, modules = FORMS[form]
        for module in NAMES:
            monkeypatch.setitem(sys.modules, module, None)
        for module, contents in modules.items():
            made = ModuleType(module)
            vars(made).update(contents)
            monkeypatch.setitem(sys.modules, module, made)
        return BACKENDS[name]

    return put


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packages_are_called_by_their_conventions(install, form, dtype):
    """Each package in each of its forms is given its own layout, gives ours, and changes nothing that it is given."""
    backend = install(form)
    q, k, v = (tensor.to(dtype) for tensor in tensors(head_dim=64))
    given = [tensor.clone() for tensor in (q, k, v)]
    out = backend.run(q, k, v, None)
    assert out.shape == q.shape and out.dtype == dtype
    assert (out.flatten(2).double() - exact(q, k, v)).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * exact(
        q, k, v).norm()
    assert all(torch.equal(one, other) for one, other in zip(given, (q, k, v)))
    assert trial(backend, CPU, dtype, 64) is None


def test_values_beyond_float16_survive_version_1(install):
    """SageAttention 1 rounds v to float16; what is too large for that comes out right all the same."""
    backend = install("sage 1")
    q, k, v = (tensor.bfloat16() for tensor in tensors(head_dim=64))
    v[0, 3, 1, 2] = 3e6
    out = backend.run(q, k, v, None).flatten(2).double()
    assert (out - exact(q, k, v)).norm() <= 2e-2 * exact(q, k, v).norm()


def test_sums_of_values_survive_version_1(install):
    """SageAttention 1 adds up 64 rows of v in float16: whatever v is, they are given so that no sum is infinite."""
    given = []

    def recording(q, k, v, tensor_layout="HND"):
        given.append(64 * float(v.abs().max()))
        return sage1(q, k, v, tensor_layout)

    backend = install("sage 1")
    sys.modules["sageattention"].sageattn = recording
    for size in (1, 500, 3000, 60000):
        q, k, v = (tensor.bfloat16() for tensor in tensors(head_dim=64))
        v = v.clamp(-1, 1) * size
        out = backend.run(q, k, v, None).flatten(2).double()
        assert (out - exact(q, k, v)).norm() <= 2e-2 * exact(q, k, v).norm()
    assert given[:2] == [64, 32000] and max(given) < 65504


def test_far_rows_are_brought_together(install, monkeypatch):
    """Where a row's offset does not fit 32 bits, the heads come first in tensors of their own: same result."""
    seen = []

    def recording(q, k, v, tensor_layout="HND"):
        seen.append((tensor_layout, q.is_contiguous()))
        return sage2(q, k, v, tensor_layout)

    backend = install("sage 2")
    sys.modules["sageattention"].sageattn = recording
    q, k, v = tensors(head_dim=64)
    near = backend.run(q, k, v, None)
    monkeypatch.setattr(sage, "_LARGEST_OFFSET", 12 * k.stride(1) - 1)
    torch.testing.assert_close(backend.run(q, k, v, None), near, atol=1e-6, rtol=0)
    assert seen == [("NHD", True), ("HND", True)]


def test_means_of_blocks_are_for_short_videos(install, monkeypatch):
    """SageAttention 3 keeps a table of means of q only as long as it is small."""
    backend, (q, k, v) = install("sage3"), tensors(head_dim=64)
    for largest, kept in ((4 * 2 * 3 * 1 * 13, True), (4 * 2 * 3 * 1 * 13 - 1, False)):
        monkeypatch.setattr(sage, "_LARGEST_TABLE", largest)
        backend.run(q, k, v, None)
        assert sage3.had_means_of_blocks == kept


def test_a_bias_goes_to_pytorch_without_a_word(install, caplog):
    """Packages ignore masks, so attention with a bias is never theirs; nobody is warned of that."""
    q, k, v = tensors(head_dim=64)
    bias = torch.linspace(-3, 6, k.shape[1])
    for form in FORMS:
        install(form)
        out = attention(q, k, v, bias=bias, backend=FORMS[form][0])
        assert torch.equal(out, attention(q, k, v, bias=bias))
    assert not caplog.records


BF16, FP16 = torch.bfloat16, torch.float16
# Form, compute capability, type, head size, keys -> None if it runs, else a part of the reason.
CASES = [
    ("flash2", (8, 0), BF16, 128, 100, None), ("flash2", (12, 0), FP16, 256, 100, None),
    ("flash2", (7, 5), BF16, 128, 100, "needs compute capability 8.0, and the card has 7.5"),
    ("flash2", (9, 0), torch.float32, 128, 100, "takes bfloat16 and float16, not float32"),
    ("flash2", (9, 0), BF16, 100, 100, "takes head sizes that are multiples of 8 up to 256, and the model's is 100"),
    ("flash2", None, BF16, 128, 100, "needs an NVIDIA card"),
    ("flash3", (9, 0), BF16, 128, 100, None), ("flash3", (8, 9), BF16, 128, 100, None),
    ("flash3", (10, 0), BF16, 128, 100, "Hopper, Ada and Ampere"),
    ("sage 1", (8, 7), BF16, 96, 100, None), ("sage 1", (8, 9), BF16, 80, 100, "head sizes 64, 96, 128"),
    ("sage 2", (8, 9), BF16, 80, 100, None), ("sage 2", (9, 0), FP16, 256, 100, "head sizes up to 128"),
    ("sage 2", (10, 0), BF16, 128, 100, "no kernels for this card"), ("sage 2", (8, 7), BF16, 128, 100, "no kernels"),
    ("sage 2", (12, 0), BF16, 128, 160_000, None),
    ("sage 2", (12, 0), BF16, 128, 160_001, "gives noise for more than 160000 tokens"),
    ("sage 2", (9, 0), BF16, 128, 300_000, None),
    ("sage3", (12, 1), BF16, 128, 100, None),
    ("sage3", (9, 0), BF16, 128, 100, "capability 12.0, and the card has 9.0"),
    ("sage3", (12, 0), BF16, 96, 100, "head sizes 64, 128"),
]


@pytest.mark.parametrize(("form", "card", "dtype", "head_dim", "keys", "expected"), CASES)
def test_what_a_package_runs(install, form, card, dtype, head_dim, keys, expected):
    """Cards, types, head sizes and lengths that a package has no kernel for are known before it is called."""
    reason = install(form).why_not(Case(torch.device("cuda" if card else "cpu"), card, dtype, head_dim, keys))
    assert reason is None if expected is None else expected in reason


@pytest.mark.parametrize("name", ["flash2", "flash3", "sage", "sage3"])
def test_a_package_that_is_not_there(install, name):
    """A package that is missing, or whose import fails in whatever way, is a reason that says what to install."""
    install("sage3" if name != "sage3" else "flash2")
    case = Case(torch.device("cuda"), (12, 0) if name == "sage3" else (9, 0), BF16, 128)
    assert "cannot be used" in BACKENDS[name].why_not(case) and "install" in BACKENDS[name].why_not(case)


def test_a_package_that_cannot_be_imported(install, monkeypatch, tmp_path):
    """An import may raise anything."""
    install("sage3")
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn")
    reason = BACKENDS["flash2"].why_not(Case(torch.device("cuda"), (9, 0), BF16, 128))
    assert "(undefined symbol: _ZN3c10)" in reason


def on_any_device(monkeypatch, name):
    """Lets a package's backend run on this machine."""
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], why_not=anywhere))


def broken(result):
    def function(q, k, v, *arguments, **options):
        return result(q, k, v)

    return function


def raising(q, k, v):
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")


BROKEN = {
    "memory that nothing was written to": (lambda q, k, v: torch.empty_like(q), "is wrong on this device"),
    "noise": (lambda q, k, v: torch.randn_like(q), "is wrong on this device"),
    "infinite": (lambda q, k, v: by_torch(q, k, v) / 0, "is wrong on this device"),
    "another layout": (lambda q, k, v: by_torch(q, k, v).transpose(1, 2), "size"),
    "scaled": (lambda q, k, v: by_torch(q * 3, k, v), "is wrong on this device"),
    "writes to q": (lambda q, k, v: by_torch(q.mul_(1.001), k, v), "changes the tensors"),
    "no kernel": (raising, "no kernel image is available"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_build_that_does_not_work_is_found_out(install, monkeypatch, caplog, how):
    """Wrong numbers, layouts and errors of a package show in the trial: PyTorch's own takes its place, one warning."""
    install("flash2")
    on_any_device(monkeypatch, "flash2")
    result, expected = BROKEN[how]
    sys.modules["flash_attn"].flash_attn_func = broken(result)
    q, k, v = tensors(head_dim=64)
    for _ in range(2):
        assert torch.equal(attention(q, k, v, backend="flash2"), attention(q, k, v))
    record, = caplog.records
    assert expected in record.getMessage() and "\n" not in record.getMessage()


def test_what_fails_on_large_tensors_alone_gives_way(install, monkeypatch, caplog):
    """So does what passes the trial and fails later; but want of memory is for whoever can make room."""
    install("flash2")
    on_any_device(monkeypatch, "flash2")

    errors = [RuntimeError("invalid argument"), torch.OutOfMemoryError("CUDA out of memory")]

    def function(q, k, v):
        if k.shape[1] > 400:
            raise errors.pop(0)
        return by_torch(q, k, v)

    sys.modules["flash_attn"].flash_attn_func = function
    small, big = tensors(head_dim=64), tensors(head_dim=64, keys=500)
    assert why_not(BACKENDS["flash2"], Case.of(*small[:2])) is None
    assert torch.equal(attention(*big, backend="flash2"), attention(*big))
    assert [record.args for record in caplog.records] == [("Attention 'flash2'", "sdpa", "invalid argument")]
    with pytest.raises(torch.OutOfMemoryError):
        attention(*big, backend="flash2")
