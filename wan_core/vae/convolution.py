"""The VAE's convolutions over past frames and a piece, and on doubled pixels, by the cheapest exact way for the case.

Nearly all of a decode is 3x3x3 convolutions of two or four frames at a time. In float32 on a CPU their time axis is
computed with Winograd's minimal filtering F(2, 3) (Lavin and Gray 2016, arXiv:1509.09308, section 4.1): two output
frames from four input frames cost four 2D convolutions instead of six, which saves a third of the arithmetic and, as
sums and differences of frames are read in place, the copy that joins history and piece. The result differs from the
direct sum by rounding only (about 1e-6 of its size).

A 3x3 convolution of pixels that were doubled meets most of them twice. Each of its four outputs around a pixel is a 2x2
convolution of the pixels before doubling, with sums of the kernel's taps (the sub-pixel view of Shi et al. 2016,
arXiv:1609.07009): 16 products instead of 36, and the doubled picture is never made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer pixels in all first frames of pairs, making four kernels of three takes longer than what they save.
_FEWEST_PIXELS = 256

# Which of three taps on doubled pixels meet which of two pixels, for the even and the odd output.
_DOUBLED_TAPS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1x1 convolution as the linear layer that it is, without leaving channels-last memory."""
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def first_frame(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """A clip's first frame [B, C, 1, H, W] alone: all taps but the last would only meet zeros."""
    return F.conv2d(x.squeeze(2), weight[:, :, -1], bias, padding=padding).unsqueeze(2)


def after_history(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor | None,
                  padding: tuple[int, int]) -> Tensor:
    """Convolve x [B, C, T, H, W] that follows two frames of `history`, stride 1, no padding in time."""
    if minimal_filtering_pays(x, weight):
        return _minimal_filtering(x, history, weight, bias, padding)
    return F.conv3d(joined(history, x), weight, bias, padding=(0, *padding))


def joined(history: Tensor, x: Tensor) -> Tensor:
    """Frames before and of a piece, in channels-last memory: `cat` alone would follow the first, which zeros and saved
    frames need not be in, and half-precision kernels for other memory are slow or missing."""
    if torch.is_grad_enabled():
        return torch.cat([history, x], 2)
    batch, channels, frames, height, width = x.shape
    whole = torch.empty((batch, channels, history.shape[2] + frames, height, width), dtype=x.dtype, device=x.device,
                        memory_format=torch.channels_last_3d)
    return torch.cat([history, x], 2, out=whole)


def on_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Double the height and width of images [N, C, H, W], each pixel repeated, and convolve 3x3, zeros around it."""
    if x.dtype != torch.float32 or torch.is_grad_enabled():
        # The summed taps would be rounded in half precision, and training gains nothing.
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, bias, padding=1)
    count, _, height, width = x.shape
    out = torch.empty((count, weight.shape[0], 2 * height, 2 * width), device=x.device,
                      memory_format=torch.channels_last)
    for row in range(2):
        for column in range(2):
            vertical, horizontal = (torch.tensor(_DOUBLED_TAPS[i], device=x.device) for i in (row, column))
            kernel = torch.einsum("pk,ql,oikl->oipq", vertical, horizontal, weight)
            padded = F.pad(x, (1 - column, column, 1 - row, row))
            out[:, :, row::2, column::2] = F.conv2d(padded, kernel, bias)
    return out


def minimal_filtering_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x [B, C, T, H, W] is convolved frame by frame, and not as one tensor with the frames before it."""
    batch, _, frames, height, width = x.shape
    return (x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
            and weight.shape[2:] == (3, 3, 3) and batch == 1 and frames % 2 == 0
            and height * width * frames // 2 >= _FEWEST_PIXELS)


def _minimal_filtering(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor | None,
                       padding: tuple[int, int]) -> Tensor:
    past, now = history[0].movedim(1, 0), x[0].movedim(1, 0)  # [T, C, H, W], channels-last
    pairs = now.shape[0] // 2

    def frame(index: int) -> Tensor:
        return past[index] if index < 2 else now[index - 2]

    def product(kernel: Tensor, first: int, second: int, sign: int) -> Tensor:
        """2D convolution of the combined frames first + sign * second of every pair."""
        mixed = torch.empty_like(now[:pairs], memory_format=torch.channels_last)
        for pair in range(pairs):
            torch.add(frame(2 * pair + first), frame(2 * pair + second), alpha=sign, out=mixed[pair])
        return F.conv2d(mixed, kernel.contiguous(memory_format=torch.channels_last), padding=padding)

    taps = weight.unbind(2)
    # One kernel at a time: all four at once would be the largest tensor of a small picture's decode.
    both = product(_half_sum(taps, 1), 1, 2, 1)
    if bias is not None:
        both += bias.view(-1, 1, 1)
    difference = product(_half_sum(taps, -1), 2, 1, -1)
    out = torch.empty((1, weight.shape[0], 2 * pairs, *both.shape[2:]), memory_format=torch.channels_last_3d)
    frames = out[0].movedim(1, 0)
    torch.sub(both, difference, out=frames[1::2])
    frames[1::2] -= product(taps[2], 1, 3, -1)
    both += difference
    both += product(taps[0], 0, 2, -1)
    frames[0::2] = both
    return out


def _half_sum(taps: tuple[Tensor, ...], sign: int) -> Tensor:
    """(first + sign * middle + last) / 2 of three taps in time: the inner kernels of F(2, 3); the outer ones are the
    first and the last tap themselves."""
    return (taps[0] + taps[2]).add_(taps[1], alpha=sign).mul_(0.5)
