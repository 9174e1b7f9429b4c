"""Tiles: where they lie, that their weights sum to one, and that nobody sees them."""

import math
import random
from dataclasses import replace

import pytest
import torch

from tests.vae.small import SMALL, random_latents, random_vae, random_video
from wan_core import nano
from wan_core.models import load_vae
from wan_core.training.shapes import held_out_scenes, render
from wan_core.vae import Tiling
from wan_core.vae.tiling import spans


def layouts(count=300):
    """Random lengths, tiles and overlaps in latent pixels, as Tiling.check allows them, and the narrowest ones."""
    draw = random.Random(0)
    yield from ((length, tile, overlap) for tile, overlap in ((2, 1), (3, 1), (4, 2), (5, 2))
                for length in range(1, 24))
    for _ in range(count):
        tile = draw.randint(2, 64)
        yield draw.randint(1, 300), tile, draw.randint(1, tile // 2)


@pytest.fixture(scope="module", params=SMALL)
def vae(request):
    return random_vae(SMALL[request.param])


def tiles_of(vae, height, width, overlap):
    """Tiles whose sizes are given in latent pixels."""
    stride = vae.spec.spatial_stride
    return Tiling(height * stride, width * stride, overlap * stride)


@pytest.mark.parametrize("scale", [1, 8, 16])
def test_weights_of_all_tiles_sum_to_one(scale):
    """For any length, tile and overlap: at every position the weights are within 0..1 and sum to one."""
    for length, tile, overlap in layouts():
        total = torch.zeros(length * scale)
        for span in spans(length, tile, overlap):
            weights = span.weights(scale)
            assert weights.min() >= 0 and weights.max() <= 1 and len(weights) == (span.stop - span.start) * scale
            total[span.start * scale:span.stop * scale] += weights
        torch.testing.assert_close(total, torch.ones(length * scale), atol=1e-5, rtol=0)


def test_tiles_cover_the_picture():
    """Tiles have one size, begin at the first and end at the last pixel, and share at least the overlap."""
    for length, tile, overlap in layouts():
        cover = spans(length, tile, overlap)
        assert cover[0].start == 0 and cover[-1].stop == length
        assert {span.stop - span.start for span in cover} == {min(tile, length)}
        assert all(left.stop - right.start >= overlap for left, right in zip(cover, cover[1:]))
        assert all(left.start < right.start for left, right in zip(cover, cover[1:]))


def test_weights_fade_where_context_is_missing():
    """At an inner edge a tile has next to no weight: pixels there lack their surroundings."""
    for scale in (1, 8):
        left, right = spans(24, 16, 4)
        assert left.weights(scale)[0] == 1 and left.weights(scale)[-1] == 0
        assert right.weights(scale)[0] == 0 and right.weights(scale)[-1] == 1


@pytest.mark.parametrize(("tiling", "message"), [
    (Tiling(100, 128, 32), "height is 100 pixels.*Use 96"), (Tiling(128, 4, 32), "width is 4 pixels.*Use 8"),
    (Tiling(128, 128, 20), "overlap is 20 pixels"), (Tiling(128, 128, 0), "overlap is 0 pixels.*Use 8"),
    (Tiling(128, 64, 40), "overlap is 40 pixels, more than half of the tile .64x128.; use at most 32"),
    (Tiling(-64, 64, 8), "height is -64"),
])
def test_tilings_off_the_grid_are_refused(tiling, message):
    """Sizes that are no multiples of the stride, or an overlap above half a tile, are errors that say what to use."""
    with pytest.raises(ValueError, match=message):
        tiling.check(8)
    vae = random_vae(SMALL["wan21"])
    for method, argument in (("encode", torch.zeros(1, 3, 1, 64, 64)), ("decode", torch.zeros(1, 16, 1, 8, 8))):
        with pytest.raises(ValueError, match=message):
            getattr(vae, method)(argument, tiling=tiling)


def test_tiles_lie_on_the_grid_of_the_vae():
    """Tiles that fit eight pixels a latent pixel may be off the grid of sixteen, and are refused there."""
    tiling = Tiling(72, 72, 8)
    tiling.check(8)
    with pytest.raises(ValueError, match="height is 72 pixels; it must be a positive multiple of 16. Use 64"):
        random_vae(SMALL["wan22"]).decode(torch.zeros(1, 48, 1, 8, 8), tiling=tiling)


def test_count_is_the_number_of_tiles(vae):
    """Tiling.count says beforehand how often on_piece comes for each latent frame."""
    seen = []
    for tiling in (tiles_of(vae, 2, 3, 1), tiles_of(vae, 8, 8, 2)):
        seen.clear()
        vae.decode(random_latents(vae.spec, 1, 3, 5), tiling=tiling, on_piece=lambda: seen.append(None))
        assert len(seen) == tiling.count(3, 5, vae.spec.spatial_stride)


def test_good_tilings_pass():
    """The largest legal overlap and a tile of two strides are accepted."""
    Tiling(128, 64, 32).check(8)
    Tiling(16, 16, 8).check(8)
    Tiling(32, 32, 16).check(16)


def test_a_tile_as_large_as_the_picture_changes_nothing(vae):
    """One tile is no tile: bit for bit the untiled result, both ways."""
    tiling = tiles_of(vae, 8, 8, 4)
    latents, video = random_latents(vae.spec, 2, 4, 6), random_video(vae.spec, 5, 4, 6)
    assert torch.equal(vae.decode(latents, tiling=tiling), vae.decode(latents))
    assert torch.equal(vae.encode(video, tiling=tiling), vae.encode(video))


def test_flat_regions_come_out_of_tiles_unchanged(vae):
    """Where two tiles agree, blending keeps their value: the picture is nowhere darker or brighter for the weights."""
    latents = random_latents(vae.spec, 2, 1, 1).expand(-1, -1, -1, 12, 16)
    tiled = vae.decode(latents, tiling=tiles_of(vae, 8, 8, 4))
    single = vae.decode(latents[..., :8, :8])
    # Away from every tile's border all tiles see the same constant surroundings.
    middle = slice(4 * vae.spec.spatial_stride - 4, 4 * vae.spec.spatial_stride + 4)
    torch.testing.assert_close(tiled[..., middle, middle], single[..., middle, middle], atol=0.05, rtol=0)


def test_frames_of_tiles_are_final_when_they_are_handed_on(vae):
    """Frames come while the last tile runs, in order, complete, and never change afterwards; on_piece counts tiles."""
    latents, tiling = random_latents(vae.spec, 3, 4, 6), tiles_of(vae, 3, 3, 1)
    tiles = len(spans(4, 3, 1)) * len(spans(6, 3, 1))
    expected = vae.decode(latents, tiling=tiling)
    out, seen, pieces = torch.full_like(expected, torch.nan), [], []

    def check(start, stop):
        seen.append((start, stop))
        assert len(pieces) == 3 * (tiles - 1) + len(seen)
        assert torch.equal(out[:, :, :stop], expected[:, :, :stop])

    vae.decode(latents, out=out, tiling=tiling, on_frames=check, on_piece=lambda: pieces.append(None))
    assert seen == [(0, 1), (1, 5), (5, 9)] and len(pieces) == 3 * tiles


def psnr(first, second):
    """In dB, of pixels in [-1, 1]."""
    return 10 * math.log10(4 / (first - second).square().mean().item())


def canvas(side, frames=9):
    """A clip of four moving shapes on one background, each in its quarter of `side` pixels."""
    scenes = [replace(scene, background="gray") for scene in held_out_scenes(4)]
    clips = render(scenes, frames, side)
    clip = torch.empty(1, 3, frames, 2 * side, 2 * side)
    for index, quarter in enumerate(clips):
        top, left = side * (index // 2), side * (index % 2)
        clip[0, ..., top:top + side, left:left + side] = quarter
    return clip


@pytest.fixture(scope="module", params=[nano.VAE, nano.VAE22], ids=["wan21", "wan22"])
def trained(request):
    """A bundled VAE, a clip of 16x16 latent pixels, and the clip's latents."""
    vae = load_vae(request.param).module()
    clip = canvas(8 * vae.spec.spatial_stride)
    return vae, clip, vae.encode(clip)


@pytest.mark.parametrize("tiles", [(12, 12, 6), (8, 12, 4)])
def test_decoded_tiles_are_not_seen(trained, tiles):
    """On trained weights a tiled decode is within 45 dB of the whole one."""
    vae, _, latents = trained
    assert psnr(vae.decode(latents, tiling=tiles_of(vae, *tiles)), vae.decode(latents)) >= 45


def test_encoded_tiles_are_not_seen(trained):
    """On trained weights a clip encoded in tiles decodes to within 45 dB of the same clip encoded whole."""
    vae, clip, latents = trained
    tiled = vae.encode(clip, tiling=tiles_of(vae, 12, 12, 6))
    assert psnr(vae.decode(tiled), vae.decode(latents)) >= 45


@pytest.mark.parametrize(("height", "width", "count"), [(8, 8, 1), (8, 9, 2), (20, 9, 6)])
def test_count_is_how_many_tiles_run(height, width, count):
    """The number told to progress bars is the number of tiles that are decoded."""
    assert Tiling(64, 64, 16).count(height, width, 8) == count
    vae, pieces = random_vae(SMALL["wan21"]), []
    vae.decode(random_latents(vae.spec, 1, height, width), tiling=Tiling(64, 64, 16), on_piece=lambda: pieces.append(1))
    assert len(pieces) == count


@pytest.mark.parametrize("together", [2, 3, 6])
def test_tiles_that_pass_together_equal_tiles_one_by_one(vae, together):
    """Tiles in batches give the same picture and latents as one by one, and every piece of theirs is counted."""
    stride = vae.spec.spatial_stride
    one_by_one = Tiling(4 * stride, 4 * stride, 2 * stride)
    batched, seen = replace(one_by_one, together=together), []
    latents, video = random_latents(vae.spec, 3, 6, 8, batch=2), random_video(vae.spec, 5, 6, 8, batch=2)
    pixels = vae.decode(latents, tiling=batched, on_piece=lambda: seen.append(None))
    assert len(seen) == 3 * one_by_one.count(6, 8, stride) == 18
    torch.testing.assert_close(pixels, vae.decode(latents, tiling=one_by_one), atol=1e-5, rtol=0)
    latents = vae.encode(video, tiling=batched)
    torch.testing.assert_close(latents, vae.encode(video, tiling=one_by_one), atol=1e-5, rtol=0)
