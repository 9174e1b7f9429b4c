"""The time of a video's tokens: one row of modulation for each distinct timestep, never one for each token.

Frames that are known already (the first one of image to video with TI2V) enter at timestep 0, the others at the
step's. Runs of frames with one timestep share a row, and the blocks modulate run by run. The official code holds six
rows of the model's width for every token, 4 to 9 GB at full size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TimeRows:
    """Runs of tokens that share a timestep: a tensor for each [B, ...], and how many tokens each run has."""

    rows: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "TimeRows":
        """The same runs with `function` of their rows, computed once for each distinct row."""
        done = {id(row): row for row in self.rows}
        results = {key: function(row) for key, row in done.items()}
        return TimeRows(tuple(results[id(row)] for row in self.rows), self.lengths)

    def part(self, start: int, stop: int) -> "TimeRows":
        """The runs of tokens `start` to `stop`."""
        rows, lengths, end = [], [], 0
        for row, length in zip(self.rows, self.lengths):
            begin, end = end, end + length
            if begin < stop and end > start:
                rows.append(row)
                lengths.append(min(end, stop) - max(begin, start))
        return TimeRows(tuple(rows), tuple(lengths))

    def per_run(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """function(tokens of a run, its row) for x [B, L, D], joined again; a single run costs no copy."""
        if len(self.rows) == 1:
            return function(x, self.rows[0])
        return torch.cat([function(part, row) for part, row in zip(x.split(self.lengths, 1), self.rows)], 1)


def time_rows(timestep: Tensor, frames: int, tokens_per_frame: int) -> TimeRows:
    """The runs of `timestep` [B] or [B, frames]; their rows are the timesteps [B] of each.

    Raises ValueError for another number of frames.
    """
    if timestep.ndim == 1:
        return TimeRows((timestep,), (frames * tokens_per_frame,))
    if timestep.ndim != 2 or timestep.shape[1] != frames:
        raise ValueError(f"timesteps have shape {list(timestep.shape)}; expected [batch], or [batch, {frames}] with "
                         "one for each latent frame.")
    distinct, which = torch.unique(timestep, dim=1, return_inverse=True)
    columns = distinct.unbind(1)
    rows, lengths = [], []
    for column in which.tolist():
        if rows and rows[-1] is columns[column]:
            lengths[-1] += tokens_per_frame
        else:
            rows.append(columns[column])
            lengths.append(tokens_per_frame)
    return TimeRows(tuple(rows), tuple(lengths))


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim]: cosines, then sines, of timestep * 10000^(-i / (dim / 2)), in float64, returned as float32."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = torch.outer(timestep.double(), frequencies)
    return torch.cat([angles.cos(), angles.sin()], -1).float()
