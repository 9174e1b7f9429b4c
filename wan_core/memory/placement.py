"""Placement: who keeps which model on which device. The models themselves do not know.

The master of every weight is its checkpoint file, mapped into memory and never written. A device copy is made from it
when a part is needed and simply dropped when something else needs the room; nothing is ever copied back.
"""

from typing import Protocol

import torch
from torch import nn

# Names that working_dtype accepts, beside "auto".
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Buildable(Protocol):
    """A checkpoint that can be built into a module."""

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A new module on `device` that computes in `dtype`."""


class Placement(Protocol):
    """Gives modules that are ready to run on `device`."""

    device: torch.device

    def place(self, part: Buildable, dtype: torch.dtype) -> nn.Module:
        """The module of `part`, ready to run; valid until the next call."""

    def clear(self) -> None:
        """Let go of everything on the device."""


class OneAtATime:
    """Keeps the last part that was asked for; asking for another drops it first, so the two never share the device."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        """`device` is the accelerator, if there is one, unless given. Raises ValueError for one that is not there."""
        self.device = _checked(device) if device is not None else default_device()
        self._held: tuple[Buildable, torch.dtype, nn.Module] | None = None

    def place(self, part: Buildable, dtype: torch.dtype) -> nn.Module:
        if self._held and self._held[0] is part and self._held[1] == dtype:
            return self._held[2]
        self.clear()
        module = part.build(self.device, dtype)
        self._held = (part, dtype, module)
        return module

    def clear(self) -> None:
        self._held = None


def _checked(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    # Unknown names, missing drivers and builds without the device's code: each fails in its own way.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device '{device}' cannot be used here: {reason}. Use cpu, or an accelerator that this "
                         "machine and its PyTorch have.") from error


def default_device() -> torch.device:
    """The machine's accelerator (CUDA, ROCm, XPU, MPS) if it has one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def working_dtype(requested: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `requested`, or for "auto" float32 on a CPU and the stored half precision elsewhere.

    Weights stored in float32 run in bfloat16 on an accelerator: that is the precision the released models were trained
    and are officially run in. Raises ValueError for an unknown name.
    """
    if requested == "auto":
        if device.type == "cpu":
            return torch.float32
        return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    if requested not in DTYPES:
        raise ValueError(f"unknown precision {requested!r}; choose auto, {', '.join(DTYPES)}.")
    return DTYPES[requested]
