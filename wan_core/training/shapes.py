"""Training data of the nano family: captioned clips of one coloured shape that moves over a plain background.

A clip is 17 frames of 64x64 pixels and is drawn, not stored: a `Scene` says what happens in it, `render` turns scenes
into pixels and `caption` into words. Edges are anti-aliased from signed distances, so sub-pixel motion is visible and
the clips have no jagged outlines for the VAE to waste its capacity on. Everything follows from the seed of a
torch.Generator.

What "held out" means
    There are 72 combinations of shape, colour and direction, and len(WORDINGS) ways to put one into words.
    - Eight combinations (HELD_OUT_COMBINATIONS) never occur in training, in no wording. They ask for composition:
      every shape, colour and direction among them has been seen, but not together.
    - For every other combination one wording in eleven never occurs in training. Its clips are known, its exact
      string is not.
    `sample_scene` draws from what is left, and `held_out_scenes` gives a balanced evaluation set of which a quarter
    (16 of 64) are unseen combinations and the others are unseen wordings.

Signed distances: Inigo Quilez, "2D distance functions", https://iquilezles.org/articles/distfunctions2d/ (circle,
box and equilateral triangle; the code here is our own).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

FRAMES = 17
SIZE = 64

SHAPES = ("circle", "square", "triangle")
# About 60 degrees of hue apart, and different in lightness, so that no two can be mistaken after a lossy VAE.
COLOURS = {
    "red": (230, 30, 30),
    "yellow": (245, 220, 30),
    "green": (30, 200, 40),
    "cyan": (30, 220, 220),
    "blue": (35, 50, 240),
    "purple": (210, 40, 220),
}
# Unit steps in image coordinates: x grows to the right, y grows downwards.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# All of low chroma, so that a background is never one of the object colours.
BACKGROUNDS = {"black": (10, 10, 10), "white": (245, 245, 245), "gray": (128, 128, 128), "brown": (85, 55, 35)}

RADIUS_RANGE = (9.0, 14.0)
TRAVEL_RANGE = (16.0, 28.0)
# The frame keeps at least this many pixels of background around the shape in every frame.
MARGIN = 1.5

HELD_OUT_COMBINATIONS = frozenset({
    ("circle", "red", "up"),
    ("circle", "cyan", "left"),
    ("circle", "yellow", "right"),
    ("square", "green", "right"),
    ("square", "purple", "down"),
    ("square", "blue", "left"),
    ("triangle", "purple", "up"),
    ("triangle", "yellow", "down"),
})

_SUBJECTS = ("a {colour} {shape}", "{colour} {shape}", "the {colour} {shape}", "a {shape}, {colour},",
             "a {shape} in {colour}")
_MOTIONS = ("moving {direction}", "moving {towards}", "moves {direction}", "moves {towards}", "is moving {direction}",
            "is moving {towards}", "going {direction}", "goes {towards}", "sliding {towards}")
_GROUNDS = ("{0}", "{0} on a {{background}} background", "on a {{background}} background, {0}")
_ENDINGS = ("", ".")
_TOWARDS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}

# Templates of all captions. One that ends in a full stop is written as a sentence, with a capital letter.
WORDINGS = tuple(
    ground.format(f"{subject} {motion}") + ending
    for subject, motion, ground, ending in product(_SUBJECTS, _MOTIONS, _GROUNDS, _ENDINGS)
)
# Prime, so that the wordings held out of a combination walk through all subjects, motions and grounds.
_HELD_OUT_EVERY = 11

# Distance from the centre to the edges, as multiples of the radius. Chosen so that the three shapes look equally big
# while the largest still has room to travel.
_SQUARE_HALF_SIDE = 0.9
_TRIANGLE_CIRCUMRADIUS = 1.3
_TRIANGLE_HALF_SIDE = _TRIANGLE_CIRCUMRADIUS * math.sqrt(3) / 2

Combination = tuple[str, str, str]
COMBINATIONS: tuple[Combination, ...] = tuple(product(SHAPES, COLOURS, DIRECTIONS))


@dataclass(frozen=True)
class Scene:
    """What happens in one clip.

    x0, y0 are the centre of the shape in the first frame in pixels (the triangle's centre is its centroid); size is
    the nominal radius in pixels; speed is in pixels per frame; wording is an index into WORDINGS.
    """

    shape: str
    colour: str
    direction: str
    background: str
    x0: float
    y0: float
    size: float
    speed: float
    wording: int

    @property
    def combination(self) -> Combination:
        return self.shape, self.colour, self.direction

    @property
    def names_background(self) -> bool:
        """Whether the caption mentions the background; if not, any background agrees with the caption."""
        return "{background}" in WORDINGS[self.wording]

    def way(self, frames: int = FRAMES) -> tuple[float, float, float, float]:
        """The box that the shape stays in over a clip: left, top, right, bottom in pixels."""
        left, right, above, below = _extents(self.shape, self.size)
        step_x, step_y = DIRECTIONS[self.direction]
        x1, y1 = (start + step * self.speed * (frames - 1) for start, step in ((self.x0, step_x), (self.y0, step_y)))
        return (min(self.x0, x1) - left, min(self.y0, y1) - above, max(self.x0, x1) + right, max(self.y0, y1) + below)


def caption(scene: Scene) -> str:
    """The words for a scene, e.g. "a red circle moving left" or "On a black background, the blue square goes up."."""
    return _write(scene.combination, scene.background, scene.wording)


def held_out(scene: Scene) -> bool:
    """Whether the scene's caption belongs to the evaluation set and must not be trained on (see the module text)."""
    return _held_out(scene.combination, scene.wording)


def all_prompts(*, held_out: bool = False) -> Iterator[str]:
    """Every caption used in training, or with held_out=True every caption that is kept out of it."""
    for combination, wording in product(COMBINATIONS, range(len(WORDINGS))):
        if _held_out(combination, wording) == held_out:
            backgrounds = BACKGROUNDS if "{background}" in WORDINGS[wording] else ("",)
            yield from (_write(combination, background, wording) for background in backgrounds)


def sample_scene(generator: torch.Generator, frames: int = FRAMES) -> Scene:
    """Draw a training scene; held-out captions never come up.

    The shape travels 16 to 28 pixels in all between the first and the last of `frames` frames and stays in the picture.
    """
    _check_frames(frames)
    while True:
        draws = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        combination = _pick(COMBINATIONS, draws[0])
        wording = _pick(range(len(WORDINGS)), draws[1])
        if not _held_out(combination, wording):
            return _place(combination, _pick(tuple(BACKGROUNDS), draws[2]), wording, draws[3:], frames)


def sample_batch(generator: torch.Generator, count: int, frames: int = FRAMES,
                 side: int = SIZE) -> tuple[Tensor, list[str]]:
    """Draw `count` training clips: pixels [count, 3, frames, side, side] fp32 in [-1, 1], and their captions."""
    scenes = [sample_scene(generator, frames) for _ in range(count)]
    return render(scenes, frames, side), [caption(scene) for scene in scenes]


def held_out_scenes(count: int = 64) -> tuple[Scene, ...]:
    """A fixed evaluation set: held-out captions, no two alike, balanced over shape, colour, direction, background.

    Every fourth scene is a combination that training never shows, the others are wordings that it never shows.
    """
    if not 1 <= count <= 512:
        raise ValueError(f"count is {count}; the held-out set has 1 to 512 scenes to choose from")
    generator = torch.Generator().manual_seed(0)
    used: Counter[str | Combination] = Counter()
    scenes = []
    for index in range(count):
        unseen = index % 4 == 3
        candidates = [c for c in COMBINATIONS if (c in HELD_OUT_COMBINATIONS) == unseen]
        combination = min(candidates, key=lambda c: (used[c], sum(used[word] for word in c)))
        wordings = [w for w in range(len(WORDINGS)) if _held_out(combination, w)]
        # 7 divides neither number of wordings, so none repeats for a combination before all have been used.
        wording = wordings[(5 * COMBINATIONS.index(combination) + 7 * used[combination]) % len(wordings)]
        background = tuple(BACKGROUNDS)[(index // 4 + index) % len(BACKGROUNDS)]
        used.update((combination, *combination))
        draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        scenes.append(_place(combination, background, wording, draws, FRAMES))
    return tuple(scenes)


def held_out_prompts(count: int = 64) -> tuple[str, ...]:
    """The captions of `held_out_scenes(count)`."""
    return tuple(caption(scene) for scene in held_out_scenes(count))


def render(scenes: Sequence[Scene], frames: int = FRAMES, side: int = SIZE) -> Tensor:
    """Draw scenes as clips [len(scenes), 3, frames, side, side], fp32 in [-1, 1].

    A scene's pixels are those of a 64x64 frame; another `side` shows the same picture larger or smaller.
    """
    covered = coverage(scenes, frames, side)
    ground = _colours(BACKGROUNDS[scene.background] for scene in scenes)
    paint = _colours(COLOURS[scene.colour] for scene in scenes)
    return torch.addcmul(ground, covered, paint - ground)


def coverage(scenes: Sequence[Scene], frames: int = FRAMES, side: int = SIZE) -> Tensor:
    """How much of each pixel the shapes cover, 0 to 1: [len(scenes), 1, frames, side, side]."""
    _check_frames(frames)
    if side < 1:
        raise ValueError(f"side is {side}; a frame needs at least 1 pixel")
    if not scenes:
        raise ValueError("render got no scenes; give at least one")
    steps = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes]) * _column(s.speed for s in scenes)
    starts = torch.tensor([(scene.x0, scene.y0) for scene in scenes])
    centres = starts[:, None] + steps[:, None] * torch.arange(frames)[None, :, None]  # [B, F, 2]
    scale = side / SIZE
    pixel = (torch.arange(side) + 0.5) / scale
    x = pixel[None, None, None, :] - centres[..., 0, None, None]  # [B, F, 1, W]
    y = pixel[None, None, :, None] - centres[..., 1, None, None]  # [B, F, H, 1]
    sizes = _column(scene.size for scene in scenes)[..., None, None]

    covered = torch.empty(len(scenes), 1, frames, side, side)
    for shape in SHAPES:
        members = [index for index, scene in enumerate(scenes) if scene.shape == shape]
        if members:
            distance = signed_distance(shape, x[members], y[members], sizes[members])
            # A pixel whose centre lies d outside the edge is covered by about 0.5 - d of its width.
            covered[members, 0] = (0.5 - scale * distance).clamp_(0, 1)
    return covered


def signed_distance(shape: str, x: Tensor, y: Tensor, size: Tensor | float) -> Tensor:
    """Distance in pixels from (x, y) to the edge of a shape centred at the origin, negative inside.

    x, y and size broadcast; y points down and the triangle points up. Formulas: Quilez (see the module text).
    """
    if shape == "circle":
        return torch.hypot(x, y) - size
    if shape == "square":
        x, y = x.abs() - _SQUARE_HALF_SIDE * size, y.abs() - _SQUARE_HALF_SIDE * size
        return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0)
    if shape == "triangle":
        return _triangle_distance(x, -y, _TRIANGLE_HALF_SIDE * size)
    raise ValueError(f"shape is {shape!r}; known shapes: {', '.join(SHAPES)}")


