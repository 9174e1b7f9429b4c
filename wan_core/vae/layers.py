"""Building blocks of the Wan video VAE: causal convolutions that stream along time.

Every temporal operation looks only backwards, so a clip can be processed in pieces of any length as long as each
causal layer remembers its last input frames. That memory is a `Stream`, made per clip and passed down the call, never
stored on a module: two clips (or two tiles of one clip) cannot mix. Parameter names are those of the released
checkpoints (Wan2.1 `wan/modules/vae.py`). Layout of activations: [B, C, T, H, W], kept channels-last in memory, which
makes the 3D convolutions of oneDNN and cuDNN much faster.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import after_history, first_frame, joined, minimal_filtering_pays, on_doubled, pointwise
from .fused import norm_silu


class Stream:
    """What the causal layers of one clip remember between pieces: a few input frames per layer.

    `first` is True while the piece that holds the clip's very first frame is processed; that frame is special in the
    temporal resampling layers (it stands for itself alone, each later latent frame stands for several frames).
    A clip that is processed as one piece (`whole=True`, in training) needs no memory.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.first = True
        self._whole = whole
        self._history: dict[nn.Module, Tensor] = {}

    def recall(self, layer: nn.Module) -> Tensor | None:
        """The frames that `layer` stored with the previous piece, or None at the start of a clip."""
        return self._history.get(layer)

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep `frames` for the next piece. Copied, because a slice would keep the whole piece alive."""
        if not self._whole:
            self._history[layer] = frames.clone(memory_format=torch.preserve_format)


class CausalConv3d(nn.Conv3d):
    """3D convolution padded in time on the past side only. Same parameters as `nn.Conv3d`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        # The official layer pads 2 * padding frames at the front and none at the back.
        self.past_frames = 2 * self.padding[0]

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x [B, C, T, H, W] -> [B, C_out, T, H, W]; zeros stand before the clip's first frame."""
        if self.kernel_size == (1, 1, 1):
            return pointwise(x, self.weight, self.bias)
        spatial = self.padding[1:]
        if not self.past_frames:
            return F.conv3d(x, self.weight, self.bias, self.stride, (0, *spatial))
        history = stream.recall(self)
        starts = history is None
        if starts:
            history = x.new_zeros(x.shape[:2] + (self.past_frames,) + x.shape[3:])
        stream.remember(self, x[:, :, -2:] if x.shape[2] > 1 else torch.cat([history[:, :, 1:], x], 2))
        if starts and x.shape[2] == 1:
            return first_frame(x, self.weight, self.bias, spatial)
        return after_history(x, history, self.weight, self.bias, spatial)

    def activated(self, norm: "RMSNorm", x: Tensor, stream: Stream, *, inplace: bool = False) -> Tensor:
        """Norm, SiLU and this 3x3x3 convolution; `inplace` may overwrite x.

        Where the convolution reads a piece and the frames before it as one tensor, the piece is written there at once.
        """
        history, frames = stream.recall(self), x.shape[2]
        if torch.is_grad_enabled() or history is None and frames == 1 or minimal_filtering_pays(x, self.weight):
            inplace = inplace and not torch.is_grad_enabled()
            return self(F.silu(norm(x, inplace=inplace), inplace=not torch.is_grad_enabled()), stream)
        whole = torch.empty((*x.shape[:2], self.past_frames + frames, *x.shape[3:]), dtype=x.dtype, device=x.device,
                            memory_format=torch.channels_last_3d)
        if history is None:
            whole[:, :, :self.past_frames].zero_()
        else:
            whole[:, :, :self.past_frames] = history
        norm_silu(x, norm.gamma, whole[:, :, self.past_frames:])
        stream.remember(self, whole[:, :, -self.past_frames:])
        return F.conv3d(whole, self.weight, self.bias, padding=(0, *self.padding[1:]))


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels, `x / ||x||_2 * sqrt(C) * gamma`, statistics in float32."""

    def __init__(self, dim: int, *, images: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1, 1) if images else (1, 1, 1)))

    def forward(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        """x [B, C, ...] -> the same shape; `inplace` overwrites x (without gradients only)."""
        if torch.is_grad_enabled():
            # The official `F.normalize` only guards against a norm of zero; so does this epsilon, in float32.
            normed = F.rms_norm(x.movedim(1, -1).float(), (x.shape[1],), self.gamma.flatten().float(), 1e-24)
            return normed.movedim(-1, 1).to(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        scale = (x.shape[1] ** 0.5 / norm).to(x.dtype)
        return (x.mul_(scale) if inplace else x * scale).mul_(self.gamma)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus a 1x1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # Index 5 is a dropout in the official code; the keys of the checkpoints count it.
        self.residual = nn.Sequential(
            RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMSNorm(out_dim), nn.SiLU(), nn.Identity(), CausalConv3d(out_dim, out_dim, 3, padding=1),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        residual = self.residual
        h = residual[2].activated(residual[0], x, stream)
        h = residual[6].activated(residual[3], h, stream, inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(x, stream)
        return h + shortcut if torch.is_grad_enabled() else h.add_(shortcut)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of each frame on its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, images=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        batch, dim, frames, height, width = x.shape
        tokens = x.movedim(1, -1).reshape(batch * frames, height * width, dim)
        normed = self.norm(tokens.mT.unsqueeze(-1)).squeeze(-1).mT
        # A 1x1 convolution is a linear layer; in channels-last memory this needs no copy.
        q, k, v = F.linear(normed, self.to_qkv.weight.flatten(1), self.to_qkv.bias).unsqueeze(1).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        attended = F.linear(attended, self.proj.weight.flatten(1), self.proj.bias)
        return x + attended.view(batch, frames, height, width, dim).movedim(-1, 1)


class Downsample(nn.Module):
    """Halve height and width; with `temporal`, also frames: the clip's first stays, each later pair becomes one."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        history = stream.recall(self.time_conv)
        stream.remember(self.time_conv, x[:, :, -1:])
        if history is not None:
            return self.time_conv(joined(history, x), stream)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x, stream)], 2)


