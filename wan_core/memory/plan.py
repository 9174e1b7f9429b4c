"""How a run uses memory: where weights live, and how much is worked on at a time."""

from dataclasses import dataclass

from .layout import RESIDENT, Layout


@dataclass(frozen=True)
class Plan:
    """The layout of the transformer's blocks, and how many tokens it works on at a time, None for all."""

    layout: Layout = RESIDENT
    chunk: int | None = None
