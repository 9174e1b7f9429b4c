"""Triton kernels against PyTorch's operations: the same numbers, bit for bit, for every format and every code.

Without a GPU the kernels run in Triton's interpreter, which shows that their arithmetic is right; that they compile for
graphics cards is tested apart, and that they run there only where there is one.
"""

import itertools
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interpreter import interpreted_kernels
from wan_core.weights.fp8 import has_fp8_products
from wan_core.weights.fused import fused_blocks, fused_rounding, fused_scaled, kernels_for
from wan_core.weights.gguf_blocks import FORMATS
from wan_core.weights.quantised import Blocks, Scaled

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux and Windows)")

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU = torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a process has either the interpreter or the GPU")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The module of kernels; this comes before all that imports it."""
    with interpreted_kernels("wan_core.weights.triton_kernels") as module:
        yield module


def random_bytes(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    """Equal bit for bit, signs of zero included; all NaN are alike."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    return torch.equal(*(numbers.masked_fill(numbers.isnan(), math.nan).view(integer) for numbers in (found, expected)))


def block_cases(name):
    """Raw bytes of a format that fill no tile, one, and several with a rest; some scales are infinite or NaN."""
    form = FORMATS[name]
    for rows, blocks in ((1, 1), (2048 // form.size, 1), (5, 1 + 2048 // form.size)):
        yield random_bytes(rows, blocks * form.nbytes, seed=rows)


def scaled_cases():
    """Codes and scales: one scale, one a row, one for each of the parts of a row, short and long."""
    for shape, count in (((256,), 1), ((4, 256), 4), ((256, 8), 512), ((3, 2500), 3), ((3, 2500), 1)):
        codes = torch.arange(math.prod(shape)).remainder(256).to(torch.uint8).view(shape)
        scale = torch.randn(count, generator=torch.Generator().manual_seed(count))
        if count > 3:
            scale[:3] = torch.tensor([math.inf, math.nan, 0])
        yield codes, scale


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_blocks_are_those_of_torch(name, dtype, kernels):
    """Promise: every format gives the numbers of PyTorch's operations, for any bytes and any number of blocks."""
    for raw in block_cases(name):
        assert same(kernels.dequantise_blocks(FORMATS[name], raw, dtype), FORMATS[name].dequantise(raw, dtype))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scaled_codes_are_those_of_torch(form, dtype, kernels):
    """Promise: all 256 codes, with one scale, one a row or one a part of a row, give the numbers of PyTorch's."""
    for codes, scale in scaled_cases():
        expected = Scaled(form).dequantise({"codes": codes, "scale": scale}, dtype)
        assert same(kernels.dequantise_scaled(codes.view(form), scale, dtype), expected)


def rounding_cases():
    """Rows that fill no tile, one with zeros alone, one with tiny and one with large numbers: all of them e4m3 times a
    power of 2, whose rounding is known (the interpreter's own is that of no card)."""
    for width in (72, 5120, 13824):
        codes = torch.randint(0, 256, (5, width), generator=torch.Generator().manual_seed(width)).to(torch.uint8)
        numbers = codes.view(torch.float8_e4m3fn).float().nan_to_num()
        numbers[:, 7] = 448
        numbers[2] = 0
        yield numbers * torch.tensor([1, 2 ** -10, 1, 2, 0.5]).unsqueeze(1)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_rows_are_those_of_torch(dtype, kernels):
    """Promise: each row's scale takes its largest number to the largest code, rows of zeros have one as well; and with
    one scale for all rows the codes are those of that."""
    for rows in rounding_cases():
        given = rows[:2].to(dtype), rows[2:4].to(dtype), rows.to(dtype)[:, 1::2]
        for part in given:
            codes, scale = kernels.round_rows(part, None)
            assert torch.equal(scale, (part.float().abs().amax(1, keepdim=True) / 448).clamp(
                min=torch.finfo(torch.float32).tiny))
            expected = (part.float() / scale).to(torch.float8_e4m3fn)
            assert torch.equal(codes.float(), expected.float())
    one = torch.tensor(0.25)
    codes, scale = kernels.round_rows(rows[3:4].to(dtype) / 8, one)
    assert scale is one and torch.equal(codes.float(), rows[3:4] / 2)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bytes_may_lie_anywhere(kernels):
    """Promise: views that begin at an odd byte, or are not contiguous, give the same numbers."""
    form, raw = FORMATS["Q6_K"], random_bytes(4, 2 * 210 + 1)
    assert same(kernels.dequantise_blocks(form, raw[:, 1:], torch.float32), form.dequantise(raw[:, 1:]))
    flat = raw.flatten()[1:841]
    assert same(kernels.dequantise_blocks(form, flat, torch.float32), form.dequantise(flat))


@interpreted
def test_an_empty_weight_has_no_numbers(kernels):
    """Promise: no rows in, no rows out."""
    raw, codes = torch.empty(0, 34, dtype=torch.uint8), torch.empty(0, 8, dtype=torch.int8)
    assert kernels.dequantise_blocks(FORMATS["Q8_0"], raw, torch.bfloat16).shape == (0, 32)
    assert kernels.dequantise_scaled(codes, torch.ones(1), torch.bfloat16).shape == (0, 8)


def test_weights_off_the_gpu_have_no_kernel():
    """Promise: on a CPU, and in a type that kernels don't write, the caller is told to do it himself."""
    raw, codes = random_bytes(2, 34), torch.zeros(4, dtype=torch.int8)
    assert kernels_for(torch.device("cpu")) is None and fused_blocks(FORMATS["Q8_0"], raw, torch.bfloat16) is None
    assert fused_scaled(codes, torch.ones(1), torch.bfloat16) is None
    assert fused_blocks(FORMATS["Q8_0"], raw, torch.float64) is None
    assert fused_rounding(torch.zeros(2, 16), None) is None


def test_a_device_that_fails_is_tried_once(caplog):
    """Promise: where a kernel cannot be launched, the log says why once, whatever the format, and nothing is raised."""
    missing = torch.device("cuda", 99)
    with caplog.at_level(logging.WARNING):
        for kind in ("Q4_K", "Q6_K", torch.float8_e4m3fn, "Q4_K"):
            assert kernels_for(missing, kind) is None
    message, = (record.getMessage() for record in caplog.records)
    assert "cuda:99" in message and "unpacked by PyTorch's own operations" in message and "Triton" in message


def test_triton_is_imported_only_for_a_gpu():
    """Promise: the engine is imported, and unpacks weights on a CPU, without Triton."""
    script = ("import sys, torch; sys.modules['triton'] = None; from wan_core.weights.gguf_blocks import FORMATS; "
              "from wan_core.weights.quantised import Blocks; "
              "raw = torch.zeros(2, 34, dtype=torch.uint8); "
              "print(Blocks(FORMATS['Q8_0']).dequantise({'raw': raw}, torch.float32).shape)")
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == ["torch.Size([2,", "32])"], found.stderr


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wan_core.weights import triton_kernels as kernels
from wan_core.weights.gguf_blocks import FORMATS

def assembly(kernel, types, constants, target):
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    defaults = {p.name: p.default for p in kernel.params if types[p.name] == "constexpr" and p.has_default}
    source = ASTSource(fn=kernel, signature=types, constexprs={**defaults, **constants})
    return compile(source, target=target, options={"enable_fp_fusion": False}).asm

types = {"raw": "*u8", "out": "*i16", "count": "i32"}
for name in sys.argv[1:]:
    kernel, constants = kernels.kernel_of(FORMATS[name])
    made = assembly(kernel, types, constants, GPUTarget("cuda", 75, 32))
    print(name, len(made["cubin"]) > 0 and "fma" not in made["ptx"])
types = {"codes": "*u8", "scale": "*fp32", "out": "*fp16", "parts": "i32", "length": "i64", "tiles": "i32"}
made = assembly(kernels._scaled, types, {"KIND": "e4m3", "HEIGHT": 2, "WIDTH": 1024}, GPUTarget("hip", "gfx1100", 32))
print("scaled", len(made["hsaco"]) > 0)
types, sizes = {"rows": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32"}, {"WIDTH": 13824, "TILE": 16384}
for target, measured in ((89, False), (90, True)):
    made = assembly(kernels._rounded, types, {"MEASURED": measured, "LARGEST": 448.0, "SMALLEST": 1e-38, **sizes},
                    GPUTarget("cuda", target, 32))
    print(target, len(made["cubin"]) > 0)
"""


@pytest.mark.slow
def test_kernels_compile_for_graphics_cards(tmp_path):
    """Promise: every kernel of blocks compiles for NVIDIA cards since Turing, without joined products and sums, which
    would round otherwise than PyTorch; that of FP8 for AMD's RDNA 3, which has no FP8 type; that which rounds to FP8
    for the cards that have it."""
    names = ("Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS")
    surroundings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", COMPILE, *names], cwd=ROOT, capture_output=True, text=True,
                           env=surroundings)
    assert found.stdout.split() == [word for name in (*names, "scaled", "89", "90")
                                    for word in (name, "True")], found.stderr


@on_gpu
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_on_a_gpu(name):
    """Promise: on the card every format goes through its kernel, and gives the numbers that the CPU gives."""
    assert kernels_for(GPU, name) is not None
    for raw, dtype in itertools.product(block_cases(name), DTYPES):
        found = Blocks(FORMATS[name]).dequantise({"raw": raw.to(GPU)}, dtype)
        assert same(found.cpu(), FORMATS[name].dequantise(raw, dtype))


@on_gpu
@pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_scaled_codes_on_a_gpu(form):
    """Promise: on the card all codes and scales go through their kernel, and give the numbers that the CPU gives."""
    assert kernels_for(GPU, form) is not None
    for (codes, scale), dtype in itertools.product(scaled_cases(), DTYPES):
        parts = {"codes": codes, "scale": scale}
        found = Scaled(form).dequantise({name: part.to(GPU) for name, part in parts.items()}, dtype)
        assert same(found.cpu(), Scaled(form).dequantise(parts, dtype))


@on_gpu
def test_without_a_compiler_the_numbers_still_come(tmp_path):
    """Promise: on a machine with a card and no C compiler weights are unpacked by PyTorch, and the log says so."""
    script = ("import logging, torch; logging.basicConfig(); from wan_core.weights.gguf_blocks import FORMATS; "
              "from wan_core.weights.quantised import Blocks; raw = torch.zeros(2, 34, dtype=torch.uint8).cuda(); "
              "print(Blocks(FORMATS['Q8_0']).dequantise({'raw': raw}, torch.float32).sum().item())")
    surroundings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CC": str(tmp_path / "no-compiler")}
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=surroundings)
    assert found.stdout.strip() == "0.0" and "does not run here" in found.stderr


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_on_a_gpu(dtype):
    """Promise: on a card with FP8 activations are rounded by the kernel, to the codes that the CPU gives: all but those
    in the middle of two, which another last digit of the quotient may take to either."""
    if not has_fp8_products(GPU):
        pytest.skip("this card has no FP8 arithmetic")
    rows = torch.randn(33, 5120, generator=torch.Generator().manual_seed(1)).to(dtype)
    for scale in (None, torch.tensor(0.02)):
        codes, own = fused_rounding(rows.to(GPU), None if scale is None else scale.to(GPU))
        wanted = rows.float() / own.cpu()
        expected = wanted.to(torch.float8_e4m3fn).float()
        assert (codes.cpu().float() != expected).float().mean() < 1e-4
        assert (codes.cpu().float() - wanted).abs().max() <= 16.01
