"""The colours in which live previews show nano latents."""

import torch
from torch.nn import functional as F

from wan_core import nano
from wan_core.models import load_vae
from wan_core.training.shapes import sample_batch
from wan_core.vae import LatentStats


def test_preview_shows_the_clip():
    """Promise: latents times LATENT_RGB show what the clip shows: they explain three quarters of its colours' variance.

    A VAE that is trained anew needs new factors.
    """
    clips, _ = sample_batch(torch.Generator().manual_seed(3), 4)
    vae = load_vae()
    clean = LatentStats.of(vae.spec).normalise(vae.encode(clips)).movedim(1, -1)
    preview = clean @ torch.tensor(nano.LATENT_RGB) + torch.tensor(nano.LATENT_RGB_BIAS)
    groups = torch.cat([clips[:, :, :1], clips[:, :, 1:].unflatten(2, (4, 4)).mean(3)], 2)
    colours = F.avg_pool3d(groups, (1, 8, 8)).movedim(1, -1)
    unexplained = (preview - colours).square().mean() / (colours - colours.mean((0, 1, 2, 3))).square().mean()
    assert unexplained < 0.25
