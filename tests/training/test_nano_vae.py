"""Training of the nano VAEs: folding the latents' statistics into the weights changes nothing but the latents."""

from dataclasses import replace

import pytest
import torch

from tests.vae.small import random_latents, random_vae
from wan_core.presets import VAES
from wan_core.training.nano_vae import VAE_TRAININGS, fold_statistics

NARROW = {"vae": {"dim": 4, "decoder_dim": 4}, "vae22": {"dim": 2, "decoder_dim": 4}}


@pytest.mark.parametrize("part", VAE_TRAININGS)
def test_folding_gives_latents_the_statistics_of_the_released_vae(part):
    """After folding latents have the released mean and deviation, and the decoder gives the same pixels for them."""
    spec = replace(VAES[VAE_TRAININGS[part].vae], **NARROW[part])
    vae = random_vae(spec)
    latents = random_latents(spec, 2, 4, 4)
    video = vae.decode(latents)
    encoded = vae.encode(video)
    mean, std = 3 * torch.arange(spec.z_dim) / spec.z_dim, 0.5 + torch.arange(spec.z_dim) / spec.z_dim
    fold_statistics(vae, spec, mean, std)

    def folded(z):
        columns = [torch.as_tensor(value).view(1, -1, 1, 1, 1) for value in (mean, std, spec.mean, spec.std)]
        return (z - columns[0]) / columns[1] * columns[3] + columns[2]

    torch.testing.assert_close(vae.encode(video), folded(encoded), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(folded(latents)), video, atol=1e-4, rtol=0)
