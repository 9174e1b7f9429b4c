"""Block swap: blocks whose weights live on the host and are on the device only while they compute.

Every swapped block has its master on the host, which is never written: views of the mapped file, or a pinned copy. A
fixed pool of slots on the device takes the blocks in turn; while one computes, the next ones are copied. Nothing is
ever copied back. The model knows nothing of it: hooks before and behind each block put the slot's tensors in the place
of the master's and take them out again, so between calls the module is as it was built, whatever happened in the call.

Two orderings hold it together:

1. A slot is overwritten only after the block in it has computed: its copy waits for the mark `left`, which is set
   behind that block.
2. A block computes only after its weights have arrived: computing waits for the mark `arrived`, which stands for the
   end of its copy.

Which block comes next is learnt from what came last time, so branches that run between the main blocks, and models
that skip some, are copied ahead as well.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .lanes import Copies, Lane, lane_for
from .leaves import Leaf, leaves
from .pinning import Pinning

# Where tensors begin in a slot: what the widest loads of GPU kernels, and cuBLAS, ask for.
ALIGNMENT = 256


class Slot:
    """Room on the device for one block.

    `unit` is in it or on its way, `arrived` and `left` are the marks of the two orderings, `bound` says that it is
    computed from, and `turn` when it was last, which tells the slot that is free soonest.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.unit: Unit | None = None
        self.left: object = None
        self.arrived: object = None
        self.bound = False
        self.turn = 0


class Pool:
    """The slots of a device; models that take turns share them."""

    def __init__(self, device: torch.device, count: int, lane: Lane | None = None) -> None:
        if count < 1:
            raise ValueError(f"a pool of {count} slots was asked for; block swap needs 1, and 2 to copy ahead.")
        self.device, self.count, self.lane = device, count, lane or lane_for(device)
        self.slots: list[Slot] = []

    def fit(self, nbytes: int) -> None:
        """Make every slot at least `nbytes` large."""
        if self.slots and len(self.slots[0].buffer) >= nbytes:
            return
        self.clear()
        # A lane's thread writes into the slots; in tensors of inference mode, which is each thread's own, it could not.
        with torch.inference_mode(False):
            self.slots = [Slot(torch.empty(nbytes, dtype=torch.uint8, device=self.device)) for _ in range(self.count)]
        for slot in self.slots:
            # The memory may be what computing that was asked for before still uses.
            slot.left = self.lane.mark()

    def clear(self) -> None:
        """Give the slots back."""
        self.lane.finish()
        self.slots = []


class Unit:
    """A swapped block: its tensors on the host, and where each lies in a slot."""

    def __init__(self, block: nn.Module, pinning: Pinning | None = None) -> None:
        self.block = block
        self._pinning = pinning
        self._flat: Tensor | None = None
        self._pinned: dict[Leaf, Tensor] = {}
        self._offsets: dict[Leaf, int] = {}
        # Weak, or buffers of slots that were replaced by larger ones would stay.
        self._views: WeakKeyDictionary[Slot, list[Tensor]] = WeakKeyDictionary()
        self.lay_out()

    def lay_out(self) -> None:
        """Look at the block's tensors anew; what is pinned keeps its place."""
        self._rest = {leaf: leaf.get() for leaf in leaves(self.block) if leaf.get().numel()}
        pinned = {leaf: self._offsets[leaf] for leaf, tensor in self._rest.items()
                  if self._pinned.get(leaf) is tensor}
        self._pinned = {leaf: self._rest[leaf] for leaf in pinned}
        end = 0 if self._flat is None else len(self._flat)
        self._offsets = {}
        for leaf, tensor in self._rest.items():
            if leaf in pinned:
                self._offsets[leaf] = pinned[leaf]
            else:
                self._offsets[leaf] = end
                end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end
        self._views.clear()

    def copies(self, slot: Slot) -> Copies:
        """What has to be copied for the block to be in `slot`; pins the block first, if there is pinned memory."""
        if self._pinning is not None:
            self._pin(self._pinning)
            self._pinning = None
        views = dict(zip(self._rest, self._views_of(slot)))
        pairs = [] if self._flat is None else [(self._flat, slot.buffer[:len(self._flat)])]
        return pairs + [(tensor, views[leaf]) for leaf, tensor in self._rest.items() if leaf not in self._pinned]

    def bind(self, slot: Slot) -> None:
        """Let the block compute from `slot`."""
        for leaf, view in zip(self._rest, self._views_of(slot)):
            leaf.put(view)

    def unbind(self) -> None:
        """Let the block have its master again."""
        for leaf, tensor in self._rest.items():
            leaf.put(tensor)

    def _pin(self, pinning: Pinning) -> None:
        flat = pinning.take(self.nbytes)
        if flat is None:
            return
        for leaf, tensor in self._rest.items():
            _view(flat, self._offsets[leaf], tensor).copy_(tensor)
        self._flat, self._pinned = flat, dict(self._rest)

    def _views_of(self, slot: Slot) -> list[Tensor]:
        """The block's tensors as they lie in `slot`, made once."""
        if slot not in self._views:
            views = [_view(slot.buffer, self._offsets[leaf], tensor) for leaf, tensor in self._rest.items()]
            self._views[slot] = [nn.Parameter(view, requires_grad=False) if leaf.is_parameter else view
                                 for leaf, view in zip(self._rest, views)]
        return self._views[slot]


