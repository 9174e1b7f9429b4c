"""Train the tiny preview VAE of the nano family to do what the nano VAE does.

Its decoder learns the nano VAE's pixels from that VAE's normalised latents, its encoder those latents from the pixels;
they have no weights in common and are trained side by side. The loss of the pixels is that of the nano VAEs: L1 + 2 *
L2, and L1 of spatial gradients; that of the latents is L2. A little noise on the latents makes the decoder forgive what
a transformer has not finished.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..presets import TINY_VAES
from ..vae import LatentStats, TinyVAE, WanVAE
from ..vae.layers import Stream
from .nano_vae import LATENT_NOISE, LATENT_SIDE
from .optimizer import Optimizers, learning_rate_factor
from .runs import RunLog, load_state, save_state
from .shapes import sample_batch

# Clips that are encoded together.
_GROUP = 8


@dataclass(frozen=True)
class TinyTraining:
    """Everything that decides the result of a training run."""

    steps: int = 1200
    clips: int = 192
    batch: int = 2
    seed: int = 0
    muon_lr: float = 2e-3
    adam_lr: float = 2e-3


def train_tiny(vae: WanVAE, options: TinyTraining, run: Path) -> TinyVAE:
    """Train and return the preview VAE of `vae`; state and log are in the folder `run`, a run there goes on."""
    torch.manual_seed(options.seed)
    tiny = TinyVAE(TINY_VAES["nano_tiny_vae"])
    optimizers = Optimizers(tiny, muon_lr=options.muon_lr, adam_lr=options.adam_lr,
                            adam_names=("encoder.0.", "encoder.17.", "decoder.1.", "decoder.22."))
    latents, pixels = _examples(vae, options.clips, options.seed)
    generator = Generator().manual_seed(options.seed)
    start = load_state(run / "preview_state.pt", tiny, optimizers, generator)
    with RunLog(run / "preview.csv", ("step", "loss", "psnr_db", "minutes"), start) as record:
        began = time.perf_counter()
        for step in range(start, options.steps):
            drawn = torch.randint(0, options.clips, (options.batch,), generator=generator)
            loss = _loss(tiny, latents[drawn], pixels[drawn].float(), generator)
            loss.backward()
            optimizers.step(learning_rate_factor(step / options.steps))
            if (step + 1) % 200 == 0 or step + 1 == options.steps:
                record.add(step + 1, loss.item(), agreement_psnr(tiny, vae, 8), (time.perf_counter() - began) / 60)
                save_state(run / "preview_state.pt", tiny, optimizers, generator, step + 1)
    return tiny


def agreement_psnr(tiny: TinyVAE, vae: WanVAE, count: int, seed: int = 10_000) -> float:
    """Mean PSNR in dB (peak to peak 2) of what both decode from the latents of `count` clips not trained on."""
    generator, total = Generator().manual_seed(seed), 0.0
    for _ in range(count):
        latents = vae.encode(sample_batch(generator, 1, side=LATENT_SIDE * vae.spec.spatial_stride)[0])
        total += 10 * math.log10(4 / (tiny.decode(latents) - vae.decode(latents)).square().mean().item())
    return total / count


def _examples(vae: WanVAE, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Raw latents of so many clips and what `vae` makes of them."""
    generator = Generator().manual_seed(seed + 1)
    side = LATENT_SIDE * vae.spec.spatial_stride
    latents = [vae.encode(sample_batch(generator, _GROUP, side=side)[0]) for _ in range(count // _GROUP)]
    return torch.cat(latents), torch.cat([vae.decode(group).half() for group in latents])


def _loss(tiny: TinyVAE, latents: Tensor, pixels: Tensor, generator: Generator) -> Tensor:
    stats = LatentStats.of(tiny.spec)
    normal = stats.normalise(latents)
    noisy = normal + LATENT_NOISE * torch.randn(normal.shape, generator=generator)
    missing = -pixels.shape[2] % tiny.spec.temporal_stride
    padded = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
    with torch.autocast("cpu", torch.bfloat16):
        error = tiny.decode_piece(stats.restore(noisy), Stream(whole=True)).float() - pixels
        encoded = stats.normalise(tiny.encode_piece(padded, Stream(whole=True)).float())
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + (encoded - normal).square().mean()
