"""The video VAEs of Wan 2.1 and 2.2. What the two have of their own, encoder and decoder, is in `wan21` and `wan22`.

Parameter names: Wan2.1 `wan/modules/vae.py`, Wan2.2 `wan/modules/vae2_2.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..presets import VAESpec
from . import wan21, wan22
from .layers import CausalConv3d, Stream, channels_last
from .streaming import StreamingVAE

# Wide layers take several latent frames together where a picture is so small that reading and arranging their weights
# weighs more than computing with them: as many as keep their features within so many numbers, at most four.
_FEATURES, _MOST_AT_ONCE = 2 ** 19, 4


class WanVAE(StreamingVAE):
    """Encoder and decoder of either family; see `StreamingVAE`. Raises ValueError for a spec that contradicts itself.

    The spatial stride is 8 for Wan 2.1, 16 for 2.2.
    """

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        family = wan22 if spec.kind == "wan22" else wan21
        self.encoder = family.Encoder(spec)
        self.conv1 = CausalConv3d(spec.z_dim * 2, spec.z_dim * 2, 1)
        self.conv2 = CausalConv3d(spec.z_dim, spec.z_dim, 1)
        self.decoder = family.Decoder(spec)

    def encode_piece(self, x: Tensor, stream: Stream) -> Tensor:
        """One piece of pixels to the latent mean; the first piece holds 4n + 1 frames, later ones 4n."""
        return self._condense(self.encoder.gather(x, stream), stream)

    def decode_piece(self, z: Tensor, stream: Stream) -> Tensor:
        """One piece of raw latents to pixels, not clamped; the first piece gives 4n - 3 frames, later ones 4n."""
        pixels = self.decoder(self.conv2(channels_last(z), stream), stream)
        stream.first = False
        return pixels

    def encoded(self, video: Tensor) -> Iterator[Tensor]:
        """See `StreamingVAE`."""
        step, stream = self.spec.temporal_stride, Stream()
        count = 1 + (video.shape[2] - 1) // step
        for start, stop in self._runs(count, video.shape[3] // self.spec.spatial_stride,
                                      video.shape[4] // self.spec.spatial_stride):
            pieces = [video[:, :, max(0, 1 + (index - 1) * step):1 + index * step] for index in range(start, stop)]
            features = [self._run(self.encoder.gather, piece, stream, of=count) for piece in pieces]
            yield self._run(self._condense, features.pop() if len(features) == 1 else torch.cat(features, 2), stream,
                            of=count)
            features.clear()

    def decoded(self, source: Tensor, *, composed: bool) -> Iterator[Tensor]:
        """See `StreamingVAE`."""
        stream, count = Stream(), source.shape[2]
        whole, begin = (self._paint, self._grow) if composed else (self.decode_piece, self._compose_and_grow)
        for start, stop in self._runs(count, *source.shape[3:]):
            if stop - start == 1:
                # In one go, which lets go of every layer's input on the way.
                yield self._run(whole, source[:, :, start:stop], stream, of=count)
                continue
            features = self._run(begin, source[:, :, start:stop], stream, of=count)
            for piece in features.chunk(stop - start, 2):
                yield self._run(self.decoder.draw, piece, stream, of=count)
            # Or they would be there beside the next ones.
            del features, piece

    def compose(self, latents: Tensor) -> Tensor:
        """The decoder's features of a whole clip, on the host, where they take at most half of the frames' room."""
        def run(z: Tensor, stream: Stream) -> Tensor:
            features = self.decoder.compose(self.conv2(channels_last(z), stream), stream)
            stream.first = False
            return features

        stream, first = Stream(), self.decoder.conv1
        features = torch.empty(latents.shape[0], first.out_channels, *latents.shape[2:], dtype=first.weight.dtype)
        for start, stop in self._runs(*latents.shape[2:]):
            features[:, :, start:stop] = self._run(run, latents[:, :, start:stop], stream, of=latents.shape[2])
        return features

    def at_once(self, height: int, width: int) -> int:
        """How many latent frames of so many latent pixels the wide layers take together: 4, 2 or 1."""
        fitting = _FEATURES // (self.decoder.conv1.out_channels * height * width)
        return next(count for count in (_MOST_AT_ONCE, 2, 1) if count <= max(1, fitting))

    def _runs(self, count: int, height: int, width: int) -> Iterator[tuple[int, int]]:
        """The latent frames of a clip as they pass the wide layers; the first is always alone, as it is special."""
        yield 0, 1
        together = self.at_once(height, width)
        for start in range(1, count, together):
            yield start, min(start + together, count)

    def _condense(self, features: Tensor, stream: Stream) -> Tensor:
        mean = self.conv1(self.encoder.condense(features, stream), stream)[:, :self.spec.z_dim]
        stream.first = False
        return mean

    def _compose_and_grow(self, z: Tensor, stream: Stream) -> Tensor:
        return self.decoder.grow(self.decoder.compose(self.conv2(channels_last(z), stream), stream), stream)

    def _grow(self, features: Tensor, stream: Stream) -> Tensor:
        return self.decoder.grow(channels_last(features), stream)

    def _paint(self, features: Tensor, stream: Stream) -> Tensor:
        pixels = self.decoder.paint(channels_last(features), stream)
        stream.first = False
        return pixels
