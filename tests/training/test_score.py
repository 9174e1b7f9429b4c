"""The scorer of generated clips: right on true clips, also degraded ones, and not to be fooled by others."""

import pytest
import torch
from torch.nn import functional as F

from wan_core.training.score import Observation, agreement, score
from wan_core.training.shapes import held_out_scenes, render, sample_scene


def _sample(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [sample_scene(generator) for _ in range(count)]


def _scores(scenes, change=lambda clip: clip):
    return agreement([score(change(render([scene])[0])) for scene in scenes], scenes)


def _blur(clip, sigma):
    kernel = torch.exp(-torch.arange(-4, 5) ** 2 / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    planes = F.pad(clip.flatten(0, 1)[:, None], (4, 4, 4, 4), mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, 9)), kernel.view(1, 1, 9, 1))
    return planes.view_as(clip)


def test_true_clips_score_full_marks():
    """150 random clips: every attribute is read back from the pixels."""
    scores = _scores(_sample(150, seed=2))
    assert (scores.colour, scores.direction, scores.shape, scores.background, scores.complete) == (1, 1, 1, 1, 1)


def test_held_out_clips_score_full_marks():
    """The evaluation set itself has nothing in it that the scorer misreads."""
    assert _scores(held_out_scenes()).complete == 1


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_blur_and_noise_do_not_matter(sigma):
    """What a lossy decoder does to a clip does not change what is read from it."""
    noise = torch.Generator().manual_seed(3)

    def degrade(clip):
        return _blur(clip, sigma) + 0.1 * torch.randn(clip.shape, generator=noise)

    scores = _scores(_sample(40, seed=4), degrade)
    assert min(scores.colour, scores.direction) >= 0.99
    assert scores.shape >= 0.97


def test_size_of_the_picture_does_not_matter():
    """A clip of another resolution is read the same."""
    scores = _scores(_sample(8, seed=5), lambda clip: F.interpolate(clip, scale_factor=2, mode="bilinear"))
    assert scores.complete == 1


def _uniform(generator):
    return torch.rand(3, 17, 64, 64, generator=generator) * 2 - 1


def _gaussian(generator):
    return torch.randn(3, 17, 64, 64, generator=generator)


def _clouds(generator):
    coarse = torch.randn(1, 3, 5, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(17, 64, 64), mode="trilinear")[0]


def _empty(generator):
    colour = torch.rand(3, 1, 1, 1, generator=generator) * 2 - 1
    return colour + 0.1 * torch.randn(3, 17, 64, 64, generator=generator)


def _not_a_number(generator):
    return torch.full((3, 17, 64, 64), torch.nan)


@pytest.mark.parametrize("make", [_uniform, _gaussian, _clouds, _empty, _not_a_number])
def test_clips_without_an_object_agree_with_nothing(make):
    """Noise, clouds, an empty picture and NaN contain no colour, no direction and no shape."""
    generator = torch.Generator().manual_seed(6)
    for _ in range(20):
        seen = score(make(generator))
        assert (seen.colour, seen.direction, seen.shape) == (None, None, None)


def test_background_of_an_empty_clip_is_still_seen():
    """A plain white clip shows a white background and nothing else."""
    assert score(torch.full((3, 17, 64, 64), 0.92)) == Observation(None, None, None, "white")


@pytest.mark.parametrize(("scene", "expected"), [
    (scene, {"left": "right", "right": "left", "up": "down", "down": "up"}[scene.direction])
    for scene in held_out_scenes(16)
])
def test_a_clip_played_backwards_moves_the_other_way(scene, expected):
    """The direction comes from the order of the frames."""
    assert score(render([scene])[0].flip(1)).direction == expected


def test_standing_and_jumping_objects():
    """An object that does not move is "still"; one that jumps about has no direction, but a colour and a shape."""
    scene = held_out_scenes(1)[0]
    clip = render([scene])[0]
    standing = score(clip[:, :1].repeat(1, 17, 1, 1))
    assert standing == Observation(scene.colour, "still", scene.shape, scene.background)
    # To and fro between the two halves of the path.
    jumping = score(clip[:, [0, 16, 1, 15, 2, 14, 3, 13, 4, 12, 5, 11, 6, 10, 7, 9, 8]])
    assert jumping == Observation(scene.colour, None, scene.shape, scene.background)


def test_an_object_in_half_of_the_frames_does_not_count():
    """An object that vanishes half-way is no object."""
    scene = held_out_scenes(1)[0]
    clip = render([scene])[0]
    clip[:, 8:] = clip[:, :1, :1, :1]
    assert score(clip) == Observation(None, None, None, scene.background)


def test_colourless_objects_have_no_named_colour():
    """A gray version of a clip keeps its direction and shape and loses its colour."""
    scenes = [scene for scene in _sample(60, seed=9) if (scene.colour, scene.background) == ("yellow", "black")]
    assert scenes
    for scene in scenes:
        seen = score(render([scene])[0].mean(dim=0, keepdim=True).repeat(3, 1, 1, 1))
        assert seen == Observation(None, scene.direction, scene.shape, "black")


def test_agreement_counts_each_attribute():
    """Fractions are of clips; the background counts only where the caption names it."""
    scenes = [scene for scene in held_out_scenes(32) if scene.names_background][:2]
    right = Observation(scenes[0].colour, scenes[0].direction, scenes[0].shape, "none")
    scores = agreement([right, Observation(None, None, scenes[1].shape, scenes[1].background)], scenes)
    assert (scores.colour, scores.direction, scores.shape) == (0.5, 0.5, 1.0)
    assert (scores.background, scores.complete) == (0.5, 0.5)
    unnamed = [scene for scene in held_out_scenes(32) if not scene.names_background][:1]
    assert agreement([right], unnamed).background is None


@pytest.mark.parametrize("frames", [torch.zeros(17, 3, 64, 64), torch.zeros(3, 1, 64, 64), torch.zeros(1, 3, 5, 8, 8),
                                    torch.zeros(3, 5, 8, 8, dtype=torch.uint8)])
def test_other_layouts_are_refused(frames):
    """Only floating-point [3, F, H, W] of two frames or more is scored."""
    with pytest.raises(ValueError, match=r"expected floating-point frames \[3, F, H, W\]"):
        score(frames)


def test_agreement_refuses_unequal_lists():
    """As many observations as scenes, and at least one."""
    with pytest.raises(ValueError, match="0 observations and 1 scenes"):
        agreement([], held_out_scenes(1))
