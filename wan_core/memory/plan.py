"""How a run uses memory: where weights live, how much is worked on at a time, and what that needs and costs.

A plan is chosen before anything runs. What costs nothing is taken first: chunks of tokens that still fill the device,
then as many swapped blocks as it takes, then smaller chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .layout import RESIDENT, Layout

# Tokens that are worked on at a time where memory is short. Matrix products of this many rows still fill a GPU; below
# the second number launching kernels would cost more than it saves.
CHUNK, SMALLEST_CHUNK = 8192, 512


@dataclass(frozen=True)
class Plan:
    """The layout of the transformer's blocks, and how many tokens it works on at a time, None for all."""

    layout: Layout = RESIDENT
    chunk: int | None = None

    def leaner(self, blocks: int, tokens: int) -> "Plan | None":
        """A plan that needs less memory for a model of so many `blocks` and a video of so many `tokens`.

        What costs nothing comes first: chunks, then blocks, a quarter of them at a time, then smaller chunks. None
        where nothing is left to save.
        """
        chunk = tokens if self.chunk is None else min(self.chunk, tokens)
        if chunk > CHUNK:
            return replace(self, chunk=CHUNK)
        if self.layout.swapped < blocks:
            swapped = min(blocks, self.layout.swapped + -(-blocks // 4))
            return replace(self, layout=replace(self.layout, swapped=swapped))
        if chunk > SMALLEST_CHUNK:
            return replace(self, chunk=max(SMALLEST_CHUNK, chunk // 4))
        if self.layout.slots > 1:
            return replace(self, layout=replace(self.layout, slots=self.layout.slots - 1))
        return None


@dataclass(frozen=True)
class Need:
    """What a model needs, in bytes: for each of its blocks, for its other weights, and for what a step works with.

    `working(chunk)` says the latter for a number of tokens that are worked on at a time, None for all `tokens`.
    """

    blocks: tuple[int, ...]
    others: int
    tokens: int
    working: Callable[[int | None], int]

    def weights(self, layout: Layout) -> int:
        """Bytes of weights on the device: what stays there, and the slots."""
        return self.others + layout.on_device(self.blocks)

    def peak(self, plan: Plan) -> int:
        """The most that is on the device at a time."""
        return self.weights(plan.layout) + self.working(plan.chunk)

    def swapped(self, layout: Layout) -> int:
        """Bytes that are copied to the device in each pass through the model."""
        return sum(self.blocks[index] for index in layout.positions(len(self.blocks)))


# So many blocks more than needed may be swapped, if that spares reading the model anew.
_WORTH_KEEPING = 2


def choose(need: Need, budget: int, pinned: int, held: Layout | None = None) -> Plan | None:
    """The plan that costs least time and keeps within `budget` bytes; None where none does.

    Of the swapped blocks as many as go into `pinned` bytes of host memory will be page-locked. Where the model lies on
    the device already, in the layout `held`, it stays so if that is nearly as good: what is free changes a little from
    run to run.
    """
    plan = _cheapest(need, budget, pinned)
    if plan is None or held is None or not 0 <= held.swapped - plan.layout.swapped <= _WORTH_KEEPING:
        return plan
    kept = replace(plan, layout=held)
    return kept if need.peak(kept) <= budget else plan


def _cheapest(need: Need, budget: int, pinned: int) -> Plan | None:
    chunks = [None, *(chunk for chunk in (CHUNK, CHUNK // 4, SMALLEST_CHUNK) if chunk < need.tokens)]
    for chunk in chunks[:2]:
        if need.peak(Plan(RESIDENT, chunk)) <= budget:
            return Plan(RESIDENT, chunk)
    for chunk in chunks[1:] or chunks:
        # Two slots overlap copies with computing; a third evens out blocks of different sizes and is worth no memory.
        for slots in (2, 1):
            for swapped in range(1, len(need.blocks) + 1):
                plan = Plan(Layout(swapped, slots, pinned), chunk)
                if need.peak(plan) <= budget:
                    return plan
    return None


def lost_share(need: Need, plan: Plan, operations: float, flops: float, bandwidth: float) -> float:
    """The share of a step's time that is spent waiting for copies, 0 to 1.

    A step of `operations` takes as long as its computing or its copies, whichever is longer: with two slots they
    overlap, with one they do not.
    """
    computing, copying = operations / flops, need.swapped(plan.layout) / bandwidth
    total = max(computing, copying) if plan.layout.slots > 1 else computing + copying
    return 1 - computing / total
