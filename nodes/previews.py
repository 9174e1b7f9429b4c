"""Pictures of a video that is being sampled, decoded by a VAE small enough to run after every step.

For released models that is a tiny VAE in the TAEHV format (taew2_1, lighttaew2_1, taew2_2) in models/vae_approx, for
nano models the bundled one, or the nano VAE itself.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..wan_core import nano
from ..wan_core.memory import OneAtATime
from ..wan_core.models import VideoVAE, load_vae
from ..wan_core.presets import VAES, TinyVAESpec, VAESpec
from ..wan_core.vae import LatentStats
from ..wan_core.weights import LoadError

log = logging.getLogger(__name__)

# What decodes previews of nano models, by their VAE.
NANO_PREVIEWS = MappingProxyType({VAES["nano_vae"]: nano.TINY_VAE, VAES["nano_vae22"]: nano.VAE22})

# Where ComfyUI keeps such files, and what is in the names of those for Wan: shapes do not tell them from those of
# HunyuanVideo, which has as many latent channels of another meaning.
FOLDER, MARK = "vae_approx", "taew"

# A picture [H, W, 3] in [-1, 1], on the host, of normalised latents [B, C, T, H, W].
Picture = Callable[[Tensor], Tensor]


def for_wan(names: Sequence[str]) -> list[str]:
    """Of the files in `FOLDER`, those for Wan."""
    return [name for name in names if MARK in name.lower()]


def picture_of(spec: VAESpec, files: Sequence[Path], device: torch.device) -> Picture | None:
    """What makes pictures of latents of the VAE `spec`, from the first of `files` that can; None if none does.

    Latents stay on `device` for it, but those of nano models, which are as fast on the host.
    """
    if spec in NANO_PREVIEWS:
        return _with(load_vae(NANO_PREVIEWS[spec], placement=OneAtATime("cpu")))
    for file in files:
        try:
            vae = load_vae(file, placement=OneAtATime(device))
        except LoadError as error:
            log.warning("Wan: no previews from %s: %s", file.name, error)
            continue
        if vae.fits(spec):
            return _with(vae)
    return None


def _with(vae: VideoVAE) -> Picture:
    device = vae.placement.device
    if not isinstance(vae.spec, TinyVAESpec):
        stats = LatentStats.of(vae.spec)
        return lambda clean: vae.decode(stats.restore(clean[:1, :, :1].float().to(device)))[0, :, 0].movedim(0, -1)

    def picture(clean: Tensor) -> Tensor:
        # A frame from the middle: of a given first frame there is nothing to see. The one before it is its past.
        middle = clean.shape[2] // 2
        return vae.module().preview(clean[:1, :, max(0, middle - 1):middle + 1])[0].movedim(0, -1).float().cpu()

    return picture
