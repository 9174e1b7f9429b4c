"""Train the nano VAEs, small ones of the Wan 2.1 and the Wan 2.2 type, on clips of moving shapes.

A whole picture is 8x8 latent pixels: 64x64 pixels for the 2.1 type, 128x128 for the 2.2 type.

The loss is L1 + 2 * L2 on pixels plus L1 on their spatial gradients (edges are all there is to see), a small pull of
the latents towards zero, and noise on the latents, so that the decoder forgives a transformer's small errors. Half of
the steps show four crops of half the side, half one whole picture, all of them full-length clips: a VAE trained on
shorter clips drifts in colour past the length it knows. The last quarter is whole pictures only.

Afterwards the latents' mean and deviation are folded into the 1x1x1 convolutions `conv1` and `conv2`, so that raw
latents have the statistics of the released VAE of their type: whatever knows that latent format can use the nano VAE.

The 48 channels of the 2.2 type are more than these clips need: 16 principal components hold 98.5 % of the latents'
variance and all but 0.1 dB of the picture. The first 16 channels become mixtures of these, the others repeat them, and
the decoder reads none of those. A transformer must carry the noise of every channel that it denoises through its
width; a narrow one can do that for 16 channels of four pixels, and not for 48.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..presets import VAES, VAESpec
from ..vae import WanVAE
from ..vae.layers import Stream
from .optimizer import Optimizers, learning_rate_factor
from .runs import RunLog, load_state, save_state
from .shapes import sample_batch

log = logging.getLogger(__name__)

LATENT_SIDE = 8
LATENT_NOISE = 0.08
EVALUATION_SEED = 10_000


@dataclass(frozen=True)
class VAETraining:
    """Everything that decides the result of a training run. `vae` names one of the nano VAEs; `channels`: how many of
    its latent channels are to hold the picture, None for all."""

    vae: str = "nano_vae"
    steps: int = 6000
    seed: int = 0
    muon_lr: float = 1.5e-3
    adam_lr: float = 2e-3
    whole_from: float = 0.75
    channels: int | None = None


VAE_TRAININGS = MappingProxyType({"vae": VAETraining(), "vae22": VAETraining(vae="nano_vae22", channels=16)})


def train_vae(options: VAETraining, run: Path) -> WanVAE:
    """Train and return the VAE with folded statistics.

    State and log, named as `options.vae` without "nano_", are in the folder `run`; a run there goes on.
    """
    torch.manual_seed(options.seed)
    spec, name = VAES[options.vae], options.vae.removeprefix("nano_")
    vae = WanVAE(spec)
    optimizers = Optimizers(vae, muon_lr=options.muon_lr, adam_lr=options.adam_lr,
                            adam_names=("encoder.conv1", "decoder.head.2", "conv2.", "to_qkv.bias"))
    generator = torch.Generator().manual_seed(options.seed)
    start = load_state(run / f"{name}_state.pt", vae, optimizers, generator)
    with RunLog(run / f"{name}.csv", ("step", "loss", "psnr_db", "minutes"), start) as record:
        began = time.perf_counter()
        for step in range(start, options.steps):
            progress = step / options.steps
            clips = _batch(generator, spec, whole=step % 2 == 1 or progress >= options.whole_from)
            loss = _loss(vae, clips, generator)
            loss.backward()
            optimizers.step(learning_rate_factor(progress))
            if (step + 1) % 100 == 0 or step + 1 == options.steps:
                psnr = reconstruction_psnr(vae, 4)
                record.add(step + 1, loss.item(), psnr, (time.perf_counter() - began) / 60)
                save_state(run / f"{name}_state.pt", vae, optimizers, generator, step + 1)
    fold_statistics(vae, spec, *latent_statistics(vae))
    if options.channels is not None:
        concentrate(vae, options.channels)
    return vae


@torch.no_grad()
def reconstruction_psnr(vae: WanVAE, count: int, seed: int = EVALUATION_SEED) -> float:
    """Mean PSNR in dB (peak to peak 2) of `count` whole clips that are not from the training stream."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(count):
        clip, _ = sample_batch(generator, 1, side=LATENT_SIDE * vae.spec.spatial_stride)
        error = (vae.decode(vae.encode(clip)) - clip).square().mean().item()
        total += 10 * math.log10(4 / error)
    return total / count


