"""Kernels of one pass against their formulas in float64 and against PyTorch's operations, which take their place.

Without a GPU the kernels run in Triton's interpreter, which shows that their arithmetic is right; that they compile for
graphics cards is tested apart, and that they run there only where there is one.
"""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpreted_kernels
from tests.small_models import SMALL
from wan_core.dit import ModelInputs, VaceTransformer, WanTransformer, fused
from wan_core.dit.inputs import VaceControl
from wan_core.dit.layers import LayerNorm, Linear
from wan_core.dit.rope import rope_table
from wan_core.dit.stream import add_and_modulate, add_gated, add_gated_and_norm, modulated
from wan_core.dit.time import TimeRows

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux and Windows)")

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (5120, 1536, 48)
SPECS = {**SMALL, "clip": replace(SMALL["i2v"], image_dim=32, image_tokens=257)}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a process has either the interpreter or the GPU")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The module of kernels; this comes before all that imports it."""
    with interpreted_kernels("wan_core.dit.triton_kernels") as module:
        yield module


@pytest.fixture
def on_cpu(monkeypatch):
    """For the time of a test a CPU, where the kernels are interpreted, counts as a device that has them."""
    monkeypatch.setattr(fused, "_ACCELERATORS", ("cpu",))
    assert fused.tried_kernels(CPU, torch.float32) is not None
    yield
    fused.tried_kernels.cache_clear()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_norm(x, scale, shift, eps=1e-6):
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale.double() + shift.double()


def rms_norm(x, weight, turns=None, eps=1e-6):
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    if turns is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, turns.shape[-1], 2)))
    return torch.view_as_real(pairs * turns.to(torch.complex128)).reshape(x.shape)


def within_a_rounding(found, expected):
    """A neighbour in the type, the nearest one but for what float32 in between costs; the interpreter's bfloat16 is
    cut off, not rounded, and may be the other one."""
    unit = max(torch.finfo(found.dtype).eps, 1e-5) * (1.01 if found.dtype == torch.bfloat16 else 0.51)
    return bool(((found.double() - expected).abs() <= unit * expected.abs() + 2e-6).all())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_residual_and_norm_are_their_formula(width, dtype, kernels):
    """Promise: tokens in the middle of others, two samples with rows of their own, any type beside the stream: x is
    changed in place to 1e-6, the norm is within one rounding of float64, and nothing else is written."""
    whole, rows = 3 * randn(2, 9, width) + 1, randn(2, 6, width, seed=1)
    update, out = randn(2, 7, width, seed=2).to(dtype)[:, 1:6], torch.full((2, 6, width), 7.0).to(dtype)
    before = whole.clone()
    kernels.stream_pass(whole[:, 2:7], update=update, gate=rows[:, 2], out=out[:, :5], scale=rows[:, 4],
                        shift=rows[:, 3], offset=1.0, eps=1e-6)
    added = before[:, 2:7].double() + rows[:, 2:3].double() * update.double()
    assert (whole[:, 2:7] - added).abs().max() <= 1e-6 * added.abs().max()
    assert torch.equal(whole[:, :2], before[:, :2]) and torch.equal(whole[:, 7:], before[:, 7:])
    assert within_a_rounding(out[:, :5], layer_norm(added, 1 + rows[:, 4:5], rows[:, 3:4]))
    assert out[:, 5].eq(7).all()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_pass(dtype, kernels):
    """Promise: a norm with weights alone leaves x as it is; an update is added without gate, and without norm."""
    x, weight, bias = 3 * randn(2, 5, 48) + 1, randn(48, seed=1).to(dtype), randn(48, seed=2).to(dtype)
    before, out, update = x.clone(), torch.empty(2, 5, 48, dtype=dtype), randn(2, 5, 48, seed=3).to(dtype)
    kernels.stream_pass(x, out=out, scale=weight, shift=bias, eps=1e-6)
    assert torch.equal(x, before) and within_a_rounding(out, layer_norm(x, weight, bias))
    kernels.stream_pass(x, update=update)
    assert torch.equal(x, before + update.float())
    kernels.stream_pass(x[:, :0], update=update[:, :0])


