"""Does a clip of the nano family show what was asked for? Judged from its pixels alone.

`score` is given frames and nothing else. It takes the border's median as the background, cuts out the one compact
region that differs from it, and reads off the region's colour (hue), its path (a straight line through the centroids)
and its outline (overlap with equally large circles, squares and triangles at the same place). Whatever is not clearly
there is reported as None, so that an empty clip, noise or a smear agrees with no caption. `agreement` then compares
observations with the scenes that were asked for.

The thresholds allow for blur, noise and a colour cast, which lossy decoders add, and are far from what real
shapes give: see tests/training/test_score.py.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, signed_distance

STILL = "still"

# All colour distances are in units of [-1, 1] pixels, so black to white is 2 * sqrt(3).
_MIN_CONTRAST = 0.5
_MIN_CHROMA = 0.4
_MAX_HUE_ERROR = math.radians(30)
_MAX_BACKGROUND_ERROR = 0.5
# Median distance of the border's pixels from their median: how far from plain a plain background may be.
_MAX_UNEVENNESS = 0.2
# The region, as a share of the picture. The shapes drawn for training cover 5 to 16 %.
_AREA_LIMITS = (0.02, 0.3)
# Second moment of the region against a disc's of equal area: disc 1, square 1.05, triangle 1.21, scattered specks > 2.
_MAX_SPREAD = 1.6
_MIN_OVERLAP = 0.8
_MIN_TRAVEL = 6.0
# Root mean square distance of the centroids from the straight line, in pixels; a steady motion stays well below one.
_MAX_WOBBLE = 2.5
# Share of the frames in which the object has to be found, and in which a colour has to be the same.
_MIN_PRESENCE = 0.75
_MIN_MAJORITY = 0.5


@dataclass(frozen=True)
class Observation:
    """What a clip shows; None where it shows nothing of the kind. direction may also be "still"."""

    colour: str | None
    direction: str | None
    shape: str | None
    background: str | None


@dataclass(frozen=True)
class Scores:
    """Fractions of clips, 0 to 1, in which an attribute is as asked for.

    background counts only clips whose caption names it, and is None where no caption does. complete is the fraction
    of clips with colour, direction and shape all right.
    """

    colour: float
    direction: float
    shape: float
    background: float | None
    complete: float


@dataclass(frozen=True)
class _Objects:
    """The object's mask per frame [F, H, W] bool, in which frames it is there [F] bool, and its centroids [F, 2]."""

    mask: Tensor
    present: Tensor
    centroid: Tensor


