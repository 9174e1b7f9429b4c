"""The generated clips of the nano family: pixels, captions and what is held out."""

from collections import Counter

import pytest
import torch

from wan_core.training.shapes import (
    BACKGROUNDS,
    COLOURS,
    COMBINATIONS,
    DIRECTIONS,
    FRAMES,
    HELD_OUT_COMBINATIONS,
    SHAPES,
    SIZE,
    Scene,
    all_prompts,
    caption,
    held_out,
    held_out_prompts,
    held_out_scenes,
    render,
    sample_batch,
    sample_scene,
    signed_distance,
)


@pytest.fixture(scope="module")
def scenes():
    generator = torch.Generator().manual_seed(1)
    return [sample_scene(generator) for _ in range(1000)]


def _scene(shape="circle", direction="left", **changes):
    fields = {"colour": "red", "background": "black", "x0": 40.0, "y0": 32.0, "size": 10.0, "speed": 1.0, "wording": 0}
    return Scene(shape=shape, direction=direction, **{**fields, **changes})


def test_clips_have_the_documented_layout():
    """A batch is fp32 [B, 3, 17, 64, 64] inside [-1, 1] with one caption for each clip."""
    clips, captions = sample_batch(torch.Generator().manual_seed(0), 3)
    assert clips.shape == (3, 3, FRAMES, SIZE, SIZE) and clips.dtype == torch.float32
    assert clips.abs().max() <= 1
    assert len(captions) == 3
    assert sample_batch(torch.Generator().manual_seed(0), 2, frames=5)[0].shape[2] == 5


