"""Sizes: which one a video gets from a picture, and how a picture is brought to it.

The official pipelines keep an area and take the picture's aspect ratio: image to video and first-last frame on a grid
of 16 pixels (Wan2.1 `wan/image2video.py`), TI2V 5B on one of 32, where of two roundings the one nearer to the ratio
counts (Wan2.2 `wan/utils/utils.py`, best_output_size). Pictures are then stretched with a bicubic filter (image to
video: the size follows the picture, so hardly anything is stretched) or scaled to cover the size and cut in the middle
(TI2V, VACE).
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# How a picture is brought to another size.
FITS = ("crop", "stretch")

Resample = Callable[..., Tensor]

# Support of the Lanczos filter in pixels of the smaller scale.
_LOBES = 3


def size_for_area(width: int, height: int, area: int, grid: int = 16) -> tuple[int, int]:
    """Width and height of about `area` pixels with the aspect ratio of a picture, multiples of `grid`.

    The rule of image to video: both sides are brought down to latent pixels, then down to the grid, in the official
    code's floating point (in which 832x480 at its own area becomes 832x464). Raises ValueError for an empty picture or
    an area too small.
    """
    _check(width, height, area, grid)
    ratio, latent = height / width, grid // 2
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    return tuple(max(grid, round(side // latent // 2 * 2) * latent) for side in sides)


def best_size(width: int, height: int, area: int, grid: int = 32) -> tuple[int, int]:
    """The rule of TI2V: at most `area` pixels, on the grid, and as near to the aspect ratio as one rounding allows.

    Raises as `size_for_area`.
    """
    _check(width, height, area, grid)
    ratio = width / height
    ideal_width = math.sqrt(area * ratio)
    ideal_height = area / ideal_width
    first_width = int(ideal_width // grid * grid)
    first = first_width, int(area / max(first_width, 1) // grid * grid)
    second_height = int(ideal_height // grid * grid)
    second = int(area / max(second_height, 1) // grid * grid), second_height
    candidates = [size for size in (second, first) if min(size) >= grid]
    if not candidates:
        return grid, grid

    def distortion(size: tuple[int, int]) -> float:
        own = size[0] / size[1]
        return max(ratio / own, own / ratio)

    return min(candidates, key=distortion)


def fit(images: Tensor, width: int, height: int, how: str = "crop") -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] at another size.

    "crop": scaled with a Lanczos filter until they cover it, then cut in the middle; "stretch": both sides scaled on
    their own, bicubic. Pictures that have the size are returned as they are. Raises ValueError for another word.
    """
    filters = {"crop": lanczos, "stretch": lambda images, *size: F.interpolate(images, size, mode="bicubic")}
    return _fit(images, width, height, how, filters).clamp(-1, 1)


def fit_mask(masks: Tensor, width: int, height: int, how: str = "crop") -> Tensor:
    """Masks [B, 1, H, W] in 0..1 at another size, cut or stretched as their pictures are; bilinear, so without ringing.

    Raises as `fit`.
    """
    def bilinear(masks: Tensor, *size: int) -> Tensor:
        return F.interpolate(masks, size, mode="bilinear", antialias=True)

    return _fit(masks, width, height, how, dict.fromkeys(FITS, bilinear))


def check_values(name: str, values: Tensor, low: float, high: float) -> None:
    """Raise ValueError unless pictures or masks hold numbers from about `low` to `high`.

    Filters overshoot, so half the range is allowed beyond each end; 0..255 is still told apart, and NaN.
    """
    least, most = (value.item() for value in values.float().aminmax())
    if not (3 * low - high) / 2 <= least <= most <= (3 * high - low) / 2:
        raise ValueError(f"{name} holds values from {least:g} to {most:g}; expected numbers from {low:g} to {high:g}.")


def masks_for(masks: Tensor, width: int, height: int, frames: int, how: str = "crop") -> Tensor:
    """Masks [F, 1, H, W] for a clip: [1, frames, height, width]. One holds for all frames; where there are too few,
    the rest is 1 (made anew). Raises as `fit`."""
    fitted = fit_mask(masks[:frames].float(), width, height, how)[:, 0]
    if len(fitted) == 1:
        return fitted.expand(frames, -1, -1)[None]
    return torch.cat([fitted, fitted.new_ones(frames - len(fitted), height, width)])[None]


def _fit(images: Tensor, width: int, height: int, how: str, filters: Mapping[str, Resample]) -> Tensor:
    if how not in FITS:
        raise ValueError(f"unknown way to fit a picture {how!r}; choose one of {', '.join(FITS)}.")
    if images.shape[2:] == (height, width):
        return images
    if how == "stretch":
        return filters[how](images.float(), height, width)
    scale = max(width / images.shape[3], height / images.shape[2])
    covering = [max(side, round(given * scale)) for side, given in zip((height, width), images.shape[2:])]
    scaled = filters[how](images.float(), *covering)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return scaled[..., top:top + height, left:left + width]


def lanczos(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures [B, C, H, W] resampled with a Lanczos filter of three lobes, widened where they shrink."""
    rows, columns = _lanczos_matrix(images.shape[2], height), _lanczos_matrix(images.shape[3], width)
    return rows.to(images) @ images @ columns.to(images).mT


def _lanczos_matrix(before: int, after: int) -> Tensor:
    """[after, before]: the weight of each old pixel in each new one; rows sum to one."""
    scale = max(before / after, 1.0)
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * before / after
    distance = (torch.arange(before, dtype=torch.float64) + 0.5 - centres[:, None]) / scale
    weights = torch.sinc(distance) * torch.sinc(distance / _LOBES) * (distance.abs() < _LOBES)
    return weights / weights.sum(1, keepdim=True)


def _check(width: int, height: int, area: int, grid: int) -> None:
    if min(width, height) < 1:
        raise ValueError(f"a picture of {width}x{height} pixels has no aspect ratio; give one that is not empty.")
    if area < grid * grid:
        raise ValueError(f"an area of {area} pixels is smaller than the smallest video, {grid}x{grid}.")