def _triangle_distance(x: Tensor, y: Tensor, half_side: Tensor | float) -> Tensor:
    """Equilateral triangle that points to +y: fold the plane into one sector, then measure to one horizontal edge."""
    root = math.sqrt(3)
    x = x.abs() - half_side
    y = y + half_side / root
    folded = x + root * y > 0
    x, y = torch.where(folded, (x - root * y) / 2, x), torch.where(folded, (-root * x - y) / 2, y)
    nearest = (x / half_side).clamp(-2, 0) * half_side
    x = x - nearest
    return -torch.hypot(x, y) * torch.sign(y)


def _place(combination: Combination, background: str, wording: int, draws: Sequence[float], frames: int) -> Scene:
    """Choose size, travel and start from four uniform draws such that the shape never leaves the frame."""
    shape, colour, direction = combination
    size = _between(RADIUS_RANGE, draws[0])
    travel = _between(TRAVEL_RANGE, draws[1])
    left, right, above, below = _extents(shape, size)
    step_x, step_y = DIRECTIONS[direction]
    x0 = _start(left, right, step_x * travel, draws[2])
    y0 = _start(above, below, step_y * travel, draws[3])
    speed = travel / (frames - 1)
    return Scene(shape, colour, direction, background, x0, y0, size, speed, wording)


