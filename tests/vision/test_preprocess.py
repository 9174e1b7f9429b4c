"""Preparing pictures for CLIP, against bicubic interpolation written out as matrices."""

import math

import pytest
import torch

from wan_core.vision import preprocess

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def bicubic(old: int, new: int) -> torch.Tensor:
    """The matrix [new, old] of cubic convolution (a = -0.75) with pixel centres at halves and repeated borders."""
    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x ** 3 - 2.25 * x ** 2 + 1
        return -0.75 * (x ** 3 - 5 * x ** 2 + 8 * x - 4)

    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), old - 1)] += kernel(centre - tap)
    return matrix


def resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return (bicubic(image.shape[2], height) @ image.double() @ bicubic(image.shape[3], width).T).float()


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("height, width", [(48, 83), (83, 48), (20, 17), (28, 28)])
def test_the_picture_is_squashed(height, width):
    """By default the whole picture is interpolated without a low-pass filter, not clamped, and standardised."""
    image = picture(height, width)
    expected = ((resized(image, 28, 28) + 1) / 2 - MEAN) / STD
    torch.testing.assert_close(preprocess(image, 28), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("height, width", [(48, 83), (83, 48)])
def test_the_middle_is_taken(height, width):
    """With crop "center" the shorter side fits and the longer one (48 pixels of 28) loses as much on both ends."""
    image = picture(height, width)
    whole = resized(image, 28 if height == 48 else 48, 28 if width == 48 else 48)
    top, left = (whole.shape[2] - 28) // 2, (whole.shape[3] - 28) // 2
    expected = ((whole[:, :, top:top + 28, left:left + 28] + 1) / 2 - MEAN) / STD
    torch.testing.assert_close(preprocess(image, 28, "center"), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(preprocess(image, 28), expected, atol=1e-2)


def test_black_and_white():
    """-1 is black and 1 is white."""
    for value, level in ((-1.0, 0.0), (1.0, 1.0)):
        pixels = preprocess(torch.full((1, 3, 9, 7), value), 14)
        torch.testing.assert_close(pixels, ((level - MEAN) / STD).expand(1, 3, 14, 14))


def test_half_precision_pictures_are_prepared_in_float32():
    """The result is float32 whatever comes in."""
    image = picture(20, 30).bfloat16()
    assert torch.equal(preprocess(image, 14), preprocess(image.float(), 14))


@pytest.mark.parametrize("image", [torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 0, 8),
                                   torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_other_shapes_and_types_are_refused(image):
    """Alpha channels, single pictures without a batch axis, empty ones and integers are an error."""
    with pytest.raises(ValueError, match="expected floating-point values"):
        preprocess(image, 14)


def test_unknown_crop_is_refused():
    """A misspelt crop is an error and no default."""
    with pytest.raises(ValueError, match="unknown crop 'centre'; choose none or center"):
        preprocess(picture(8, 8), 14, "centre")
