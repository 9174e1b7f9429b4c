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
    """Tile height, tile width and overlap of neighbouring tiles, all in pixels."""

    height: int
    width: int
    overlap: int = 64

    def check(self, stride: int) -> None:
        """Raise ValueError unless all sizes fit the VAE's spatial `stride` (pixels per latent pixel)."""
        for name, value in (("height", self.height), ("width", self.width), ("overlap", self.overlap)):
            if value % stride or value < stride:
                raise ValueError(f"VAE tile {name} is {value} pixels; it must be a positive multiple of {stride}. "
                                 f"Use {max(stride, round(value / stride) * stride)}.")
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
