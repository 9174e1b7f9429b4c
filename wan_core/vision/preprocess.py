"""Pictures as the CLIP encoder takes them: square, of its size, standardised by CLIP's channel statistics.

The official code squashes a picture to the square by plain bicubic interpolation, without the low-pass filter
(antialiasing) that image libraries and ComfyUI's own loader put before it, and does not clamp what overshoots. The
features change with either, so this does the same.
Reference: `CLIPModel.visual` in Wan2.1, wan/modules/clip.py; statistics: Radford et al. 2021,
https://arxiv.org/abs/2103.00020.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# What happens to a picture that is not square: it is squashed, or its middle is taken.
CROPS = ("none", "center")


def preprocess(image: Tensor, size: int, crop: str = "none") -> Tensor:
    """Pixels [B, 3, size, size] float32, standardised, of pictures [B, 3, H, W] in [-1, 1].

    crop: "none" squashes the whole picture into the square, as the official models have it; "center" fits its shorter
    side and cuts the longer one on both ends, which is how ComfyUI's CLIP Vision Encode calls it.
    Raises ValueError for another shape, integer pixels or an unknown crop.
    """
    if image.ndim != 4 or image.shape[1] != 3 or not image.numel() or not image.is_floating_point():
        raise ValueError(f"CLIP vision: the pictures are {image.dtype} of shape {list(image.shape)}; expected "
                         "floating-point values in [-1, 1] of shape [batch, 3, height, width]")
    if crop not in CROPS:
        raise ValueError(f"CLIP vision: unknown crop {crop!r}; choose {' or '.join(CROPS)}")
    height, width = size, size
    if crop == "center":
        height, width = (round(length * size / min(image.shape[2:])) for length in image.shape[2:])
    pixels = F.interpolate(image.float(), size=(height, width), mode="bicubic", align_corners=False)
    top, left = (height - size) // 2, (width - size) // 2
    pixels = pixels[:, :, top:top + size, left:left + size]
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std
