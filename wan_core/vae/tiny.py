"""A tiny VAE for previews in the TAEHV format: some 10 million parameters that know a Wan VAE's latents.

It is trained to give nearly the pixels of the large VAE at a small part of its cost. Pictures pass through 2D
convolutions; what links frames are blocks that see, beside their input, their own input of the frame before. So a clip
can be streamed frame by frame with the memory of one input per block (`Stream`), and gives what it gives in one piece.
It works on normalised latents, as the transformer does; encode and decode here take and give raw ones, as those of the
large VAE.
Format and parameter names: madebyollin/taehv, taehv.py.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import TinyVAESpec
from .convolution import on_doubled
from .layers import Stream
from .stats import LatentStats
from .streaming import StreamingVAE

# Blocks in a row, and the size that latents are softly held within.
_BLOCKS, _LIMIT = 3, 3.0

_PREVIEW_SIDE = 256


class TinyVAE(StreamingVAE):
    """See `StreamingVAE`; the sequences of layers are those of the format, and their places are in the keys."""

    def __init__(self, spec: TinyVAESpec) -> None:
        super().__init__()
        self.spec = spec
        self._stats = LatentStats(spec.mean, spec.std)
        colours, width = 3 * spec.patch ** 2, spec.encoder_width
        layers: list[nn.Module] = [_convolution(colours, width), nn.ReLU()]
        for frames in (2, 2, 1):
            layers += [Pool(width, frames), _convolution(width, width, stride=2, bias=False),
                       *(MemoryBlock(width) for _ in range(_BLOCKS))]
        self.encoder = nn.Sequential(*layers, _convolution(width, spec.z_dim))
        # The limit on the latents and the doublings of pixels have no weights; `_decode` does them.
        layers = [nn.Identity(), _convolution(spec.z_dim, spec.widths[0]), nn.ReLU()]
        for (width, narrower), frames in zip(zip(spec.widths, spec.widths[1:]), (1, 2, 2)):
            layers += [*(MemoryBlock(width) for _ in range(_BLOCKS)), nn.Identity(), Grow(width, frames),
                       _convolution(width, narrower, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _convolution(spec.widths[-1], colours))

    def encode_piece(self, x: Tensor, stream: Stream) -> Tensor:
        """4n frames [B, 3, 4n, H, W] in [-1, 1] to n raw latent frames.

        A clip's frames are put off by three, as in the format: its latent frame i sees frames 4i to 4i + 3.
        """
        x = (x.movedim(2, 1) + 1) / 2
        if self.spec.patch > 1:
            x = F.pixel_unshuffle(x, self.spec.patch)
        for layer in self.encoder:
            x = layer(x, stream) if isinstance(layer, MemoryBlock | Pool) else _per_frame(layer, x)
        return self._stats.restore(x.movedim(1, 2))

    def decode_piece(self, z: Tensor, stream: Stream) -> Tensor:
        """Raw latents to pixels as `WanVAE.decode_piece` gives them: 4n - 3 frames of the first piece, then 4n."""
        pixels = self._decode(self._stats.normalise(z).movedim(2, 1), stream)
        # Of the frames that a clip's first latent frame stands for, only the last is a frame of the video.
        if stream.first:
            pixels = pixels[:, self.spec.temporal_stride - 1:]
        stream.first = False
        return pixels.movedim(1, 2) * 2 - 1

    def encoded(self, video: Tensor) -> Iterator[Tensor]:
        """See `StreamingVAE`. The last frame is repeated where frames are missing."""
        step, stream, frames = self.spec.temporal_stride, Stream(), video.shape[2]
        for start in range(0, frames, step):
            piece = video[:, :, start:start + step]
            missing = step - piece.shape[2]
            if missing:
                piece = torch.cat([piece, piece[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
            yield self._run(self.encode_piece, piece, stream, of=1 + frames // step)

    def decoded(self, source: Tensor, *, composed: bool) -> Iterator[Tensor]:
        """See `StreamingVAE`."""
        stream = Stream()
        for z in source.split(1, 2):
            yield self._run(self.decode_piece, z, stream, of=source.shape[2])

    def compose(self, latents: Tensor) -> Tensor:
        """The latents themselves: no layer sees whole frames."""
        return latents

    def preview(self, latents: Tensor) -> Tensor:
        """A picture [B, 3, H', W'] in [-1, 1] of the last of normalised latents [B, z_dim, T, h, w], at little cost.

        Of each latent frame only the last of four frames is made; so the blocks take the one of the latent frame before
        for the frame before. Pictures of which half the size has 256 pixels on its longer side are made at half the
        size, by leaving out the last doubling.
        """
        halved = max(latents.shape[3:]) * self.spec.spatial_stride >= 2 * _PREVIEW_SIDE

        def run(z: Tensor, stream: Stream) -> Tensor:
            return self._decode(z.movedim(2, 1), stream, quick=True, doublings=2 if halved else 3)[:, -1]

        stream = Stream()
        for z in latents.split(1, 2):
            picture = self._run(run, z, stream)
        return picture.clamp(0, 1) * 2 - 1

    def _decode(self, x: Tensor, stream: Stream, *, quick: bool = False, doublings: int = 3) -> Tensor:
        """Normalised latents [B, T, z, h, w] to pixels [B, 4T, 3, H, W], about 0 to 1; `quick` ones to T frames."""
        x = torch.tanh(x / _LIMIT) * _LIMIT
        layers = iter(self.decoder)
        for layer in layers:
            if isinstance(layer, Grow):
                # Doubling pixels and a 1x1 convolution can change places; so there are four times fewer of them.
                x, convolution = layer(x, quick), next(layers)
                doublings -= 1
                x = _per_frame(convolution if doublings < 0 else partial(on_doubled, weight=convolution.weight,
                                                                         bias=None), x)
            else:
                x = layer(x, stream) if isinstance(layer, MemoryBlock) else _per_frame(layer, x)
        return F.pixel_shuffle(x, self.spec.patch) if self.spec.patch > 1 else x


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and the frame before it (zeros before a clip), beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_convolution(2 * width, width), nn.ReLU(), _convolution(width, width), nn.ReLU(),
                                  _convolution(width, width))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x [B, T, width, H, W] -> the same shape."""
        before = stream.recall(self)
        before = torch.zeros_like(x[:, :1]) if before is None else before
        stream.remember(self, x[:, -1:])
        past = torch.cat([before, x[:, :-1]], 1) if x.shape[1] > 1 else before
        return F.relu(_per_frame(self.conv, torch.cat([x, past], 2)) + x)


class Pool(nn.Module):
    """Joins every `frames` frames into one, by a 1x1 convolution of all their channels."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self._frames = frames
        self.conv = nn.Conv2d(frames * width, width, 1, bias=False)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """x [B, T, width, H, W], T a multiple of `frames` -> [B, T / frames, width, H, W]."""
        return _per_frame(self.conv, x.unflatten(1, (-1, self._frames)).flatten(2, 3))


class Grow(nn.Module):
    """Makes `frames` frames of each, by a 1x1 convolution to all their channels."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self._frames = frames
        self.conv = nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x: Tensor, quick: bool = False) -> Tensor:
        """x [B, T, width, H, W] -> [B, T * frames, width, H, W], or with `quick` only the last frame of each."""
        if quick:
            return _per_frame(partial(F.conv2d, weight=self.conv.weight[-x.shape[2]:]), x)
        return _per_frame(self.conv, x).unflatten(2, (self._frames, -1)).flatten(1, 2)


def _convolution(width: int, out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=bias)


def _per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A 2D layer on every frame of x [B, T, C, H, W], in channels-last memory."""
    images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return layer(images).unflatten(0, x.shape[:2])
