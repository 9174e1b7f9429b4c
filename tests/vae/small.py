"""Small VAEs of both families with random weights, and random tensors, for the tests of this folder."""

from dataclasses import replace

import torch

from wan_core.presets import VAES, VAESpec
from wan_core.vae import WanVAE

SMALL = {kind: replace(VAES[f"{kind}_vae"], dim=8, decoder_dim=8, num_res_blocks=1) for kind in ("wan21", "wan22")}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_latents(spec: VAESpec, frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Latents of so many latent frames, rows and columns."""
    return randn(batch, spec.z_dim, frames, height, width)


def random_video(spec: VAESpec, frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Pixels in [-1, 1] of so many frames; height and width in latent pixels."""
    return randn(batch, 3, frames, height * spec.spatial_stride, width * spec.spatial_stride).clamp_(-1, 1)


def random_vae(spec: VAESpec, seed: int = 0) -> WanVAE:
    """Random weights whose norms, biases and temporal convolutions all matter and whose pixels rarely reach a limit."""
    torch.manual_seed(seed)
    vae = WanVAE(spec).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.add_(0.2 * torch.randn_like(parameter))
        if "time_conv" in name or "proj" in name:
            parameter.mul_(2)
    vae.decoder.head[2].weight.mul_(0.5)
    return vae
