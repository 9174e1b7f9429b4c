"""A small VAE with random weights, and random tensors, for the tests of this folder."""

from dataclasses import replace

import torch

from wan_core.presets import VAES, VAESpec
from wan_core.vae import WanVAE

SMALL = replace(VAES["wan21_vae"], dim=8, decoder_dim=8, num_res_blocks=1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_vae(spec: VAESpec = SMALL, seed: int = 0) -> WanVAE:
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
