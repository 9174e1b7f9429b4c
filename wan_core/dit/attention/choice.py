"""How a run computes attention: a backend, others for ranges of noise levels, and whether it is sparse."""

from dataclasses import dataclass

from .dispatch import PLAIN, check_backend
from .radial import Radial


@dataclass(frozen=True)
class AttentionRange:
    """`backend` is to be used at noise levels (sigma) from `start` down to `end`, both included.

    Raises ValueError for an unknown backend, or unless 1 >= start >= end >= 0.
    """

    backend: str
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        check_backend(self.backend)
        if not 0 <= self.end <= self.start <= 1:
            raise ValueError(f"attention {self.backend!r} is to hold from sigma {self.start} to {self.end}; expected "
                             "1 >= start >= end >= 0.")


@dataclass(frozen=True)
class Attention:
    """`backend`, but where one of `ranges` holds the first of these; `radial` says where it is sparse, None: nowhere.

    Raises ValueError for an unknown backend.
    """

    backend: str = PLAIN
    ranges: tuple[AttentionRange, ...] = ()
    radial: Radial | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend)

    def __str__(self) -> str:
        return f"{self.backend!r}{', radial' if self.radial else ''}"

    def at(self, sigma: float) -> "Attention":
        """What holds at a noise level: one backend, and radial or not."""
        holding = (one.backend for one in self.ranges if one.start >= sigma >= one.end)
        is_sparse = self.radial is not None and sigma <= self.radial.start
        return Attention(next(holding, self.backend), radial=self.radial if is_sparse else None)
