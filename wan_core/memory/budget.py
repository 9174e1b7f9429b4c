"""How much memory there is: on the device for a run, and on the host for pinning."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

GB = 1_000_000_000

# Kept free beside what is reckoned: kernels' own workspaces, the driver, fragments between tensors.
_MARGIN = 400_000_000


@dataclass(frozen=True)
class Memory:
    """What a run may use, in GB (10^9 bytes): `budget` of the device and `pinned` of the host, None for automatic; and
    after how many steps it is saved where the host has a place for that, 0 for never.

    Raises ValueError for numbers that are no amounts.
    """

    budget: float | None = None
    pinned: float | None = None
    save_every: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (("memory budget", self.budget, 0.001), ("limit of pinned memory", self.pinned, 0.0)):
            # NaN fails every comparison, and so this one.
            if value is not None and not least <= value < 1e6:
                raise ValueError(f"the {name} is {value} GB; expected a number of GB, or none for automatic.")
        if self.save_every < 0:
            raise ValueError(f"a run is to be saved every {self.save_every} steps; expected 1 or more, or 0 for never.")

    def pinned_bytes(self) -> int:
        """How much of the host's memory may be page-locked: automatically half of what is available."""
        return available_host_memory() // 2 if self.pinned is None else int(self.pinned * GB)


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that a run can have on a device now, with a margin for what libraries take; None where it does not say."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        free, _ = backend.mem_get_info(device)
        # Memory that PyTorch holds and does not use.
        free += backend.memory_reserved(device) - backend.memory_allocated(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        return None
    return max(0, free - _MARGIN)


def reset_peak(device: torch.device) -> int:
    """Begin to measure the most memory that is taken on a device, where it says so; returns what is taken already."""
    if device.type not in ("cuda", "xpu"):
        return 0
    backend = getattr(torch, device.type)
    backend.reset_peak_memory_stats(device)
    return backend.memory_allocated(device)


def measured_peak(device: torch.device, before: int) -> int | None:
    """The most bytes that were taken on a device since `reset_peak`, beside the `before` that others have; None where
    it does not say."""
    if device.type not in ("cuda", "xpu"):
        return None
    return getattr(torch, device.type).max_memory_allocated(device) - before


def available_host_memory() -> int:
    """Bytes of the host's memory that nobody uses; 0 where the system does not say."""
    table = Path("/proc/meminfo")
    if table.exists():
        return next((int(line.split()[1]) * 1024 for line in table.read_text().splitlines()
                     if line.startswith("MemAvailable")), 0)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        # macOS says how much there is and not how much is free; half of it usually is.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _windows_memory()


def _windows_memory() -> int:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong),
                    *((name, ctypes.c_ulonglong) for name in ("total", "available", "total_page", "available_page",
                                                              "total_virtual", "available_virtual", "extended"))]

    if not hasattr(ctypes, "windll"):
        return 0
    status = Status(length=ctypes.sizeof(Status))
    return status.available if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0
