"""The video VAEs of Wan 2.1 and 2.2: streaming, tiled encode and decode between pixels and latents.

4n+1 frames become n+1 latent frames: the clip's first frame has a latent of its own, every later latent frame stands
for four. Clips pass through piece by piece with the causal memory of `Stream`; each finished piece is written into a
host buffer made beforehand, so device memory does not grow with the clip's length. What the two families have of their
own, encoder and decoder, is in `wan21` and `wan22`.
Parameter names: Wan2.1 `wan/modules/vae.py`, Wan2.2 `wan/modules/vae2_2.py`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..presets import VAESpec
from . import wan21, wan22
from .layers import CausalConv3d, Stream, channels_last
from .tiling import Span, Tiling, spans

OnPiece = Callable[[], None]


class WanVAE(nn.Module):
    """Encoder and decoder with streaming and tiling.

    Pixels are [B, 3, F, H, W] in [-1, 1], F = 4n + 1, H and W multiples of the spatial stride s (8 for Wan 2.1, 16 for
    2.2). Latents are [B, z_dim, n + 1, H/s, W/s] as the encoder makes them, not normalised (`LatentStats` does that).
    Inputs and outputs live on the host or wherever the caller keeps them; pieces are moved to the module's device and
    dtype. Raises ValueError for a spec that contradicts itself.
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
        mean = self.conv1(self.encoder(x, stream), stream)[:, :self.spec.z_dim]
        stream.first = False
        return mean

    def decode_piece(self, z: Tensor, stream: Stream) -> Tensor:
        """One piece of raw latents to pixels, not clamped; the first piece gives 4n - 3 frames, later ones 4n."""
        pixels = self.decoder(self.conv2(channels_last(z), stream), stream)
        stream.first = False
        return pixels

    def encode(self, video: Tensor, *, tiling: Tiling | None = None, on_piece: OnPiece | None = None) -> Tensor:
        """Latents (float32, on the host) of `video`; `on_piece` is called after each piece and may raise to stop.

        Raises ValueError for sizes off the grid.
        """
        batch, _, frames, height, width = self._check_video(video)
        stride, step = self.spec.spatial_stride, self.spec.temporal_stride
        rows, columns = self._tiles(height // stride, width // stride, tiling)
        out = torch.zeros(batch, self.spec.z_dim, 1 + (frames - 1) // step, height // stride, width // stride)
        for row, column, weight in _grid(rows, columns, 1):
            stream = Stream()
            tile = video[..., row.start * stride:row.stop * stride, column.start * stride:column.stop * stride]
            for index in range(out.shape[2]):
                start, stop = (0, 1) if index == 0 else (1 + (index - 1) * step, 1 + index * step)
                piece = self._no_grad(self.encode_piece, tile[:, :, start:stop], stream)
                _accumulate(out[:, :, index:index + 1], piece, row, column, 1, weight)
                if on_piece:
                    on_piece()
        return out

    def decode(self, latents: Tensor, *, out: Tensor | None = None, tiling: Tiling | None = None,
               on_frames: Callable[[int, int], None] | None = None, on_piece: OnPiece | None = None) -> Tensor:
        """Pixels in [-1, 1] of raw `latents`, written into `out` ([B, 3, F, H, W], made on the host if not given).

        `on_frames(start, stop)` is called as soon as out[:, :, start:stop] is final: after every latent frame, or
        with tiles while the last tile runs. `on_piece` is called after every piece and may raise to stop.
        """
        for start, stop in self.decode_pieces(latents, out := self.frame_buffer(latents, out), tiling, on_piece):
            if on_frames:
                on_frames(start, stop)
        return out

    def decode_pieces(self, latents: Tensor, out: Tensor, tiling: Tiling | None = None,
                      on_piece: OnPiece | None = None) -> Iterator[tuple[int, int]]:
        """`decode` as a generator: yields (start, stop) for every run of frames of `out` that has become final."""
        stride, step = self.spec.spatial_stride, self.spec.temporal_stride
        rows, columns = self._tiles(latents.shape[3], latents.shape[4], tiling)
        tiles = list(_grid(rows, columns, stride))
        source, run = latents, self.decode_piece
        if len(tiles) > 1:
            out.zero_()
            # A tile composed on its own would differ from its neighbours, as attention sees the whole frame.
            source, run = self.compose(latents), self._paint_piece
        for number, (row, column, weight) in enumerate(tiles, 1):
            stream = Stream()
            tile = source[..., row.start:row.stop, column.start:column.stop]
            for index in range(latents.shape[2]):
                piece = self._no_grad(run, tile[:, :, index:index + 1], stream).clamp_(-1, 1)
                start = max(0, 1 + (index - 1) * step)
                stop = start + piece.shape[2]
                _accumulate(out[:, :, start:stop], piece, row, column, stride, weight)
                if on_piece:
                    on_piece()
                if number == len(tiles):
                    yield start, stop

    def compose(self, latents: Tensor) -> Tensor:
        """The decoder's features of a whole clip, on the host, where they take at most half of the frames' room."""
        def run(z: Tensor, stream: Stream) -> Tensor:
            features = self.decoder.compose(self.conv2(channels_last(z), stream), stream)
            stream.first = False
            return features

        stream, first = Stream(), self.decoder.conv1
        features = torch.empty(latents.shape[0], first.out_channels, *latents.shape[2:], dtype=first.weight.dtype)
        for index, z in enumerate(latents.split(1, 2)):
            features[:, :, index:index + 1] = self._no_grad(run, z, stream)
        return features

    def _paint_piece(self, features: Tensor, stream: Stream) -> Tensor:
        pixels = self.decoder.paint(channels_last(features), stream)
        stream.first = False
        return pixels

    def frame_buffer(self, latents: Tensor, out: Tensor | None = None) -> Tensor:
        """`out` after a check of its shape, or a new host buffer for the frames of `latents`."""
        if latents.ndim != 5 or latents.shape[1] != self.spec.z_dim or 0 in latents.shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; this VAE decodes "
                             f"[batch, {self.spec.z_dim}, frames, height, width]. Use latents of the same family.")
        batch, _, frames, height, width = latents.shape
        shape = (batch, 3, 1 + (frames - 1) * self.spec.temporal_stride,
                 height * self.spec.spatial_stride, width * self.spec.spatial_stride)
        if out is None:
            return torch.empty(shape)
        if out.shape != shape:
            raise ValueError(f"the frame buffer has shape {list(out.shape)}; these latents decode to {list(shape)}.")
        return out

    def _check_video(self, video: Tensor) -> torch.Size:
        stride, step = self.spec.spatial_stride, self.spec.temporal_stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {list(video.shape)}; expected [batch, 3, frames, height, width].")
        _, _, frames, height, width = video.shape
        if frames < 1 or (frames - 1) % step:
            raise ValueError(f"video has {frames} frames; the VAE takes {step}n + 1. "
                             f"Use {max(0, frames - 1) // step * step + 1} frames.")
        if height % stride or width % stride or not height or not width:
            raise ValueError(f"video is {width}x{height} pixels; width and height must be multiples of {stride}.")
        return video.shape

    def _tiles(self, height: int, width: int, tiling: Tiling | None) -> tuple[list[Span], list[Span]]:
        if tiling is None:
            return [Span(0, height, None, None)], [Span(0, width, None, None)]
        stride = self.spec.spatial_stride
        tiling.check(stride)
        overlap = tiling.overlap // stride
        return spans(height, tiling.height // stride, overlap), spans(width, tiling.width // stride, overlap)

    @torch.no_grad()
    def _no_grad(self, run: Callable[[Tensor, Stream], Tensor], piece: Tensor, stream: Stream) -> Tensor:
        weight = self.conv1.weight
        return run(piece.to(weight.device, weight.dtype), stream)


def _grid(rows: list[Span], columns: list[Span], scale: int) -> Iterator[tuple[Span, Span, Tensor | None]]:
    """All tiles with their blending weights [height, width] (None where a single tile covers everything)."""
    for row in rows:
        for column in columns:
            alone = len(rows) == len(columns) == 1
            yield row, column, None if alone else row.weights(scale)[:, None] * column.weights(scale)


def _accumulate(out: Tensor, piece: Tensor, row: Span, column: Span, scale: int, weight: Tensor | None) -> None:
    if weight is None:
        out.copy_(piece)
    else:
        region = out[..., row.start * scale:row.stop * scale, column.start * scale:column.stop * scale]
        region += piece.to(out.device, out.dtype) * weight.to(out.device)
