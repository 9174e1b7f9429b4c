"""Sizes from pictures by the official arithmetic, and pictures brought to a size as PIL and PyTorch do it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wan_core.conditioning import best_size, check_values, fit, fit_mask, masks_for, size_for_area
from wan_core.conditioning.sizes import lanczos

AREAS = {"480p": 832 * 480, "720p": 1280 * 720, "704p": 1280 * 704}
PICTURES = [(1920, 1080), (1080, 1920), (1024, 1024), (1000, 667), (640, 479), (333, 1001), (3000, 500)]


def latent_sides(width: int, height: int, area: int) -> tuple[int, int]:
    """Image to video: sqrt(area * ratio) // 8 // 2 * 2 latents a side, of 8 pixels each."""
    rows = round(np.sqrt(area * (height / width)) // 8 // 2 * 2)
    columns = round(np.sqrt(area / (height / width)) // 8 // 2 * 2)
    return columns * 8, rows * 8


def nearer_rounding(width: int, height: int, area: int) -> tuple[int, int]:
    """TI2V: one side is rounded down to 32 and the other takes the rest; the order that keeps the ratio better wins."""
    ratio = width / height
    wide = (area * ratio) ** 0.5
    high = area / wide
    by_width = int(wide // 32 * 32)
    by_width = by_width, int(area / by_width // 32 * 32)
    by_height = int(high // 32 * 32)
    by_height = int(area / by_height // 32 * 32), by_height
    errors = [max(ratio * h / w, w / h / ratio) for w, h in (by_width, by_height)]
    return by_width if errors[0] < errors[1] else by_height


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Waves with a diagonal edge, [1, channels, height, width] in 0..1: smooth parts and one that rings."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    waves = [0.5 + 0.2 * torch.sin(7 * (k + 1) * x + 5 * y) + 0.2 * (x + y > 1) for k in range(channels)]
    return torch.stack(waves)[None]


@pytest.mark.parametrize("area", ["480p", "720p"])
@pytest.mark.parametrize("size", PICTURES)
def test_size_of_image_to_video(size, area):
    """The official sizes for landscape, portrait, square and odd pictures; on a grid of 16 and at about the area."""
    chosen = size_for_area(*size, AREAS[area])
    assert chosen == latent_sides(*size, AREAS[area])
    assert chosen[0] % 16 == chosen[1] % 16 == 0 and 0.85 < math.prod(chosen) / AREAS[area] <= 1


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("size", PICTURES)
def test_size_of_ti2v(size, area):
    """The official sizes of the 5B model: on a grid of 32, never above the area."""
    chosen = best_size(*size, AREAS[area])
    assert chosen == nearer_rounding(*size, AREAS[area])
    assert chosen[0] % 32 == chosen[1] % 32 == 0 and 0.8 < math.prod(chosen) / AREAS[area] <= 1


def test_sizes_of_the_buckets_themselves():
    """A picture that has a bucket's size, upright or not, gets that size, but for one: in the official arithmetic the
    square root of 480 squared comes out below 480."""
    for size in ((480, 832), (1280, 720), (720, 1280), (624, 624)):
        assert size_for_area(*size, math.prod(size)) == size
    for size in ((1280, 704), (704, 1280), (928, 928)):
        assert best_size(*size, math.prod(size)) == size
    assert size_for_area(832, 480, AREAS["480p"]) == (832, 464) == latent_sides(832, 480, AREAS["480p"])


@pytest.mark.parametrize("choose", [size_for_area, best_size])
def test_sizes_that_make_no_sense(choose):
    """An empty picture and an area below one patch are errors; a thin picture gets one patch in that direction."""
    with pytest.raises(ValueError, match="a picture of 0x10 pixels has no aspect ratio"):
        choose(0, 10, 64 * 64)
    with pytest.raises(ValueError, match="an area of 10 pixels is smaller than the smallest video"):
        choose(10, 10, 10)
    assert min(choose(10000, 10, 64 * 64)) == (16 if choose is size_for_area else 32)


@pytest.mark.parametrize("size", [(20, 30), (90, 64), (33, 120), (50, 70)])
def test_lanczos_is_pils(size):
    """Larger, smaller and both: PIL's filter on floating-point pictures to 1e-5, on 8-bit ones to a rounding."""
    height, width = size
    image = picture(50, 70)
    ours = lanczos(image, height, width)[0]
    for channel, plane in zip(ours, image[0]):
        theirs = Image.fromarray(plane.numpy(), mode="F").resize((width, height), Image.LANCZOS)
        torch.testing.assert_close(channel, torch.from_numpy(np.array(theirs)), atol=1e-5, rtol=0)
    levels = image.mul(255).round().to(torch.uint8)
    theirs = Image.fromarray(levels[0].movedim(0, -1).contiguous().numpy()).resize((width, height), Image.LANCZOS)
    ours = lanczos(levels.float(), height, width)[0].clamp(0, 255).round()
    # PIL rounds once between its two passes and once at the end.
    assert (ours - torch.from_numpy(np.array(theirs)).movedim(-1, 0).float()).abs().max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (96, 32), (128, 160)])
def test_crop_is_pils_cover_and_cut(size):
    """"crop" scales until the size is covered and cuts the middle, as the official TI2V code does with PIL."""
    height, width = size
    image = picture(50, 70) * 2 - 1
    scale = max(width / 70, height / 50)
    covering = round(70 * scale), round(50 * scale)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    theirs = torch.stack([torch.from_numpy(np.array(
        Image.fromarray(plane.numpy(), mode="F").resize(covering, Image.LANCZOS))) for plane in image[0]])
    theirs = theirs[:, top:top + height, left:left + width].clamp(-1, 1)
    ours = fit(image, width, height)
    assert ours.shape == (1, 3, height, width)
    torch.testing.assert_close(ours[0], theirs, atol=1e-5, rtol=0)


def test_stretch_is_bicubic():
    """"stretch" is PyTorch's bicubic filter, as in the official image-to-video code, and keeps every corner."""
    image = picture(50, 70) * 2 - 1
    expected = F.interpolate(image, (32, 96), mode="bicubic").clamp(-1, 1)
    assert torch.equal(fit(image, 96, 32, "stretch"), expected)


@pytest.mark.parametrize("how", ["crop", "stretch"])
def test_what_fits_stays(how):
    """A picture or mask of the size is returned bit for bit; results never leave their range."""
    image = picture(32, 48) * 2 - 1
    assert torch.equal(fit(image, 48, 32, how), image)
    mask = (picture(32, 48, 1) > 0.5).float()
    assert torch.equal(fit_mask(mask, 48, 32, how), mask)
    edges = (torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    assert fit(edges * 2 - 1, 48, 32, how).abs().max() <= 1
    assert 0 <= fit_mask(edges[:, :1], 48, 32, how).min() and fit_mask(edges[:, :1], 48, 32, how).max() <= 1


def test_masks_are_cut_where_their_pictures_are():
    """A mask that is the picture's left half is still the left half of what is left of the picture."""
    image = torch.ones(1, 3, 40, 80)
    image[..., :40] = -1
    mask = (image[:, :1] < 0).float()
    for how in ("crop", "stretch"):
        small, covered = fit(image, 16, 16, how), fit_mask(mask, 16, 16, how)
        # The filters differ in a band of a few pixels along the edge.
        assert covered[..., :5].min() > 0.99 and small[..., :5].max() < -0.9
        assert covered[..., -5:].max() < 0.01 and small[..., -5:].min() > 0.9


def test_another_way_to_fit_is_refused():
    """A word that is not known is an error that names those that are, whether or not anything has to be done."""
    for size in (16, 32):
        with pytest.raises(ValueError, match="unknown way to fit a picture 'pad'; choose one of crop, stretch"):
            fit(torch.zeros(1, 3, 16, 16), size, size, "pad")
        with pytest.raises(ValueError, match="unknown way to fit a picture 'pad'"):
            fit_mask(torch.zeros(1, 1, 16, 16), size, size, "pad")


@pytest.mark.parametrize(("values", "fits"), [
    ([0.0, 1.0], True), ([-0.5, 1.5], True), ([-0.6, 1.0], False), ([0.0, 1.6], False), ([0.0, 255.0], False),
    ([0.5, math.nan], False), ([-math.inf, 0.0], False)])
def test_values_of_about_the_range(values, fits):
    """What a filter may overshoot passes; another range, NaN and infinity are an error with both ranges."""
    if fits:
        return check_values("the mask", torch.tensor(values, dtype=torch.float16), 0, 1)
    with pytest.raises(ValueError, match="the mask holds values from .* to .*; expected numbers from 0 to 1"):
        check_values("the mask", torch.tensor(values), 0, 1)


def test_masks_of_a_clip():
    """One mask holds for all frames, surplus ones are left away, and frames without a mask are made anew."""
    masks = torch.zeros(3, 1, 16, 16)
    masks[1] = 0.25
    assert torch.equal(masks_for(masks[1:2], 16, 16, 5), torch.full((1, 5, 16, 16), 0.25))
    several = masks_for(masks, 16, 16, 5)
    assert several.shape == (1, 5, 16, 16) and several[0, :, 0, 0].tolist() == [0, 0.25, 0, 1, 1]
    assert masks_for(masks, 16, 16, 2)[0, :, 0, 0].tolist() == [0, 0.25]
    assert masks_for(masks, 32, 48, 5).shape == (1, 5, 48, 32)