@torch.no_grad()
def latent_statistics(vae: WanVAE, count: int = 256, seed: int = EVALUATION_SEED + 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the latents of `count` clips."""
    latents = _latents(vae, count, seed)
    return latents.mean(1), latents.std(1)


def _latents(vae: WanVAE, count: int, seed: int) -> Tensor:
    """Raw latents of `count` clips, [channels, positions]."""
    generator = torch.Generator().manual_seed(seed)
    side = LATENT_SIDE * vae.spec.spatial_stride
    latents = [vae.encode(sample_batch(generator, 8, side=side)[0]) for _ in range(count // 8)]
    return torch.cat(latents).movedim(1, 0).flatten(1)


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


@torch.no_grad()
def concentrate(vae: WanVAE, channels: int, count: int = 256, seed: int = EVALUATION_SEED + 1) -> None:
    """Change `conv1` and `conv2` so that the first `channels` (a power of 2) of the latents hold what there is to see.

    They are mixtures of as many principal components, each with an equal part of all, so that large components stay
    large to whatever is trained on them. All channels come out with the mean and deviation of the VAE's spec, the
    further ones as repetitions of the first; the decoder reads the first only.
    """
    mean, std = torch.tensor(vae.spec.mean), torch.tensor(vae.spec.std)
    latents = (_latents(vae, count, seed) - mean[:, None]) / std[:, None]
    centre = latents.mean(1)
    variances, axes = torch.linalg.eigh(torch.cov(latents.double()))
    deviation, axes = variances.flip(0)[:channels].mean().sqrt().float(), axes.flip(1)[:, :channels].float()
    mixed = axes @ _hadamard(channels)
    z = vae.spec.z_dim
    encode = (mixed / deviation).T[torch.arange(z) % channels]
    decode = torch.zeros(z, z)
    decode[:, :channels] = mixed * deviation
    out, into = vae.conv1, vae.conv2
    # Raw latents r stand for x = (r - mean) / std; new ones for encode (x - centre), and back for decode y + centre.
    weight, bias = out.weight[:z].flatten(1), out.bias[:z]
    turn = std[:, None] * encode / std
    out.bias[:z] = turn @ (bias - mean - std * centre) + mean
    out.weight[:z] = (turn @ weight).view_as(out.weight[:z])
    back = std[:, None] * decode / std
    weight = into.weight.flatten(1)
    into.bias += weight @ (mean + std * centre - back @ mean)
    into.weight.copy_((weight @ back).view_as(into.weight))


def _hadamard(size: int) -> Tensor:
    """Sylvester's orthogonal matrix whose entries all have one magnitude; `size` is a power of 2."""
    matrix, pair = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(matrix, pair)
    return matrix


def channels_read(vae: WanVAE) -> Tensor:
    """Which latent channels the decoder reads, [channels] bool."""
    return vae.conv2.weight.flatten(1).abs().amax(0) > 0


def _batch(generator: torch.Generator, spec: VAESpec, whole: bool) -> Tensor:
    side = LATENT_SIDE * spec.spatial_stride
    clips, _ = sample_batch(generator, 1 if whole else 4, side=side)
    if whole:
        return clips
    crop = side // 2
    top, left = torch.randint(0, side - crop + 1, (2,), generator=generator).tolist()
    return clips[..., top:top + crop, left:left + crop]


def _loss(vae: WanVAE, clips: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode_piece(clips, Stream(whole=True)).float()
        noisy = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        pixels = vae.decode_piece(noisy, Stream(whole=True)).float()
    error = pixels - clips
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + 1e-3 * latents.square().mean()
