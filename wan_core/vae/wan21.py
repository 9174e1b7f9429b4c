"""Encoder and decoder of the Wan 2.1 VAE: 16 latent channels, eight pixels a side become one.

Architecture and parameter names: Wan2.1 `wan/modules/vae.py`.
"""

from torch import Tensor, nn

from ..presets import VAESpec
from .layers import (
    CausalConv3d,
    Downsample,
    ResidualBlock,
    Stream,
    Upsample,
    channels_last,
    head,
    last_in_time,
    middle,
    run_head,
    through,
)


class Encoder(nn.Module):
    """Pixels [B, 3, T, H, W] -> 2 * z_dim channels of latent mean and log-variance."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        dims = [spec.dim * m for m in (1, *spec.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], 3, padding=1)
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            for _ in range(spec.num_res_blocks):
                layers.append(ResidualBlock(in_dim, out_dim))
                in_dim = out_dim
            if i < len(spec.dim_mult) - 1:
                layers.append(Downsample(out_dim, temporal=spec.temporal_downsample[i]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], spec.z_dim * 2)
        self._gathered = last_in_time(self.downsamples)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.condense(self.gather(x, stream), stream)

    def gather(self, x: Tensor, stream: Stream) -> Tensor:
        """Pixels to features with one frame for each latent frame: nearly all of the work."""
        return through([self.conv1, *self.downsamples[:self._gathered]], channels_last(x), stream)

    def condense(self, features: Tensor, stream: Stream) -> Tensor:
        """The rest: wide layers on small pictures, which cost least when several frames come at once."""
        x = through([*self.downsamples[self._gathered:], *self.middle], features, stream)
        return run_head(self.head, x, stream)


class Decoder(nn.Module):
    """Latents [B, z_dim, T, h, w] -> pixels [B, 3, T', 8h, 8w]."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        multipliers = (spec.dim_mult[-1], *reversed(spec.dim_mult))
        dims = [spec.decoder_dim * m for m in multipliers]
        self.conv1 = CausalConv3d(spec.z_dim, dims[0], 3, padding=1)
        self.middle = middle(dims[0])
        layers: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            if i > 0:
                in_dim //= 2  # the upsampling before halved the channels
            for _ in range(spec.num_res_blocks + 1):
                layers.append(ResidualBlock(in_dim, out_dim))
                in_dim = out_dim
            if i < len(spec.dim_mult) - 1:
                layers.append(Upsample(out_dim, out_dim // 2, temporal=spec.temporal_downsample[::-1][i]))
        self.upsamples = nn.Sequential(*layers)
        self.head = head(dims[-1], 3)
        self._grown = last_in_time(self.upsamples)

    def forward(self, z: Tensor, stream: Stream) -> Tensor:
        return self.paint(self.compose(z, stream), stream)

    def compose(self, z: Tensor, stream: Stream) -> Tensor:
        """Latents to features [B, C, T, h, w]: a small part of the work, with attention over the whole frame."""
        return through([self.conv1, *self.middle], z, stream)

    def paint(self, features: Tensor, stream: Stream) -> Tensor:
        """Features to pixels, by convolutions only: a pixel depends on its neighbourhood alone."""
        return run_head(self.head, through(self.upsamples, features, stream), stream)

    def grow(self, features: Tensor, stream: Stream) -> Tensor:
        """As far as the last doubling of frames: wide layers on small pictures, cheaper for several frames at once."""
        return through(self.upsamples[:self._grown], features, stream)

    def draw(self, features: Tensor, stream: Stream) -> Tensor:
        """The rest of `paint`: narrow layers on large pictures."""
        return run_head(self.head, through(self.upsamples[self._grown:], features, stream), stream)
