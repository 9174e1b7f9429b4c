"""What unpacking a full-size weight costs in every format: PyTorch's operations against the Triton kernel.

    python benchmarks/dequantise.py                    # on the GPU if there is one
    python benchmarks/dequantise.py --compile          # torch.compile of PyTorch's operations, too; takes minutes
    python benchmarks/dequantise.py --formats Q4_K Q8_0

The weight is one of 13824x5120, the feed-forward layer of the 14B models. Least traffic is its packed bytes read once
and its numbers written once; "of copy" is that traffic over the kernel's time, in percent of the rate at which the same
device copies 0.5 GB. On a CPU only PyTorch's operations are timed. Printed as a table, times in milliseconds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.limits import copy_rate  # noqa: E402
from benchmarks.shared import best_device, device_name, median_time  # noqa: E402
from wan_core.weights.fused import fused_blocks, fused_scaled, kernels_for  # noqa: E402
from wan_core.weights.gguf_blocks import FORMATS  # noqa: E402

ROWS, COLUMNS = 13824, 5120
SCALED = {"FP8 e4m3": torch.float8_e4m3fn, "FP8 e5m2": torch.float8_e5m2, "int8": torch.int8}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the numbers")
    parser.add_argument("--formats", nargs="+", choices=(*FORMATS, *SCALED), default=(*FORMATS, *SCALED))
    parser.add_argument("--rounds", type=int, help="runs of each, of which the median counts (default: 20, on a CPU 1)")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rounds = options.rounds or (1 if device.type == "cpu" else 20)
    rate = copy_rate(device)
    print(f"{device_name(device)}, torch {torch.__version__}, {ROWS}x{COLUMNS} to {options.dtype}, copies at "
          f"{rate / 1e9:.0f} GB/s")
    if device.type == "cpu":
        print("No GPU: only PyTorch's operations are timed, the kernels run on graphics cards.")
    print("| format | packed MB | torch | torch.compile | Triton | speed-up | of copy |\n|---|---|---|---|---|---|---|")
    for name in options.formats:
        print(row(name, device, dtype, rounds, options.compile, rate), flush=True)


def row(name: str, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool, rate: float) -> str:
    """One format's line of the table; `rate` in bytes a second."""
    parts = scaled_weight(SCALED[name], device) if name in SCALED else block_weight(name, device)
    plain, fused = ways(name, dtype)
    packed = sum(part.nbytes for part in parts.values())
    traffic = packed + ROWS * COLUMNS * dtype.itemsize
    first = median_time(lambda: plain(**parts), rounds, device)
    cells = [name, f"{packed / 1e6:.1f}", f"{first * 1e3:.2f}", "", "", "", ""]
    if compiled:
        # Each format's function has the same code, of which only so many versions are kept.
        torch.compiler.reset()
        joined = torch.compile(plain)
        joined(**parts)
        cells[3] = f"{median_time(lambda: joined(**parts), rounds, device) * 1e3:.2f}"
    if kernels_for(device, SCALED.get(name, name)) is not None:
        kernel = median_time(lambda: fused(**parts), rounds, device)
        cells[4:] = f"{kernel * 1e3:.3f}", f"{first / kernel:.1f}x", f"{traffic / kernel / rate:.0%}"
    return f"| {' | '.join(cells)} |"


def ways(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor | None]]:
    """PyTorch's operations and the kernel, as functions of the parts of a weight."""
    if name in SCALED:
        return (lambda codes, scale: (codes.float() * scale).to(dtype),
                lambda codes, scale: fused_scaled(codes, scale, dtype))
    form = FORMATS[name]
    return lambda raw: form.dequantise(raw, dtype), lambda raw: fused_blocks(form, raw, dtype)


def block_weight(name: str, device: torch.device) -> Mapping[str, Tensor]:
    # Bytes below 64 are finite scales, wherever they stand.
    nbytes = COLUMNS // FORMATS[name].size * FORMATS[name].nbytes
    return {"raw": torch.randint(0, 64, (ROWS, nbytes), dtype=torch.uint8, device=device)}


def scaled_weight(dtype: torch.dtype, device: torch.device) -> Mapping[str, Tensor]:
    """With one scale a row."""
    codes = torch.randint(0, 64, (ROWS, COLUMNS), dtype=torch.uint8, device=device)
    return {"codes": codes.view(dtype), "scale": torch.rand(ROWS, 1, device=device)}


if __name__ == "__main__":
    main()
