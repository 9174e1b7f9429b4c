"""How fast a device computes and is fed, measured on it: what the share of time lost to copies is reckoned from."""

import functools
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in matrix products, and bytes a second from the host to the device."""

    flops: float
    bandwidth: float


@functools.cache
def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of `device` in `dtype`, measured once in about a tenth of a second."""
    side = 4096 if device.type != "cpu" else 512
    a = torch.randn((side, side), device=device).to(dtype)
    flops = 2 * side ** 3 / _seconds(lambda: a @ a, device)
    nbytes = 64 << 20
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return Rates(flops, nbytes / _seconds(lambda: target.copy_(source, non_blocking=True), device))


def _seconds(work: object, device: torch.device, repeats: int = 4) -> float:
    """The shortest of some runs, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        _finish(device)
        start = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
