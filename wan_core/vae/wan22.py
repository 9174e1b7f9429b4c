"""Encoder and decoder of the Wan 2.2 VAE: 48 latent channels, sixteen pixels a side become one.

Both work on 2x2 patches of pixels, so the convolutions see half the height and width. Every resolution level has,
beside its layers, a shortcut without parameters: averages of the input's pixels on the way down, copies of them on the
way up. Where a level also widens (or narrows), a channel's averages (copies) are over a part of those pixels, told
apart in the order time, height, width.
Architecture and parameter names: Wan2.2 `wan/modules/vae2_2.py`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import VAESpec
from .layers import (
    CausalConv3d,
    Downsample,
    ResidualBlock,
    Stream,
    Upsample,
    head,
    last_in_time,
    middle,
    run_head,
    through,
)

PATCH = 2


class Encoder(nn.Module):
    """Pixels [B, 3, T, H, W] -> 2 * z_dim channels of latent mean and log-variance."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        dims = [spec.dim * m for m in (1, *spec.dim_mult)]
        flags = (*spec.temporal_downsample, None)
        self.conv1 = CausalConv3d(3 * PATCH * PATCH, dims[0], 3, padding=1)
        self.downsamples = nn.Sequential(*(
            DownLevel(in_dim, out_dim, spec.num_res_blocks, temporal=flag)
            for in_dim, out_dim, flag in zip(dims, dims[1:], flags)))
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], spec.z_dim * 2)
        self._gathered = last_in_time(self.downsamples)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.condense(self.gather(x, stream), stream)

    def gather(self, x: Tensor, stream: Stream) -> Tensor:
        """Pixels to features with one frame for each latent frame: nearly all of the work."""
        return through([self.conv1, *self.downsamples[:self._gathered]], patchify(x), stream)

    def condense(self, features: Tensor, stream: Stream) -> Tensor:
        """The rest: wide layers on small pictures, which cost least when several frames come at once."""
        x = through([*self.downsamples[self._gathered:], *self.middle], features, stream)
        return run_head(self.head, x, stream)


class Decoder(nn.Module):
    """Latents [B, z_dim, T, h, w] -> pixels [B, 3, T', 16h, 16w]."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        dims = [spec.decoder_dim * m for m in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
        flags = (*reversed(spec.temporal_downsample), None)
        self.conv1 = CausalConv3d(spec.z_dim, dims[0], 3, padding=1)
        self.middle = middle(dims[0])
        self.upsamples = nn.Sequential(*(
            UpLevel(in_dim, out_dim, spec.num_res_blocks + 1, temporal=flag)
            for in_dim, out_dim, flag in zip(dims, dims[1:], flags)))
        self.head = head(dims[-1], 3 * PATCH * PATCH)
        self._grown = last_in_time(self.upsamples)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        return self.paint(self.compose(z, stream), stream)

    def compose(self, z: Tensor, stream: Stream) -> Tensor:
        """Latents to features [B, C, T, h, w]: a small part of the work, with attention over the whole frame."""
        return through([self.conv1, *self.middle], z, stream)

    def paint(self, features: Tensor, stream: Stream) -> Tensor:
        """Features to pixels, by convolutions only: a pixel depends on its neighbourhood alone."""
        return unpatchify(run_head(self.head, through(self.upsamples, features, stream), stream))

    def grow(self, features: Tensor, stream: Stream) -> Tensor:
        """As far as the last doubling of frames: wide layers on small pictures, cheaper for several frames at once."""
        return through(self.upsamples[:self._grown], features, stream)

    def draw(self, features: Tensor, stream: Stream) -> Tensor:
        """The rest of `paint`: narrow layers on large pictures."""
        return unpatchify(run_head(self.head, through(self.upsamples[self._grown:], features, stream), stream))


class DownLevel(nn.Module):
    """Residual blocks at one resolution and, but on the last level (`temporal` None), a downsampling behind them.

    Height and width are halved; with `temporal` frames are too, but for the clip's first.
    """

    def __init__(self, in_dim: int, out_dim: int, blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self._factors = _factors(temporal)
        self._groups = _groups(out_dim, in_dim, self._factors)
        layers: list[nn.Module] = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(blocks)]
        if temporal is not None:
            layers.append(Downsample(out_dim, temporal=temporal))
        self.downsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return through(self.downsamples, x, stream).add_(self._averages(x))

    def _averages(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] at the lower resolution; a missing partner of the first frame counts as black (zeros)."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self._factors[0], 0)) if x.shape[2] % self._factors[0] else x
        for axis in (4, 3, 2):  # position, group and place within the group, from the last axis to the first
            groups = self._groups[axis - 2]
            x = x.unflatten(axis, (-1, groups, self._factors[axis - 2] // groups))
        # [B, C, T, groups, H, groups, W, groups] -> the groups behind the channels, channels innermost in memory
        return x.mean((4, 7, 10)).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).movedim(-1, 1)


class UpLevel(nn.Module):
    """Residual blocks at one resolution and, but on the last level (`temporal` None), an upsampling behind them.

    Height and width are doubled; with `temporal` frames are too, but for the clip's first.
    """

    def __init__(self, in_dim: int, out_dim: int, blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self._up = temporal is not None
        layers: list[nn.Module] = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(blocks)]
        if self._up:
            self._factors = _factors(temporal)
            self._groups = _groups(in_dim, out_dim, self._factors)
            layers.append(Upsample(out_dim, out_dim, temporal=temporal))
        self.upsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        h = through(self.upsamples, x, stream)
        if self._up:
            self._add_copies(h, x, stream)
        return h

    def _add_copies(self, h: Tensor, x: Tensor, stream: Stream) -> None:
        """Add every pixel of x to those of h that it stands for: in place, as the copies would be as large as h."""
        # [B, C, groups, T, H, groups, W, groups]
        x = x.unflatten(1, (-1, *self._groups)).permute(0, 1, 2, 5, 6, 3, 7, 4)
        copies = self._factors[0]
        # Of the clip's first frame only the last copy exists: nothing comes before it.
        missing = copies - 1 if stream.first else 0
        for copy in range(copies):
            source = x[:, :, min(copy, self._groups[0] - 1), int(copy < missing):]
            frames = h[:, :, (copy - missing) % copies::copies]
            frames.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).add_(source)


def _factors(temporal: bool | None) -> tuple[int, int, int]:
    """By how much a level's resampling changes frames, height and width."""
    return (1, 1, 1) if temporal is None else (2 if temporal else 1, 2, 2)


def _groups(wide: int, narrow: int, factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """How the wide side's channels for one of the narrow side share out its pixels in time, height and width."""
    left, groups = wide // narrow, []
    for factor in factors:
        groups.append(min(left, factor))
        left //= max(1, groups[-1])
    if left != 1 or narrow * groups[0] * groups[1] * groups[2] != wide:
        raise ValueError(f"a level of the Wan 2.2 VAE cannot go between {narrow} and {wide} channels with resampling "
                         f"{factors}: its shortcut takes 1, 2, 4 or 8 times as many, up to the product of the factors.")
    return tuple(groups)


def patchify(x: Tensor) -> Tensor:
    """Pixels [B, C, T, H, W] -> 2x2 patches [B, 4C, T, H/2, W/2], channels in the order colour, column, row."""
    x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, T, h, row, w, column]
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4).movedim(-1, 1)


def unpatchify(x: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(1, (-1, PATCH, PATCH))  # [B, C, column, row, T, h, w]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)
