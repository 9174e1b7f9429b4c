"""Placement: who keeps which model on which device. The models themselves do not know.

The master of every weight is its checkpoint file, mapped into memory and never written. A device copy is made from it
when a part is needed and simply dropped when something else needs the room; nothing is ever copied back. Of a large
model some or all blocks come and go while it runs (see `swap`).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from .budget import free_device_memory
from .layout import RESIDENT, Layout
from .leaves import leaves
from .pinning import Pinning
from .swap import BlockSwap, Pool

# Names that working_dtype accepts, beside "auto".
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Buildable(Protocol):
    """A checkpoint that can be built into a module."""

    def build(self, device: torch.device, dtype: torch.dtype, layout: Layout = RESIDENT) -> nn.Module:
        """A new module that computes in `dtype`, on `device` but for the swapped blocks of `layout`."""


class Placement(Protocol):
    """Gives modules that are ready to run on `device`."""

    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of weights and slots that are on the device now."""

    def budget(self, wanted: int) -> int | None:
        """Bytes that a run can have on the device, weights included, after an attempt to get `wanted`; None for all."""

    def layout_of(self, part: Buildable) -> Layout | None:
        """The layout in which `part` is on the device now; None if it is not."""

    def place(self, part: Buildable, dtype: torch.dtype, layout: Layout = RESIDENT) -> nn.Module:
        """The module of `part`, ready to run; valid until the next call."""

    def expect(self, part: Buildable, dtype: torch.dtype, layout: Layout, prepare: Callable[[nn.Module], None]) -> None:
        """`part` will be asked for next; what there is room for can be brought to the device ahead.

        `prepare` puts on its module, which is on the host, what will be on it when it runs.
        """

    def changed(self) -> None:
        """Tensors of the placed module were added, taken away or replaced."""

    def clear(self) -> None:
        """Let go of everything on the device."""


class OneAtATime:
    """Keeps the last part that was asked for; asking for another drops it first, so the two never share the device.

    Two parts with swapped blocks take turns in the same slots: the first blocks of the one that is expected arrive
    while the other still computes.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """`device` is the accelerator, if there is one, unless given. Raises ValueError for one that is not there."""
        self.device = _checked(device) if device is not None else default_device()
        self._held: Held | None = None
        self._expected: Held | None = None
        self._pool: Pool | None = None

    def budget(self, wanted: int) -> int | None:
        free = free_device_memory(self.device)
        return None if free is None else free + self.nbytes

    @property
    def nbytes(self) -> int:
        slots = sum(slot.buffer.nbytes for slot in self._pool.slots) if self._pool else 0
        return slots + (self._held.nbytes if self._held else 0)

    def layout_of(self, part: Buildable) -> Layout | None:
        return self._held.layout if self._held and self._held.part is part else None

    def holds(self, part: Buildable, dtype: torch.dtype, layout: Layout = RESIDENT) -> bool:
        """Whether `place` would have nothing to do."""
        return self._held is not None and self._held.holds(part, dtype, layout)

    def place(self, part: Buildable, dtype: torch.dtype, layout: Layout = RESIDENT) -> nn.Module:
        if self._held and self._held.holds(part, dtype, layout):
            return self._held.module
        self._drop_held()
        expected, self._expected = self._expected, None
        if expected and expected.holds(part, dtype, layout):
            self._held = expected
            expected.settle()
            return expected.module
        if expected:
            expected.close()
        if self._pool:
            # Slots of another part may be larger than this one needs.
            self._pool.clear()
        if not layout.swapped or self._pool and self._pool.count != layout.slots:
            self._pool = None
        if layout.swapped and not self._pool:
            self._pool = Pool(self.device, layout.slots)
        self._held = Held(part, dtype, layout, self.device, self._pool)
        return self._held.module

    def expect(self, part: Buildable, dtype: torch.dtype, layout: Layout, prepare: Callable[[nn.Module], None]) -> None:
        fits = layout.swapped and self._pool is not None and self._pool.count == layout.slots
        if not fits or self._held is None or self._held.holds(part, dtype, layout):
            return
        if self._expected is None or not self._expected.holds(part, dtype, layout):
            if self._expected:
                self._expected.close()
            self._expected = Held(part, dtype, layout, self.device, self._pool, prepare)
            self._expected.swap.begin()

    def changed(self) -> None:
        if self._held and self._held.swap:
            self._held.swap.refit()

    def clear(self) -> None:
        self._drop_held()
        if self._expected:
            self._expected.close()
        if self._pool:
            self._pool.clear()
        self._expected = self._pool = None

    def _drop_held(self) -> None:
        if self._held:
            self._held.close()
        self._held = None


class Held:
    """A part's module with its swapped blocks, if it has any, going through the slots of `pool`.

    Made ahead, with `prepare` for its module, only the slots are used: everything else stays on the host until it is
    settled.
    """

    def __init__(self, part: Buildable, dtype: torch.dtype, layout: Layout, device: torch.device, pool: Pool | None,
                 prepare: Callable[[nn.Module], None] | None = None) -> None:
        self.part, self.layout = part, layout
        self._dtype, self._device = dtype, device
        self.module = part.build(torch.device("cpu") if prepare else device, dtype, layout)
        if prepare:
            prepare(self.module)
        self.swap: BlockSwap | None = None
        self._swapped = layout.names(self.module)
        if self._swapped:
            blocks = [self.module.get_submodule(name) for name in self._swapped]
            self.swap = BlockSwap(blocks, pool, Pinning(device, layout.pinned))

    def holds(self, part: Buildable, dtype: torch.dtype, layout: Layout) -> bool:
        return self.part is part and (self._dtype, self.layout) == (dtype, layout)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights that are on the device to stay."""
        return sum(leaf.get().nbytes for leaf in leaves(self.module) if leaf.get().device == self._device)

    def settle(self) -> None:
        """Bring what is not swapped to the device."""
        swapped = {leaf for name in self._swapped for leaf in leaves(self.module.get_submodule(name))}
        for leaf in leaves(self.module):
            if leaf not in swapped:
                leaf.put(leaf.get().to(self._device))

    def close(self) -> None:
        """Let go of the slots."""
        if self.swap:
            self.swap.close()


def _checked(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    # Unknown names, missing drivers and builds without the device's code: each fails in its own way.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device '{device}' cannot be used here: {reason}. Use cpu, or an accelerator that this "
                         "machine and its PyTorch have.") from error


def default_device() -> torch.device:
    """The machine's accelerator (CUDA, ROCm, XPU, MPS) if it has one, else the CPU; named as tensors on it name it."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return _checked(torch.accelerator.current_accelerator())


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
