"""What a block's work on single tokens costs: PyTorch's operations against the kernels of one pass.

    python benchmarks/fused_kernels.py                  # on the GPU if there is one, 75,600 tokens (14B at 720p)
    python benchmarks/fused_kernels.py --tokens 32760   # 480p
    python benchmarks/fused_kernels.py --compile        # torch.compile of PyTorch's operations, too

Least traffic is what has to be read and written at least; "of copy" is that traffic over the kernel's time, in percent
of the rate at which the same device copies 0.5 GB. GELU is timed together with the product that it stands behind, where
traffic is not what counts. "Of a step" is what the difference comes to in a guided step of a 14B model, 40 blocks and
two passes. On a CPU only PyTorch's operations are timed, on few tokens. Printed as a table, times in milliseconds.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.dequantise import DTYPES  # noqa: E402
from benchmarks.limits import copy_rate  # noqa: E402
from benchmarks.shared import best_device, device_name, median_time  # noqa: E402
from wan_core.dit import fused as kernels_of_blocks  # noqa: E402
from wan_core.dit.layers import CrossAttention, LayerNorm, gelu_of  # noqa: E402
from wan_core.dit.rope import rope_table  # noqa: E402
from wan_core.dit.stream import add_and_modulate, add_gated, add_gated_and_norm, modulated  # noqa: E402
from wan_core.dit.time import TimeRows  # noqa: E402
from wan_core.weights import fused as kernels_of_weights  # noqa: E402
from wan_core.weights.fp8 import has_fp8_products, rounded_rows  # noqa: E402

WIDTH, HEADS, HIDDEN, BLOCKS, PASSES = 5120, 40, 13824, 40, 2
TOKENS, CPU_TOKENS = 75600, 64


class Case(NamedTuple):
    """Something that a block does `count` times: `plain`, by PyTorch's operations where there are no kernels, and
    `kernel`, None for the same function with them.

    `traffic`: bytes a token that are read and written at least, 0 where it is not traffic that counts.
    """

    name: str
    count: int
    traffic: int
    fused: bool
    plain: Callable[[], object]
    kernel: Callable[[], object] | None = None


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the products")
    parser.add_argument("--tokens", type=int, help=f"default: {TOKENS}, on a CPU {CPU_TOKENS}")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each, of which the median counts")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    tokens = options.tokens or (CPU_TOKENS if device.type == "cpu" else TOKENS)
    rate = copy_rate(device)
    print(f"{device_name(device)}, torch {torch.__version__}, {tokens} tokens of {WIDTH} in {options.dtype}, copies at "
          f"{rate / 1e9:.0f} GB/s")
    if device.type == "cpu":
        print("No GPU: only PyTorch's operations are timed, the kernels run on graphics cards.")
    print("| work | in a block | torch | torch.compile | kernel | speed-up | of copy | of a step |")
    print("|---|---|---|---|---|---|---|---|")
    for cases in (stream_cases, product_cases):
        for case in cases(tokens, device, dtype):
            print(row(case, tokens, device, options.rounds, options.compile, rate), flush=True)


def row(case: Case, tokens: int, device: torch.device, rounds: int, compiled: bool, rate: float) -> str:
    """One line of the table; `rate` in bytes a second."""
    with without_kernels():
        first = median_time(case.plain, rounds, device)
    cells = [case.name, str(case.count), f"{first * 1e3:.3f}", "", "", "", "", ""]
    if compiled:
        # The cases share functions, of which only so many versions are kept.
        torch.compiler.reset()
        cells[3] = f"{median_time(torch.compile(case.plain), rounds, device) * 1e3:.3f}"
    if case.fused:
        kernel = median_time(case.kernel or case.plain, rounds, device)
        cells[4:6] = f"{kernel * 1e3:.3f}", f"{first / kernel:.1f}x"
        cells[6] = f"{tokens * case.traffic / kernel / rate:.0%}" if case.traffic else ""
        cells[7] = f"{(first - kernel) * case.count * BLOCKS * PASSES * 1e3:.0f}"
    return f"| {' | '.join(cells)} |"


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it no device counts as one that has kernels."""
    modules = kernels_of_blocks, kernels_of_weights
    before = [module._ACCELERATORS for module in modules]
    for module in modules:
        module._ACCELERATORS = ()
    try:
        yield
    finally:
        for module, devices in zip(modules, before):
            module._ACCELERATORS = devices


def stream_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Work on the stream of tokens, and on queries and keys."""
    x = torch.randn(1, tokens, WIDTH, device=device)
    update = torch.randn(1, tokens, WIDTH, device=device, dtype=dtype)
    # Small, for the stream is added to in place, again and again.
    time = TimeRows((torch.full((1, 6, WIDTH), 1e-6, device=device),), (tokens,))
    norm, size, half = LayerNorm(WIDTH, 1e-6).to(device, dtype), 4 * WIDTH, dtype.itemsize * WIDTH
    fused = kernels_of_blocks.kernels_for(x, dtype) is not None
    yield Case("norm and modulation", 1, size + half, fused, lambda: modulated(x, time, 0, 1e-6, dtype))
    yield Case("gated residual, norm", 1, 2 * (size + half), fused,
               lambda: add_gated_and_norm(x, update, time, 2, norm, dtype))
    yield Case("residual, norm and modulation", 1, 2 * (size + half), fused,
               lambda: add_and_modulate(x, update, time, 3, 1e-6, dtype))
    yield Case("gated residual", 1, 2 * size + half, fused, lambda: add_gated(x, update, time, 5))
    with torch.device("meta"):
        attention = CrossAttention(WIDTH, HEADS, 1e-6)
    attention.norm_q.to_empty(device=device).to(dtype).weight.fill_(1)
    rope = rope_table((1, 1, tokens), WIDTH // HEADS, device)
    yield Case("RMS norm and rotation", 2, 2 * half, fused,
               lambda: attention._rotated(update, attention.norm_q, rope, dtype))
    yield Case("RMS norm", 1, 2 * half, fused, lambda: attention._keys(update, attention.norm_q))


def product_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """What comes before and behind matrix products."""
    fused = has_fp8_products(device) and kernels_of_weights.kernels_for(device, kernels_of_weights.ROUNDING) is not None
    for width, count in ((WIDTH, 7), (HIDDEN, 1)):
        rows = torch.randn(tokens, width, device=device, dtype=dtype)
        for name, by_row in (("rows", True), ("whole", False)):
            # With one scale for all the numbers are read once more, to find the largest.
            traffic = (dtype.itemsize * (1 if by_row else 2) + 1) * width
            yield Case(f"FP8 rounding of {name}, {width}", count, traffic, fused,
                       lambda rows=rows, by_row=by_row: rounded_rows(rows, by_row))
    del rows
    x, weight = (torch.randn(count, WIDTH, device=device, dtype=dtype) for count in (tokens, HIDDEN))
    bias = torch.randn(HIDDEN, device=device, dtype=dtype)
    yield Case("product and GELU", 1, 0, kernels_of_blocks.joins_gelu(x, bias),
               lambda: gelu_of(F.linear(x, weight, bias)),
               lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True))


if __name__ == "__main__":
    main()
