"""Spatial tiles for the VAE: where they lie and how their overlaps are blended.

A tile is a rectangle of the picture that is encoded or decoded through the whole clip on its own, so device memory is
bounded by the tile and not by the picture. Neighbours overlap; in an overlap the weights of the two tiles ramp linearly
and sum to one, so accumulating `weight * tile` gives the picture with no division and no visible seam.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tile height, tile width and overlap of neighbouring tiles, all in pixels; `together` tiles pass in one batch."""

    height: int
    width: int
    overlap: int = 64
    together: int = 1

    def check(self, stride: int) -> None:
        """Raise ValueError unless all sizes fit the VAE's spatial `stride` (pixels per latent pixel)."""
        for name, value in (("height", self.height), ("width", self.width), ("overlap", self.overlap)):
            if value % stride or value < stride:
                raise ValueError(f"VAE tile {name} is {value} pixels; it must be a positive multiple of {stride}. "
                                 f"Use {max(stride, round(value / stride) * stride)}.")
        if self.together < 1:
            raise ValueError(f"{self.together} VAE tiles are to pass together; use 1 or more.")
        if self.overlap * 2 > min(self.height, self.width):
            raise ValueError(f"VAE tile overlap is {self.overlap} pixels, more than half of the tile "
                             f"({self.width}x{self.height}); use at most {min(self.height, self.width) // 2}.")

    def count(self, height: int, width: int, stride: int) -> int:
        """How many tiles cover `height` x `width` latent pixels of a VAE with this `stride`."""
        overlap = self.overlap // stride
        return (len(spans(height, self.height // stride, overlap))
                * len(spans(width, self.width // stride, overlap)))


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in latent pixels: start..stop; its weight rises over `rise`, falls over `fall`."""

    start: int
    stop: int
    rise: tuple[int, int] | None
    fall: tuple[int, int] | None

    def weights(self, scale: int, device: torch.device | str = "cpu") -> Tensor:
        """Blending weights [(stop - start) * scale] in 0..1; `scale` is output pixels per latent pixel."""
        centres = (torch.arange(self.start * scale, self.stop * scale, device=device) + 0.5) / scale
        weight = torch.ones_like(centres)
        if self.rise:
            weight *= _ramp(centres, *self.rise)
        if self.fall:
            weight *= 1 - _ramp(centres, *self.fall)
        return weight


@dataclass(frozen=True)
class Tile:
    """One tile: its rows and columns in latent pixels."""

    rows: Span
    columns: Span

    @property
    def is_part(self) -> bool:
        """Whether there are other tiles beside it."""
        return any((self.rows.rise, self.rows.fall, self.columns.rise, self.columns.fall))

    def cut(self, source: Tensor, scale: int) -> Tensor:
        """Its region of source [..., height, width] with `scale` positions per latent pixel."""
        return source[..., self.rows.start * scale:self.rows.stop * scale,
                      self.columns.start * scale:self.columns.stop * scale]

    def add_to(self, out: Tensor, piece: Tensor, scale: int) -> None:
        """Add its result to `out`, weighted; where there is no other tile, write it."""
        if not self.is_part:
            out.copy_(piece)
            return
        weights = self.rows.weights(scale)[:, None] * self.columns.weights(scale)
        region = self.cut(out, scale)
        region += piece.to(out.device, out.dtype) * weights.to(out.device)


def tiles_of(height: int, width: int, stride: int, tiling: Tiling | None) -> list[list[Tile]]:
    """The tiles of a picture of so many latent pixels, in batches of tiles that pass through the VAE together."""
    if tiling is None:
        return [[Tile(Span(0, height, None, None), Span(0, width, None, None))]]
    tiling.check(stride)
    overlap = tiling.overlap // stride
    tiles = [Tile(row, column) for row in spans(height, tiling.height // stride, overlap)
             for column in spans(width, tiling.width // stride, overlap)]
    return [tiles[start:start + tiling.together] for start in range(0, len(tiles), tiling.together)]


def _ramp(positions: Tensor, low: int, high: int) -> Tensor:
    return ((positions - low) / (high - low)).clamp(0, 1)


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Cover `length` latent pixels with tiles of `tile`, neighbours sharing at least `overlap`.

    The tiles are spread evenly, so the last one is as wide as the others. The weights change over the middle of what
    two neighbours share, where both have the most context.
    """
    if tile >= length:
        return [Span(0, length, None, None)]
    count = 1 + -(-(length - tile) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    ramps = []
    for left, right in zip(starts, starts[1:]):
        # Never wider than the distance of two tiles, or three tiles would meet in one ramp.
        width = max(1, min(overlap, right - left))
        low = (right + left + tile - width) // 2
        ramps.append((low, low + width))
    return [Span(start, start + tile, rise, fall)
            for start, rise, fall in zip(starts, [None, *ramps], [*ramps, None])]
