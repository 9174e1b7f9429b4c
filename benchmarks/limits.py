"""What no program is faster than: operations and bytes of each part, over the rates that this machine reaches.

Operations are those of the published models, a multiply-add counted as two, without norms, activations and softmax
(about 1 % of them). Rates are measured in the same process, on random numbers: zeros multiply faster on some devices. A
cleverer method needs fewer operations, Winograd's convolutions for instance; then a part takes less than its limit.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.shared import FP8, round_times
from wan_core.presets import TextEncoderSpec, TransformerSpec, VAESpec


@dataclass(frozen=True)
class Work:
    """Operations of matrix products or convolutions, and of attention."""

    products: float
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention

    def __mul__(self, times: float) -> "Work":
        return Work(self.products * times, self.attention * times)


def transformer_work(spec: TransformerSpec, tokens: int) -> Work:
    """One forward: for each layer and token 6 D^2 + 2 D F multiply-adds, for each of the text's 512 tokens, which the
    official code all computes, 2 D^2; and 2 D for each pair of tokens in self- and cross-attention."""
    dim, text = spec.dim, spec.text_len
    products = tokens * dim * (6 * dim + 2 * spec.ffn_dim) + 2 * text * dim * dim
    return Work(2.0 * products, 4.0 * tokens * dim * (tokens + text)) * spec.num_layers


def token_count(spec: TransformerSpec, shape: tuple[int, ...]) -> int:
    """Tokens of latents of `shape` [B, C, T, H, W]."""
    return torch.Size(shape[2:]).numel() // torch.Size(spec.patch_size).numel()


def text_work(spec: TextEncoderSpec, tokens: int) -> Work:
    """A UMT5 encoder on the tokens that a prompt has; those that only fill it up are not needed."""
    products = tokens * (4 * spec.dim * spec.dim_attn + 3 * spec.dim * spec.dim_ffn)
    return Work(2.0 * products, 4.0 * tokens ** 2 * spec.dim_attn) * spec.num_layers


def decoder_work(spec: VAESpec, frames: int, height: int, width: int) -> Work:
    """A VAE's decoder on a video of 4n + 1 frames: 27, 9, 3 or 1 multiply-adds for each pixel and pair of channels."""
    patched = spec.kind == "wan22"
    dims = [spec.decoder_dim * factor for factor in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
    count = 1 + (frames - 1) // spec.temporal_stride
    area = height * width // spec.spatial_stride ** 2
    macs, attention = _middle(dims[0], count, area)
    macs += count * area * (spec.z_dim ** 2 + 27 * spec.z_dim * dims[0])
    for level, (wide, narrow) in enumerate(zip(dims, dims[1:])):
        # In the Wan 2.1 VAE the upsampling before has halved the channels.
        inside = wide if patched or not level else wide // 2
        for _ in range(spec.num_res_blocks + 1):
            macs += count * area * _block(inside, narrow)
            inside = narrow
        if level < len(dims) - 2:
            if spec.temporal_downsample[::-1][level]:
                # The first frame stays alone.
                macs += 6 * narrow ** 2 * (count - 1) * area
                count = 2 * count - 1
            area *= 4
            macs += 9 * narrow * (narrow if patched else narrow // 2) * count * area
    macs += 27 * narrow * (12 if patched else 3) * count * area
    return Work(2.0 * macs, 2.0 * attention)


def encoder_work(spec: VAESpec, frames: int, height: int, width: int) -> Work:
    """The same of the encoder."""
    patched = spec.kind == "wan22"
    dims = [spec.dim * factor for factor in (1, *spec.dim_mult)]
    count, area = frames, height * width // (4 if patched else 1)
    macs = 27 * (12 if patched else 3) * dims[0] * count * area
    for level, (inside, out) in enumerate(zip(dims, dims[1:])):
        for _ in range(spec.num_res_blocks):
            macs += count * area * _block(inside, out)
            inside = out
        if level < len(dims) - 2:
            area //= 4
            macs += 9 * out ** 2 * count * area
            if spec.temporal_downsample[level]:
                macs += 3 * out ** 2 * (count - 1) // 2 * area
                count = 1 + (count - 1) // 2
    middle, attention = _middle(out, count, area)
    macs += middle + count * area * (27 * out * 2 * spec.z_dim + 4 * spec.z_dim ** 2)
    return Work(2.0 * macs, 2.0 * attention)


def _block(inside: int, out: int) -> int:
    """Multiply-adds of a residual block for each pixel."""
    return 27 * (inside + out) * out + (inside * out if inside != out else 0)


def _middle(dim: int, count: int, area: int) -> tuple[int, int]:
    """Multiply-adds of the middle's convolutions and projections, and of its attention, frame by frame."""
    return count * area * (2 * _block(dim, dim) + 4 * dim ** 2), 2 * count * area ** 2 * dim


@dataclass(frozen=True)
class Machine:
    """The rates of a device: of products of square matrices with `side` rows, of a convolution of pictures with
    `picture` pixels a side, of a copy of `nbytes`. Each is measured once, when it is asked for first."""

    device: torch.device
    side: int = 2048
    picture: int = 96
    nbytes: int = 1 << 29

    @functools.cache
    def matmul(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product."""
        a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
        if dtype == FP8.dtype:
            scale, b = torch.ones((), device=self.device), b.t()
            return 2 * self.side ** 3 / _shortest(
                lambda: torch._scaled_mm(a, b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16), self.device)
        return 2 * self.side ** 3 / _shortest(lambda: a @ b, self.device)

    @functools.cache
    def convolution(self, dtype: torch.dtype) -> float:
        """FLOP/s of one channels-last 3D convolution as in the middle of a decoder."""
        x, weight = (torch.randn(shape, device=self.device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
                     for shape in ((1, 192, 6, self.picture, self.picture), (192, 192, 3, 3, 3)))
        # cuDNN's choice among its algorithms is a matter of how a program is written.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            seconds = _shortest(lambda: F.conv3d(x, weight, padding=(0, 1, 1)), self.device)
        return 2 * 27 * 192 * 192 * 4 * self.picture ** 2 / seconds

    @functools.cache
    def copy(self) -> float:
        """Bytes a second of a copy within the device's memory, those that are read and those that are written."""
        return copy_rate(self.device, self.nbytes)

    @functools.cache
    def transfer(self) -> float:
        """Bytes a second from pinned memory to the device; on a CPU of a copy."""
        return transfer_rate(self.device)


def copy_rate(device: torch.device, nbytes: int = 1 << 29) -> float:
    """Bytes a second of a large copy, those that are read and those that are written."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * nbytes / _shortest(lambda: target.copy_(source), device)


def transfer_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device, measured with as many as a block has; on a CPU of a copy."""
    nbytes = 1 << (29 if device.type == "cuda" else 25)
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / _shortest(lambda: target.copy_(source, non_blocking=True), device)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the best of some rounds: a limit is what is reached when nothing else is in the way."""
    return min(round_times(work, 5, device))
