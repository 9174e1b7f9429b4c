"""What all video VAEs here share: clips pass through piece by piece, and in tiles where memory is short.

4n+1 frames become n+1 latent frames: the clip's first frame has a latent of its own, every later latent frame stands
for four. Pieces follow each other with the causal memory of `Stream`; each finished one is written into a host buffer
made beforehand, so device memory does not grow with the clip's length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..presets import TinyVAESpec, VAESpec
from .layers import Stream
from .tiling import Tile, Tiling, tiles_of

OnPiece = Callable[[], None]

# Shorter clips do not repay the time in which cuDNN tries its algorithms on the first pieces.
_TUNED_FROM = 8


class StreamingVAE(nn.Module):
    """Streaming, tiled encode and decode for a VAE that says how the pieces of a clip pass through it.

    Pixels are [B, 3, F, H, W] in [-1, 1], F = 4n + 1, H and W multiples of the spatial stride s. Latents are
    [B, z_dim, n + 1, H/s, W/s] as a Wan VAE's encoder makes them, not normalised (`LatentStats` does that). Inputs and
    outputs live on the host or wherever the caller keeps them; pieces are moved to the module's device and dtype.
    """

    spec: VAESpec | TinyVAESpec

    def at_once(self, height: int, width: int) -> int:
        """How many latent frames of so many latent pixels pass together, at most, after a clip's first."""
        return 1

    def encoded(self, video: Tensor) -> Iterator[Tensor]:
        """Raw latents of pixels, one latent frame or several at a time; reads no further than it has to."""
        raise NotImplementedError

    def decoded(self, source: Tensor, *, composed: bool) -> Iterator[Tensor]:
        """Pixels of raw latents, or of what `compose` made of them, not clamped: the first frame, then four a time."""
        raise NotImplementedError

    def compose(self, latents: Tensor) -> Tensor:
        """What tiles are cut from: a whole clip's raw latents, brought as far as they must be seen as whole frames."""
        raise NotImplementedError

    def encode(self, video: Tensor, *, tiling: Tiling | None = None, on_piece: OnPiece | None = None) -> Tensor:
        """Latents (float32, on the host) of `video`; `on_piece` is called for each of their frames and may raise to
        stop.

        Raises ValueError for sizes off the grid.
        """
        batch, _, frames, height, width = self._check_video(video)
        stride, step = self.spec.spatial_stride, self.spec.temporal_stride
        rows, columns = height // stride, width // stride
        out = torch.zeros(batch, self.spec.z_dim, 1 + (frames - 1) // step, rows, columns)
        for tiles in tiles_of(rows, columns, stride, tiling):
            start = 0
            for piece in self.encoded(_cut(video, tiles, stride)):
                stop = start + piece.shape[2]
                for tile, part in zip(tiles, piece.chunk(len(tiles))):
                    tile.add_to(out[:, :, start:stop], part, 1)
                    _tell(on_piece, stop - start)
                # Or it would be there beside the next one.
                del piece, part
                start = stop
        return out

    def decode(self, latents: Tensor, *, out: Tensor | None = None, tiling: Tiling | None = None,
               on_frames: Callable[[int, int], None] | None = None, on_piece: OnPiece | None = None) -> Tensor:
        """Pixels in [-1, 1] of raw `latents`, written into `out` ([B, 3, F, H, W], made on the host if not given).

        `on_frames(start, stop)` is called as soon as out[:, :, start:stop] is final: after every latent frame, or
        with tiles while the last of them run. `on_piece` is called after every piece and may raise to stop.
        """
        for start, stop in self.decode_pieces(latents, out := self.frame_buffer(latents, out), tiling, on_piece):
            if on_frames:
                on_frames(start, stop)
        return out

    def decode_pieces(self, latents: Tensor, out: Tensor, tiling: Tiling | None = None,
                      on_piece: OnPiece | None = None) -> Iterator[tuple[int, int]]:
        """`decode` as a generator: yields (start, stop) for every run of frames of `out` that has become final."""
        stride = self.spec.spatial_stride
        batches, source = tiles_of(*latents.shape[3:], stride, tiling), latents
        tiled = batches[0][0].is_part
        if tiled:
            out.zero_()
            # A tile composed on its own would differ from its neighbours, as attention sees the whole frame.
            source = self.compose(latents)
        for tiles in batches:
            start = 0
            for piece in self.decoded(_cut(source, tiles, 1), composed=tiled):
                stop = start + piece.shape[2]
                for tile, part in zip(tiles, piece.clamp_(-1, 1).chunk(len(tiles))):
                    tile.add_to(out[:, :, start:stop], part, stride)
                    _tell(on_piece, 1)
                del piece, part
                if tiles is batches[-1]:
                    yield start, stop
                start = stop

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

    def arranged(self) -> "StreamingVAE":
        """This module, off the CPU with the kernels of its convolutions in channels-last memory, as the pictures are.

        Otherwise each call would bring them into that order anew. On a CPU they may be the mapped file itself.
        """
        for parameter in self.parameters():
            order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
            if order and parameter.device.type != "cpu" and not parameter.is_contiguous(memory_format=order):
                parameter.data = parameter.data.contiguous(memory_format=order)
        return self

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

    def _run(self, step: Callable[[Tensor, Stream], Tensor], piece: Tensor, stream: Stream, *,
             of: int = 1) -> Tensor:
        """One piece, of a clip of so many, through a part of the VAE, without gradients."""
        weight = next(self.parameters())
        tuned = weight.device.type == "cuda" and of >= _TUNED_FROM
        with torch.no_grad(), _tuned_convolutions() if tuned else nullcontext():
            return step(piece.to(weight.device, weight.dtype), stream)


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """cuDNN measures its algorithms for each new size of convolution; its setting is given back afterwards."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _cut(source: Tensor, tiles: list[Tile], scale: int) -> Tensor:
    """The tiles of a clip, one behind the other along the batch."""
    parts = [tile.cut(source, scale) for tile in tiles]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tell(on_piece: OnPiece | None, times: int) -> None:
    for _ in range(times if on_piece else 0):
        on_piece()