@interpreted
def test_tokens_far_from_zero_keep_their_variance(kernels):
    """Promise: a mean 1,000 times the deviation costs no digits beyond those that float32 has lost already."""
    x, out = randn(1, 3, 5120) + 1000, torch.empty(1, 3, 5120)
    kernels.stream_pass(x, out=out, scale=torch.ones(5120), shift=torch.zeros(5120), eps=1e-6)
    assert (out - layer_norm(x, torch.ones(()), torch.zeros(()))).abs().max() < 1e-3


@interpreted
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "head"), [(5120, 128), (1536, 128), (48, 12)])
def test_rms_norm_and_rotation_are_their_formula(width, head, dtype, rotated, kernels):
    """Promise: norm over all heads, then each token's own turn of each head's pairs, within one rounding of float64,
    in place or into another type; also for tokens in the middle of others."""
    whole, weight = randn(2, 7, width).to(dtype), randn(width, seed=1).to(dtype)
    turns = rope_table((1, 3, 3), head)[4:9] if rotated else None
    x = whole[:, 1:6]
    expected, wide = rms_norm(x, weight, turns), torch.empty(2, 5, width)
    kernels.rms_norm(x, weight, 1e-6, wide, turns)
    assert within_a_rounding(wide, expected)
    kernels.rms_norm(x, weight, 1e-6, x, turns)
    assert within_a_rounding(x, expected)
    assert torch.equal(whole[:, ::6], randn(2, 7, width).to(dtype)[:, ::6])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(5,), (2, 3)], ids=str)
@torch.no_grad()
def test_the_stream_is_that_of_torch(lengths, dtype, on_cpu, monkeypatch):
    """Promise: each function of the stream gives by kernels what it gives by PyTorch's operations, for one run of
    tokens and for two, and in place."""
    time = TimeRows(tuple(randn(2, 6, 48, seed=seed) for seed in range(len(lengths))), lengths)
    update, norm = randn(2, 5, 48, seed=5).to(dtype), LayerNorm(48, 1e-6)
    norm.weight.copy_(randn(48, seed=6)), norm.bias.copy_(randn(48, seed=7))
    ways = (lambda x: (x, modulated(x, time, 3, 1e-6, dtype)), lambda x: (add_gated(x, update, time, 2),),
            lambda x: add_gated_and_norm(x, update, time, 2, norm, dtype),
            lambda x: add_and_modulate(x, update, time, 3, 1e-6, dtype))
    found = []
    for way in ways:
        x = randn(2, 5, 48, seed=8)
        found.append(way(x))
        assert found[-1][0] is x
    monkeypatch.setattr(fused, "_ACCELERATORS", ())
    for way, results in zip(ways, found):
        for one, expected in zip(results, way(randn(2, 5, 48, seed=8))):
            assert one.dtype == expected.dtype
            assert (one - expected).abs().max() <= max(1e-6, torch.finfo(one.dtype).eps) * expected.abs().max()


def model_of(kind):
    torch.manual_seed(2)
    spec = SPECS[kind]
    model = (VaceTransformer if spec.vace_layers else WanTransformer)(spec).requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(1 + 0.3 * torch.randn_like(weight))
    return model


def step(model, kind, device=CPU, **options):
    """A step with 4 tokens in two samples, of which those of the first frame have a time of their own in ti2v."""
    dtype = model.patch_embedding.weight.dtype
    timestep = torch.tensor([[0.0, 600.0]] * 2) if kind == "ti2v" else torch.tensor([600.0, 300.0])
    latents = randn(2, model.spec.in_dim, 2, 2, 4).to(device, dtype)
    text = model.prepare_text(randn(2, 2, 96, seed=1).to(device))
    image = model.prepare_image(randn(2, 3, 32, seed=4).to(device)) if kind == "clip" else None
    control = VaceControl(randn(2, 96, 2, 2, 4, seed=3).to(device, dtype), 0.8)
    return model(ModelInputs(latents, timestep, text, image, (control,) if kind == "vace" else ()), **options)


@interpreted
@pytest.mark.parametrize("kind", ["clip", "ti2v", "vace"])
@torch.no_grad()
def test_a_model_with_kernels_is_that_without(kind, on_cpu, monkeypatch):
    """Promise: a model with everything that blocks may have predicts the same by kernels, in chunks that cut a run of
    tokens."""
    model = model_of(kind)
    found = step(model, kind, chunk=3)
    monkeypatch.setattr(fused, "_ACCELERATORS", ())
    expected = step(model, kind)
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@interpreted
def test_gradients_need_no_kernels(on_cpu):
    """Promise: where gradients are recorded, and for what kernels don't read, PyTorch's operations are used; queries
    are written where their projection was."""
    x, weight = randn(1, 4, 24), torch.ones(24)
    assert fused.kernels_for(x) is None and fused.rms_heads(x, weight, 1e-6, 2, x.dtype) is None
    with torch.no_grad():
        assert fused.kernels_for(x, torch.bfloat16) is not None
        assert fused.kernels_for(x, torch.float64) is None and fused.kernels_for(x.mT) is None
        assert fused.rms_heads(x, weight, 1e-6, 2, x.dtype).data_ptr() == x.data_ptr()


