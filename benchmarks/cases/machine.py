"""What the machine itself does: the rates that limits are reckoned with."""

from benchmarks.cases.bench import Bench, name_of


def rates(bench: Bench) -> None:
    """Matrix products, convolutions, and copies."""
    for dtype in dict.fromkeys(map(bench.multiplied_in, bench.scale.forms)):
        bench.report.add("machine", f"matmul {name_of(dtype)}, TFLOP/s", bench.machine.matmul(dtype) / 1e12)
    dtype = bench.scale.vae_dtype
    bench.report.add("machine", f"conv3d {name_of(dtype)}, channels last, TFLOP/s",
                     bench.machine.convolution(dtype) / 1e12)
    bench.report.add("machine", "copy within memory, GB/s read and written", bench.machine.copy() / 1e9)
    bench.report.add("machine", "host to device, GB/s", bench.machine.transfer() / 1e9)
