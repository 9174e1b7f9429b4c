"""Where the blocks of a model live: all on the device, or some on the host, from where they come to be computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Layout:
    """How many of a model's blocks are `swapped`, through how many `slots`, and how many bytes of host memory may be
    `pinned` for them; the latter makes no other layout of it, as it changes with what the host has free.

    Raises ValueError for numbers that cannot be.
    """

    swapped: int = 0
    slots: int = 2
    pinned: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.swapped < 0 or self.slots < 1 or self.pinned < 0:
            raise ValueError(f"{self} is no layout: expected swapped >= 0 blocks, slots >= 1 and pinned >= 0 bytes.")

    def positions(self, count: int) -> tuple[int, ...]:
        """Which of `count` blocks are swapped.

        They are spread evenly: while blocks that stay compute, the next swapped one has more time to arrive.
        """
        swapped = min(self.swapped, count)
        return tuple(index for index in range(count) if (index + 1) * swapped // count > index * swapped // count)

    def on_device(self, blocks: Sequence[int]) -> int:
        """Bytes on the device of blocks that take so many each: those that stay, and the slots of the others."""
        swapped = set(self.positions(len(blocks)))
        resident = sum(size for index, size in enumerate(blocks) if index not in swapped)
        return resident + min(self.slots, len(swapped)) * max((blocks[index] for index in swapped), default=0)

    def names(self, module: nn.Module) -> tuple[str, ...]:
        """Names of the swapped blocks in `module`, which may be on the meta device."""
        names = block_names(module)
        return tuple(names[index] for index in self.positions(len(names)))


RESIDENT = Layout()


def by_block(sizes: Mapping[str, int], blocks: Sequence[str]) -> tuple[list[int], int]:
    """Of bytes by the names of tensors: those in each of the `blocks`, and in all other modules together."""
    each, others = dict.fromkeys(blocks, 0), 0
    for name, nbytes in sizes.items():
        block = ".".join(name.split(".", 2)[:2])
        if block in each:
            each[block] += nbytes
        else:
            others += nbytes
    return list(each.values()), others


def below(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a tensor's name is that of one below one of the modules `names`."""
    prefixes = tuple(f"{name}." for name in names)
    return lambda name: name.startswith(prefixes)


def block_names(module: nn.Module) -> list[str]:
    """Names of a model's blocks: what stands in its lists of modules, and runs one after the other."""
    return [f"{name}.{index}" for name, child in module.named_children() if isinstance(child, nn.ModuleList)
            for index in range(len(child))]
