"""Training of the nano VAEs: folding the latents' statistics into the weights changes nothing but the latents."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.vae.small import random_latents, random_vae
from wan_core.presets import VAES
from wan_core.training.nano_vae import (
    EVALUATION_SEED,
    VAE_TRAININGS,
    channels_read,
    concentrate,
    fold_statistics,
    latent_statistics,
)
from wan_core.training.shapes import sample_batch
from wan_core.vae import LatentStats

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


@pytest.fixture(scope="module")
def concentrated():
    """A tiny 2.2-type VAE before and after its latents were concentrated on 16 channels."""
    spec = replace(VAES["nano_vae22"], **NARROW["vae22"])
    vae = random_vae(spec)
    fold_statistics(vae, spec, *latent_statistics(vae, 8))
    before = copy.deepcopy(vae)
    concentrate(vae, 16, 8)
    return before, vae


def test_concentrated_latents_keep_their_statistics(concentrated):
    """Every channel has the released mean and deviation, and the further ones repeat the first 16."""
    _, vae = concentrated
    mean, std = latent_statistics(vae, 8)
    spread = torch.tensor(vae.spec.std)
    assert ((mean - torch.tensor(vae.spec.mean)).abs() < 0.02 * spread).all()
    assert ((std - spread).abs() < 0.02 * spread).all()
    clip = sample_batch(torch.Generator().manual_seed(3), 1, side=64)[0]
    latents = LatentStats.of(vae.spec).normalise(vae.encode(clip))
    torch.testing.assert_close(latents[:, 16:32], latents[:, :16], atol=1e-3, rtol=0)


def test_concentrated_latents_decode_as_their_projection(concentrated):
    """The decoder reads the first 16 channels only, and makes of them what it made of their principal components."""
    before, vae = concentrated
    assert channels_read(vae).tolist() == [True] * 16 + [False] * 32
    clip = sample_batch(torch.Generator().manual_seed(3), 1, side=64)[0]
    latents = vae.encode(clip)
    other = latents.clone()
    other[:, 16:] = torch.randn(other[:, 16:].shape)
    torch.testing.assert_close(vae.decode(other), vae.decode(latents), atol=1e-4, rtol=0)
    stats = LatentStats.of(vae.spec)
    old = stats.normalise(before.encode(clip))
    samples = torch.cat([stats.normalise(before.encode(clips)) for clips in _training_clips()]).movedim(1, 0).flatten(1)
    axes = torch.linalg.eigh(torch.cov(samples.double()))[1][:, -16:].float()
    centre = samples.mean(1).view(1, -1, 1, 1, 1)
    projected = torch.einsum("ij,bjthw->bithw", axes @ axes.T, old - centre) + centre
    torch.testing.assert_close(vae.decode(latents), before.decode(stats.restore(projected)), atol=2e-3, rtol=0)


def _training_clips():
    generator = torch.Generator().manual_seed(EVALUATION_SEED + 1)
    yield sample_batch(generator, 8, side=128)[0]
