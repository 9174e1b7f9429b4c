"""Bookkeeping of a training run: a state file to go on from and a CSV log of its figures."""

import csv
import logging
import os
from pathlib import Path

import torch
from torch import nn

from .optimizer import Optimizers

log = logging.getLogger(__name__)


def save_state(path: Path, module: nn.Module, optimizers: Optimizers, generator: torch.Generator, step: int) -> None:
    """Write everything that the next step depends on, atomically."""
    state = {"module": module.state_dict(), "optimizers": optimizers.state_dict(),
             "generator": generator.get_state(), "step": step}
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path, module: nn.Module, optimizers: Optimizers, generator: torch.Generator) -> int:
    """Restore what `save_state` wrote and return the number of steps done, 0 if there is no state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    optimizers.load_state_dict(state["optimizers"])
    generator.set_state(state["generator"])
    log.info("going on from step %d of %s", state["step"], path)
    return state["step"]


class RunLog:
    """A CSV file with one row per report; rows past the step that a run goes on from are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], start: int) -> None:
        rows = []
        if start and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= start]
        self._columns = columns
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(columns)
        self._writer.writerows(rows)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(self, step: int, *figures: float) -> None:
        """Append a row: the step, and one figure per further column, to four significant digits."""
        row = [step, *(f"{figure:.4g}" for figure in figures)]
        self._writer.writerow(row)
        self._file.flush()
        log.info("%s", ", ".join(f"{name} {value}" for name, value in zip(self._columns, row)))