def score(frames: Tensor) -> Observation:
    """Observe one clip: frames [3, F, H, W] in [-1, 1], with F >= 2. Raises ValueError for any other layout."""
    if frames.ndim != 4 or frames.shape[0] != 3 or frames.shape[1] < 2 or not frames.is_floating_point():
        raise ValueError(f"score got {frames.dtype} of shape {tuple(frames.shape)}; "
                         "expected floating-point frames [3, F, H, W] with F >= 2 and values in [-1, 1]")
    # A slight blur costs the outline little and takes two thirds of the noise's amplitude.
    video = frames.detach().to("cpu", torch.float32).movedim(1, 0)
    if not video.isfinite().all():
        return Observation(None, None, None, None)
    video = video.clamp(-1, 1)
    video = F.avg_pool2d(F.pad(video, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    border = _border(video)
    ground = border.median(dim=0).values
    background = _nearest_background(ground) if (border - ground).norm(dim=1).median() <= _MAX_UNEVENNESS else None
    objects = _find_objects((video - ground[:, None, None]).square().sum(dim=1).sqrt())
    if objects.present.float().mean() < _MIN_PRESENCE:
        return Observation(None, None, None, background)
    return Observation(_colour(video, objects), _direction(objects.centroid, objects.present), _shape(objects),
                       background)


def agreement(observations: Sequence[Observation], scenes: Sequence[Scene]) -> Scores:
    """Compare what clips show with the scenes whose captions they were made from, pairwise."""
    if not scenes or len(observations) != len(scenes):
        raise ValueError(f"agreement got {len(observations)} observations and {len(scenes)} scenes; "
                         "expected one observation for each scene, and at least one")
    pairs = list(zip(observations, scenes, strict=True))
    named = [seen.background == asked.background for seen, asked in pairs if asked.names_background]
    return Scores(
        colour=_fraction(seen.colour == asked.colour for seen, asked in pairs),
        direction=_fraction(seen.direction == asked.direction for seen, asked in pairs),
        shape=_fraction(seen.shape == asked.shape for seen, asked in pairs),
        background=_fraction(named) if named else None,
        complete=_fraction((seen.shape, seen.colour, seen.direction) == asked.combination for seen, asked in pairs),
    )


def _border(video: Tensor) -> Tensor:
    """The pixels of the outermost ring of all frames: [F, 3, H, W] to [N, 3]."""
    sides = (video[..., 0, :], video[..., -1, :], video[..., :, 0], video[..., :, -1])
    return torch.cat(sides, dim=-1).movedim(1, -1).reshape(-1, 3)


def _nearest_background(ground: Tensor) -> str | None:
    distances = {name: (ground - _unit(rgb)).norm().item() for name, rgb in BACKGROUNDS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= _MAX_BACKGROUND_ERROR else None


def _find_objects(contrast: Tensor) -> _Objects:
    """Cut out one compact region per frame from the distance to the background [F, H, W]."""
    frames, height, width = contrast.shape
    # The edge of a blurred shape lies where it is half as strong as inside. "Inside" is the strength that at least
    # one percent of the pixels reach: a single hot pixel does not count, a small shape does.
    strength = contrast.flatten(1).quantile(0.99, dim=1)
    mask = contrast > (strength / 2).clamp(min=_MIN_CONTRAST / 2)[:, None, None]
    mask = _densest_region(mask)
    area = mask.sum(dim=(1, 2)).clamp(min=1)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    centroid = torch.stack(((mask * x).sum(dim=(1, 2)), (mask * y[:, None]).sum(dim=(1, 2))), dim=-1) / area[:, None]
    offsets = (x - centroid[:, 0, None, None]) ** 2 + (y[:, None] - centroid[:, 1, None, None]) ** 2
    spread = 2 * math.pi * (mask * offsets).sum(dim=(1, 2)) / area**2
    low, high = (limit * height * width for limit in _AREA_LIMITS)
    present = (strength >= _MIN_CONTRAST) & (area >= low) & (area <= high) & (spread <= _MAX_SPREAD)
    return _Objects(mask, present, centroid)


def _densest_region(mask: Tensor) -> Tensor:
    """Keep, in each frame of mask [F, H, W], the connected region around the place where most is set."""
    frames, height, width = mask.shape
    allowed = mask[:, None].float()
    # The weight on a place's own pixel makes sure that the seed itself lies in the mask.
    density = F.avg_pool2d(allowed, 9, stride=1, padding=4) + allowed
    seed = density.flatten(1).argmax(dim=1)
    region = F.one_hot(seed, height * width).view(frames, 1, height, width) * allowed
    while True:
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * allowed
        if torch.equal(grown, region):
            return region[:, 0] > 0
        region = grown


def _colour(video: Tensor, objects: _Objects) -> str | None:
    """The named colour that the object has in most of the frames."""
    votes = Counter(
        _nearest_colour(frame[:, mask].median(dim=1).values)
        for frame, mask, present in zip(video, objects.mask, objects.present, strict=True) if present
    )
    name, count = votes.most_common(1)[0]
    return name if count > _MIN_MAJORITY * len(video) else None


def _nearest_colour(rgb: Tensor) -> str | None:
    """Nearest in hue, which a decoder's change of brightness or saturation leaves alone."""
    hue, chroma = _hue_and_chroma(rgb)
    errors = {}
    for name, named in COLOURS.items():
        difference = hue - _hue_and_chroma(_unit(named))[0]
        errors[name] = abs(math.remainder(difference, math.tau))
    name = min(errors, key=errors.get)
    return name if chroma >= _MIN_CHROMA and errors[name] <= _MAX_HUE_ERROR else None


def _hue_and_chroma(rgb: Tensor) -> tuple[float, float]:
    """Hue in radians and chroma (0 to 2 for [-1, 1] pixels): polar coordinates of the plane of equal R + G + B."""
    red, green, blue = rgb.tolist()
    along, across = red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue)
    return math.atan2(across, along), math.hypot(along, across)


def _direction(centroid: Tensor, present: Tensor) -> str | None:
    """Least-squares line through the centroids [F, 2]; None where they do not lie on one."""
    frames = len(centroid)
    time = torch.arange(frames, dtype=torch.float32)[present]
    path = centroid[present]
    time, path = time - time.mean(), path - path.mean(dim=0)
    velocity = (time[:, None] * path).sum(dim=0) / time.square().sum()
    wobble = (path - time[:, None] * velocity).square().sum(dim=1).mean().sqrt()
    if wobble > _MAX_WOBBLE:
        return None
    travel_x, travel_y = (velocity * (frames - 1)).tolist()
    if max(abs(travel_x), abs(travel_y)) < _MIN_TRAVEL:
        return STILL
    if abs(travel_x) >= abs(travel_y):
        return "right" if travel_x > 0 else "left"
    return "down" if travel_y > 0 else "up"


def _shape(objects: _Objects) -> str | None:
    """The shape whose outline, at the same place and with the same area, overlaps most with the mask in all frames."""
    mask, centroid = objects.mask[objects.present], objects.centroid[objects.present]
    height, width = mask.shape[1:]
    x = torch.arange(width) + 0.5 - centroid[:, 0, None, None]
    y = (torch.arange(height) + 0.5)[:, None] - centroid[:, 1, None, None]
    radius = (mask.sum(dim=(1, 2)) / math.pi).sqrt()[:, None, None]
    overlaps = {}
    for shape in SHAPES:
        size = radius * _size_of_unit_disc_area(shape)
        template = signed_distance(shape, x, y, size) <= 0
        overlaps[shape] = ((mask & template).sum() / (mask | template).sum()).item()
    shape = max(overlaps, key=overlaps.get)
    return shape if overlaps[shape] >= _MIN_OVERLAP else None


def _size_of_unit_disc_area(shape: str) -> float:
    """Size at which a shape has the area of a disc of radius 1, measured on a fine grid."""
    grid = torch.arange(-200, 200) / 100 + 0.005
    area = (signed_distance(shape, grid[None, :], grid[:, None], 1.0) <= 0).sum().item() * 1e-4
    return math.sqrt(math.pi / area)


def _unit(rgb: tuple[int, int, int]) -> Tensor:
    """An 8-bit colour in [-1, 1]."""
    return torch.tensor(rgb) / 127.5 - 1


def _fraction(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)