class BlockSwap:
    """Hooks on `blocks`, which are on the host, that bring them to the pool's device when they are called."""

    def __init__(self, blocks: Sequence[nn.Module], pool: Pool, pinning: Pinning | None = None) -> None:
        self.pool = pool
        # Memory is pinned as long as this is there.
        self._pinning = pinning
        self._units = {block: Unit(block, pinning) for block in blocks}
        pool.fit(self._largest())
        units = list(self._units.values())
        # Until it is known better: one after the other, and from the last to the first.
        self._next = dict(zip(units, units[1:] + units[:1]))
        self._last: Unit | None = None
        self._turn = 0
        self._hooks = []
        for block in blocks:
            self._hooks.append(block.register_forward_pre_hook(self._enter, prepend=True))
            self._hooks.append(block.register_forward_hook(self._leave, always_call=True))

    def begin(self) -> None:
        """Copy the first blocks ahead, into slots that nobody will compute from any more."""
        first = next(iter(self._units.values()))
        self._hold(first)
        self._look_ahead(first)

    def refit(self) -> None:
        """To be called when tensors in the blocks were added, taken away or replaced: what is on the device is old."""
        self._end_bound()
        self.pool.lane.finish()
        for unit in self._units.values():
            unit.lay_out()
        for slot in self.pool.slots:
            slot.unit = None
        self.pool.fit(self._largest())

    def close(self) -> None:
        """Take the hooks off; the blocks stay on the host. The slots belong to the pool."""
        self._end_bound()
        self.pool.lane.finish()
        for hook in self._hooks:
            hook.remove()
        for slot in self.pool.slots:
            if slot.unit in self._next:
                slot.unit = None

    def _enter(self, block: nn.Module, _arguments: tuple) -> None:
        unit = self._units[block]
        self._end_bound()
        if self._last is not None:
            self._next[self._last] = unit
        self._last = unit
        slot = self._hold(unit)
        try:
            self.pool.lane.wait(slot.arrived)
            slot.bound = True
            unit.bind(slot)
            self._look_ahead(unit)
        except BaseException:
            # No hook runs behind a block that did not begin.
            unit.unbind()
            slot.bound, slot.unit = False, None
            raise

    def _leave(self, block: nn.Module, _arguments: tuple, _output: object) -> None:
        for slot in self.pool.slots:
            if slot.bound and slot.unit is self._units[block]:
                self._end(slot)

    def _end_bound(self) -> None:
        """End what is still computed from: hooks behind a block do not run after an interrupt from the keyboard."""
        for slot in self.pool.slots:
            if slot.bound:
                self._end(slot)

    def _end(self, slot: Slot) -> None:
        """The block in `slot` has computed, or will no more."""
        slot.unit.unbind()
        self._turn += 1
        slot.bound, slot.left, slot.turn = False, self.pool.lane.mark(), self._turn

    def _hold(self, unit: Unit, kept: Sequence[Unit] = ()) -> Slot:
        """The slot that `unit` is in or on its way to; not one that is computed from, or that one of `kept` is in."""
        held = next((slot for slot in self.pool.slots if slot.unit is unit), None)
        if held:
            return held
        free = [slot for slot in self.pool.slots if not slot.bound and slot.unit not in kept]
        slot = min(free, key=lambda slot: slot.turn)
        slot.unit = None
        slot.arrived = self.pool.lane.copy(lambda: unit.copies(slot), slot.left)
        slot.unit = unit
        return slot

    def _look_ahead(self, unit: Unit) -> None:
        """Copy the blocks that come behind `unit` into the other slots."""
        ahead: list[Unit] = []
        for _ in range(len(self.pool.slots) - 1):
            following = self._next[ahead[-1] if ahead else unit]
            if following is unit or following in ahead:
                break
            ahead.append(following)
        for following in ahead:
            self._hold(following, kept=(unit, *ahead))

    def _largest(self) -> int:
        return max(unit.nbytes for unit in self._units.values())


def _view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the shape and type of `like`, in the bytes of `buffer` from `offset` on."""
    return buffer[offset:offset + like.nbytes].view(like.dtype).view(like.shape)