@torch.no_grad()
def test_a_cpu_has_no_kernels():
    """Promise: off the GPU PyTorch's operations are used, and Triton is not asked."""
    assert fused.kernels_for(randn(1, 4, 24)) is None


def test_a_device_that_fails_is_tried_once(caplog):
    """Promise: where the kernels cannot be launched, the log says why once, and nothing is raised."""
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fused.tried_kernels(torch.device("cuda", 99), torch.float32) is None
    message, = (record.getMessage() for record in caplog.records)
    assert "cuda:99" in message and "PyTorch's own operations" in message and "Triton" in message


def test_the_product_with_gelu_is_taken_in_its_tanh_form_only():
    """Promise: where the fused product has GELU in the form with erf, as on a CPU, it is an operation of its own."""
    x, eye = torch.linspace(-4, 4, 256).view(16, 16).bfloat16(), torch.eye(16).bfloat16()
    assert torch.equal(torch._addmm_activation(torch.zeros(16).bfloat16(), x, eye, use_gelu=True), F.gelu(x))
    assert not fused.product_has_gelu(CPU, torch.bfloat16) and not fused.joins_gelu(x, x[0])


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wan_core.dit import triton_kernels as kernels

def check(kernel, pointers, constants, *targets):
    types = {name: "constexpr" if name in constants else "fp32" if name == "eps" else "i32"
             for name in kernel.arg_names} | pointers
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = {"num_warps": kernels._warps(constants["TILE"]), "enable_fp_fusion": True}
    for target in targets:
        made = compile(source, target=GPUTarget(*target), options=options).asm
        print(kernel.__name__, target[1], len(made.get("cubin") or made["hsaco"]) > 0)

sizes = {"WIDTH": 5120, "TILE": 8192}
for half, *targets in (("*bf16", ("cuda", 80, 32), ("cuda", 90, 32)),
                       ("*fp16", ("cuda", 75, 32), ("hip", "gfx1100", 32))):
    rows = dict.fromkeys(("x", "gate", "scale", "shift"), "*fp32")
    check(kernels._stream, {**rows, "update": half, "out": half},
          {"OFFSET": 1.0, "ADDS": True, "GATED": True, "NORMS": True, **sizes}, *targets)
    check(kernels._rms, {"x": half, "weight": half, "table": "*fp32", "out": half}, {"HEAD": 128, **sizes}, *targets)
"""


@pytest.mark.slow
def test_kernels_compile_for_graphics_cards(tmp_path):
    """Promise: they compile for NVIDIA cards, in bfloat16 since Ampere and in float16 since Turing, and for AMD's."""
    surroundings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, env=surroundings)
    targets = ("80", "90"), ("75", "gfx1100")
    expected = [[name, target, "True"] for some in targets for name in ("_stream", "_rms") for target in some]
    assert [line.split() for line in found.stdout.splitlines()] == expected, found.stderr


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_a_model_on_a_gpu(kind, dtype, monkeypatch):
    """Promise: on the card every kind of model goes through the kernels, and predicts what it does without."""
    if dtype == torch.bfloat16 and fused._lacks_bfloat16(GPU):
        pytest.skip("the card has no bfloat16")
    assert fused.tried_kernels(GPU, dtype) is not None
    model = model_of(kind).to(GPU, dtype)
    found = step(model, kind, GPU).float()
    monkeypatch.setattr(fused, "_ACCELERATORS", ())
    expected = step(model, kind, GPU).float()
    assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 0.02) * expected.norm()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_gelu_on_a_gpu(dtype):
    """Promise: joined to the product or not, the layer is its formula within the rounding of its type."""
    layer, x = Linear(64, 96).to(GPU, dtype), randn(2, 5, 64).to(GPU, dtype)
    expected = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    assert (layer(x, gelu=True).double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps
