"""Draws the noise levels of a run as a picture, with tensors alone: no plotting package is needed for one curve."""

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH, HEIGHT, MARGIN = 640, 360, 24
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
BACKGROUND, LINES, BOUNDARY = (0.10, 0.11, 0.13), (0.24, 0.26, 0.29), (0.75, 0.75, 0.75)
COLOURS = {"high": (0.97, 0.62, 0.25), "low": (0.36, 0.68, 0.98)}
# How much of an expert's colour the ground of its steps has, and up to how many steps each has a mark.
TINT, MARKED = 0.13, 60


def plot_sigmas(sigmas: Sequence[float], experts: Sequence[str], boundary: float | None = None) -> Tensor:
    """A picture [1, 360, 640, 3] in 0..1 of `sigmas` (n + 1, within 0..1) over the steps 0 to n.

    `experts` (n) says by 'high' and 'low' which expert takes each step: its colour is that of the curve and of the
    ground under it. Lines mark 0, 0.25, 0.5, 0.75 and 1, a dashed one `boundary`.
    """
    canvas = torch.tensor(BACKGROUND).expand(HEIGHT, WIDTH, 3).clone()
    across, up = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    points = [(MARGIN + across * i / (len(sigmas) - 1), MARGIN + up * (1 - sigma)) for i, sigma in enumerate(sigmas)]
    if boundary is not None:
        for expert, (left, _), (right, _) in zip(experts, points, points[1:]):
            _cover(canvas[MARGIN:HEIGHT - MARGIN, round(left):round(right)], torch.tensor(TINT), COLOURS[expert])
    for level in GRID:
        y = MARGIN + up * (1 - level)
        _line(canvas, (MARGIN, y), (WIDTH - MARGIN, y), 1.0, LINES)
    if boundary is not None:
        y = MARGIN + up * (1 - boundary)
        for x in range(MARGIN, WIDTH - MARGIN, 14):
            _line(canvas, (x, y), (min(x + 8, WIDTH - MARGIN), y), 1.0, BOUNDARY)
    for expert, begin, end in zip(experts, points, points[1:]):
        _line(canvas, begin, end, 2.5, COLOURS[expert])
    if len(experts) <= MARKED:
        for expert, point in zip((*experts, experts[-1]), points):
            _line(canvas, point, point, 7.0 if len(experts) <= MARKED // 2 else 4.0, COLOURS[expert])
    return canvas[None]


def _line(canvas: Tensor, begin: tuple[float, float], end: tuple[float, float], width: float,
          colour: tuple[float, float, float]) -> None:
    """A line with round ends and soft edges; from a point to itself, a disc."""
    (x0, y0), (x1, y1) = begin, end
    reach = width / 2 + 1
    left, top = int(min(x0, x1) - reach), int(min(y0, y1) - reach)
    part = canvas[max(top, 0):int(max(y0, y1) + reach) + 1, max(left, 0):int(max(x0, x1) + reach) + 1]
    y = torch.arange(part.shape[0])[:, None] + max(top, 0) + 0.5 - y0
    x = torch.arange(part.shape[1])[None] + max(left, 0) + 0.5 - x0
    dx, dy = x1 - x0, y1 - y0
    along = ((x * dx + y * dy) / ((dx * dx + dy * dy) or 1)).clamp(0, 1)
    distance = torch.hypot(x - along * dx, y - along * dy)
    _cover(part, (width / 2 + 0.5 - distance).clamp(0, 1), colour)


def _cover(part: Tensor, opacity: Tensor, colour: tuple[float, float, float]) -> None:
    part.lerp_(torch.tensor(colour).expand_as(part), opacity[..., None].expand_as(part))