def test_same_seed_same_data():
    """Everything follows from the generator's seed."""
    first, second = (sample_batch(torch.Generator().manual_seed(7), 4) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert sample_batch(torch.Generator().manual_seed(8), 4)[1] != first[1]


def test_clips_of_a_batch_are_independent(scenes):
    """A scene looks the same alone and in a batch of all shapes."""
    batch = render(scenes[:12])
    for index in range(12):
        assert torch.equal(batch[index], render([scenes[index]])[0])


def test_larger_frames_show_the_same_picture(scenes):
    """A clip drawn at twice the side is the 64-pixel clip where 2x2 pixels are averaged, with edges as sharp."""
    large, small = render(scenes[:12], 3, side=128), render(scenes[:12], 3)
    assert large.shape == (12, 3, 3, 128, 128)
    averaged = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (averaged - small).abs().mean() < 2e-3 and (averaged - small).abs().max() < 0.5
    partly = [((clips[:, :1] - clips[:, :1, :, :1, :1]).abs() > 1e-3).sum() for clips in (large, small)]
    assert 3.5 < partly[0] / partly[1] < 4.2
    assert sample_batch(torch.Generator().manual_seed(0), 2, side=32)[0].shape == (2, 3, FRAMES, 32, 32)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_the_drawn_shape(shape):
    """Anti-aliased coverage adds up to the shape's area: the signed distances are right on every side."""
    size = 12.0
    # Circle: pi r^2; square of half side 0.9 r; equilateral triangle of circumradius 1.3 r: 3 sqrt(3) / 4 R^2.
    area = {"circle": torch.pi, "square": 1.8**2, "triangle": 3**1.5 / 4 * 1.3**2}[shape] * size**2
    red = (render([_scene(shape, size=size)])[0, 0, 0] + 1) * 127.5
    coverage = (red - BACKGROUNDS["black"][0]) / (COLOURS["red"][0] - BACKGROUNDS["black"][0])
    assert coverage.sum().item() == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_has_unit_slope(shape):
    """The distance changes by one pixel for each pixel, so edges are equally soft everywhere."""
    grid = torch.arange(-30, 30) + 0.37
    distance = signed_distance(shape, grid[None, :], grid[:, None], 12.0)
    slope = torch.stack(torch.gradient(distance)).norm(dim=0)
    outside = distance > 2
    assert (slope[outside] - 1).abs().max() < 0.1
    assert distance.min() < -5


def test_triangle_points_up():
    """Row sums of the triangle grow downwards."""
    red = render([_scene("triangle")])[0, 0, 0]
    rows = (red > 0).sum(dim=1)
    rows = rows[rows > 0]
    assert rows[0] < rows[len(rows) // 2] < rows[-1]


def test_shapes_stay_in_the_frame_and_travel(scenes):
    """Every frame has a border of pure background, and the centre moves 16 to 28 pixels along one axis."""
    clips = render(scenes[:200])
    for scene, clip in zip(scenes, clips, strict=False):
        ground = torch.tensor(BACKGROUNDS[scene.background]) / 127.5 - 1
        border = torch.cat((clip[..., 0, :], clip[..., -1, :], clip[..., 0], clip[..., -1]), dim=-1).flatten(1)
        assert torch.allclose(border, ground[:, None].expand_as(border))
        inside = (clip - ground[:, None, None, None]).norm(dim=0)
        x = (inside.sum(dim=1) * torch.arange(SIZE)).sum(dim=1) / inside.sum(dim=(1, 2))
        y = (inside.sum(dim=2) * torch.arange(SIZE)).sum(dim=1) / inside.sum(dim=(1, 2))
        moved = torch.stack((x[-1] - x[0], y[-1] - y[0]))
        expected = torch.tensor(DIRECTIONS[scene.direction]) * scene.speed * (FRAMES - 1)
        assert torch.allclose(moved, expected, atol=0.05)
        assert 16 <= expected.abs().max() <= 28


def test_training_covers_everything_but_the_held_out_combinations(scenes):
    """All 64 training combinations and all backgrounds come up, the 8 held-out ones never."""
    seen = {scene.combination for scene in scenes}
    assert seen == set(COMBINATIONS) - HELD_OUT_COMBINATIONS
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert not any(held_out(scene) for scene in scenes)
    assert 0.5 < sum(scene.names_background for scene in scenes) / len(scenes) < 0.8


def test_held_out_parts_are_each_seen_in_training():
    """The held-out combinations hold no shape, colour or direction back, only their composition."""
    for part, names in enumerate((SHAPES, COLOURS, DIRECTIONS)):
        assert {combination[part] for combination in HELD_OUT_COMBINATIONS} == set(names)


def test_captions_name_what_is_shown(scenes):
    """A caption has the shape and the colour in it, one direction word, and the background where it says so."""
    for scene in scenes:
        words = caption(scene).lower().replace(",", " ").replace(".", " ").replace("wards", "").split()
        assert [word for word in words if word in SHAPES] == [scene.shape]
        assert [word for word in words if word in COLOURS] == [scene.colour]
        assert [word for word in words if word in DIRECTIONS] == [scene.direction]
        assert [word for word in words if word in BACKGROUNDS] == [scene.background] * scene.names_background
    assert caption(_scene()) == "a red circle moving left"


def test_held_out_prompts_never_occur_in_training(scenes):
    """No held-out string is a training string, by the lists and by sampling; both lists have no duplicates."""
    training, evaluation = list(all_prompts()), list(all_prompts(held_out=True))
    assert len(set(training)) == len(training) and len(set(evaluation)) == len(evaluation)
    assert not set(training) & set(evaluation)
    assert {caption(scene) for scene in scenes} <= set(training)
    assert set(held_out_prompts(512)) <= set(evaluation)


def test_held_out_scenes_are_balanced():
    """64 distinct prompts, 16 of unseen combinations, and every attribute about equally often."""
    chosen = held_out_scenes()
    assert len({caption(scene) for scene in chosen}) == 64
    assert all(held_out(scene) for scene in chosen)
    assert sum(scene.combination in HELD_OUT_COMBINATIONS for scene in chosen) == 16
    assert held_out_scenes() == chosen and held_out_prompts() == tuple(caption(scene) for scene in chosen)
    for attribute, names in (("shape", SHAPES), ("colour", COLOURS), ("direction", DIRECTIONS),
                             ("background", BACKGROUNDS)):
        counts = Counter(getattr(scene, attribute) for scene in chosen)
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize(("call", "message"), [
    (lambda: render([]), "no scenes"),
    (lambda: render([_scene()], frames=1), "frames is 1"),
    (lambda: render([_scene()], side=0), "side is 0"),
    (lambda: sample_scene(torch.Generator(), frames=0), "frames is 0"),
    (lambda: held_out_scenes(0), "count is 0"),
    (lambda: signed_distance("hexagon", torch.zeros(1), torch.zeros(1), 1.0), "hexagon"),
])
def test_bad_input_is_named(call, message):
    """A wrong argument is a ValueError that names it."""
    with pytest.raises(ValueError, match=message):
        call()