def _extents(shape: str, size: float) -> tuple[float, float, float, float]:
    """How far a shape reaches from its centre to the left, right, top and bottom."""
    if shape == "triangle":
        height = _TRIANGLE_CIRCUMRADIUS * size
        return _TRIANGLE_HALF_SIDE * size, _TRIANGLE_HALF_SIDE * size, height, height / 2
    reach = size if shape == "circle" else _SQUARE_HALF_SIDE * size
    return reach, reach, reach, reach


def _start(before: float, after: float, shift: float, draw: float) -> float:
    """A start on one axis from which the shape stays inside both now and after moving by `shift`."""
    low = MARGIN + before - min(shift, 0)
    high = SIZE - MARGIN - after - max(shift, 0)
    return _between((low, high), draw)


def _held_out(combination: Combination, wording: int) -> bool:
    index = COMBINATIONS.index(combination)
    return combination in HELD_OUT_COMBINATIONS or (wording + 7 * index) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def _write(combination: Combination, background: str, wording: int) -> str:
    shape, colour, direction = combination
    words = WORDINGS[wording].format(shape=shape, colour=colour, direction=direction, towards=_TOWARDS[direction],
                                     background=background)
    return words[0].upper() + words[1:] if words.endswith(".") else words


def _pick(choices: Sequence, draw: float):
    return choices[int(draw * len(choices))]


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _column(values: Iterator[float]) -> Tensor:
    return torch.tensor(list(values))[:, None]


def _colours(values: Iterator[tuple[int, int, int]]) -> Tensor:
    """8-bit RGB triples as [B, 3, 1, 1, 1] in [-1, 1]."""
    return (torch.tensor(list(values), dtype=torch.float32) / 127.5 - 1)[..., None, None, None]


def _check_frames(frames: int) -> None:
    if frames < 2:
        raise ValueError(f"frames is {frames}; a moving shape needs at least 2")