class Upsample(nn.Module):
    """Double height and width; with `temporal`, also double every frame but the clip's first."""

    def __init__(self, dim: int, out_dim: int, *, temporal: bool) -> None:
        super().__init__()
        # Index 0 is the doubling of pixels in the official code.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, out_dim, 3, padding=1))
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1), padding=(1, 0, 0)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            if not stream.first:
                x = self._double_frames(x, stream)
            elif x.shape[2] > 1:
                x = torch.cat([x[:, :, :1], self._double_frames(x[:, :, 1:], stream)], 2)
        convolution = self.resample[1]
        return per_frame(lambda images: on_doubled(images, convolution.weight, convolution.bias), x)

    def _double_frames(self, x: Tensor, stream: Stream) -> Tensor:
        # The convolution starts with the second latent frame: officially it sees zeros, not the first frame, before it.
        batch, dim, frames, height, width = x.shape
        pairs = self.time_conv(x, stream).unflatten(1, (2, dim))
        doubled = pairs.movedim(1, 3).flatten(2, 3)
        return doubled.contiguous(memory_format=torch.channels_last_3d)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a 2D layer on every frame of x [B, C, T, H, W] without leaving channels-last memory."""
    batch, frames = x.shape[0], x.shape[2]
    images = x.movedim(2, 1).flatten(0, 1)
    return layer(images).unflatten(0, (batch, frames)).movedim(1, 2)


def middle(dim: int) -> nn.Sequential:
    """The blocks between the two halves of an encoder or decoder, at its lowest resolution."""
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> nn.Sequential:
    """The last layers of an encoder or decoder; to be run by `run_head`."""
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, 3, padding=1))


def run_head(layers: nn.Sequential, x: Tensor, stream: Stream) -> Tensor:
    return layers[2].activated(layers[0], x, stream)


def last_in_time(layers: nn.Sequential) -> int:
    """How many of a half's layers come before its number of frames stays as it is."""
    return max((index + 1 for index, layer in enumerate(layers)
                if any(name.endswith("time_conv.weight") for name, _ in layer.named_parameters())), default=0)


def through(layers: Iterable[nn.Module], x: Tensor, stream: Stream) -> Tensor:
    """x through causal layers, one after another."""
    for layer in layers:
        x = layer(x, stream)
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
