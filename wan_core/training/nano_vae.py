"""Train the nano VAE: a Wan 2.1 VAE of base width 16 on clips of moving shapes.

The loss is L1 + 2 * L2 on pixels plus L1 on their spatial gradients (edges are all there is to see), a small pull of
the latents towards zero, and noise on the latents, so that the decoder forgives a transformer's small errors. Half of
the steps show four 32x32 crops, half one whole picture, all of them full-length clips: a VAE trained on shorter clips
drifts in colour past the length it knows. The last quarter is whole pictures only.

Afterwards the latents' mean and deviation are folded into the 1x1x1 convolutions `conv1` and `conv2`, so that raw
latents have the statistics of the released Wan 2.1 VAE: whatever knows that latent format can use the nano VAE.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..presets import VAES, VAESpec
from ..vae import WanVAE
from ..vae.layers import Stream
from .optimizer import Optimizers, learning_rate_factor
from .runs import RunLog, load_state, save_state
from .shapes import SIZE, sample_batch

log = logging.getLogger(__name__)

CROP = 32
LATENT_NOISE = 0.08
EVALUATION_SEED = 10_000


@dataclass(frozen=True)
class VAETraining:
    """Everything that decides the result of a training run."""

    steps: int = 6000
    seed: int = 0
    muon_lr: float = 1.5e-3
    adam_lr: float = 2e-3
    whole_from: float = 0.75


def train_vae(options: VAETraining, run: Path) -> WanVAE:
    """Train and return the VAE with folded statistics. State and log are in the folder `run`; a run there goes on."""
    torch.manual_seed(options.seed)
    spec = VAES["nano_vae"]
    vae = WanVAE(spec)
    optimizers = Optimizers(vae, muon_lr=options.muon_lr, adam_lr=options.adam_lr,
                            adam_names=("encoder.conv1", "decoder.head.2", "conv2.", "to_qkv.bias"))
    generator = torch.Generator().manual_seed(options.seed)
    start = load_state(run / "vae_state.pt", vae, optimizers, generator)
    with RunLog(run / "vae.csv", ("step", "loss", "psnr_db", "minutes"), start) as record:
        began = time.perf_counter()
        for step in range(start, options.steps):
            progress = step / options.steps
            clips = _batch(generator, whole=step % 2 == 1 or progress >= options.whole_from)
            loss = _loss(vae, clips, generator)
            loss.backward()
            optimizers.step(learning_rate_factor(progress))
            if (step + 1) % 100 == 0 or step + 1 == options.steps:
                psnr = reconstruction_psnr(vae, 4)
                record.add(step + 1, loss.item(), psnr, (time.perf_counter() - began) / 60)
                save_state(run / "vae_state.pt", vae, optimizers, generator, step + 1)
    fold_statistics(vae, spec, *latent_statistics(vae))
    return vae


@torch.no_grad()
def reconstruction_psnr(vae: WanVAE, count: int, seed: int = EVALUATION_SEED) -> float:
    """Mean PSNR in dB (peak to peak 2) of `count` whole clips that are not from the training stream."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(count):
        clip, _ = sample_batch(generator, 1)
        error = (vae.decode(vae.encode(clip)) - clip).square().mean().item()
        total += 10 * math.log10(4 / error)
    return total / count


@torch.no_grad()
def latent_statistics(vae: WanVAE, count: int = 256, seed: int = EVALUATION_SEED + 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the latents of `count` clips."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.cat([vae.encode(sample_batch(generator, 8)[0]) for _ in range(count // 8)])
    return latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))


@torch.no_grad()
def fold_statistics(vae: WanVAE, spec: VAESpec, mean: Tensor, std: Tensor) -> None:
    """Change `conv1` and `conv2` so that latents of the given statistics come out with those of `spec`."""
    target_mean, target_std = torch.tensor(spec.mean), torch.tensor(spec.std)
    gain = target_std / std
    out, into = vae.conv1, vae.conv2
    z = spec.z_dim
    out.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    out.bias[:z] = (out.bias[:z] - mean) * gain + target_mean
    into.bias += into.weight.flatten(1) @ (mean - target_mean / gain)
    into.weight /= gain.view(1, -1, 1, 1, 1)


def _batch(generator: torch.Generator, whole: bool) -> Tensor:
    clips, _ = sample_batch(generator, 1 if whole else 4)
    if whole:
        return clips
    top, left = torch.randint(0, SIZE - CROP + 1, (2,), generator=generator).tolist()
    return clips[..., top:top + CROP, left:left + CROP]


def _loss(vae: WanVAE, clips: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode_piece(clips, Stream(whole=True)).float()
        noisy = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        pixels = vae.decode_piece(noisy, Stream(whole=True)).float()
    error = pixels - clips
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + 1e-3 * latents.square().mean()
