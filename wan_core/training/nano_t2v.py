"""Train the nano text-to-video transformer with its text encoder, and a high/low-noise expert pair from it.

The single model and the text encoder learn together, from latents that are computed once and captions that are worded
anew each time a clip is seen; one caption in ten is empty, so that guidance has an unconditional branch. The experts
begin as copies of the single model and go on in their own range of noise only, with the text encoder frozen (so one
text encoder serves all three), as Wan 2.2 splits its two experts at `boundary`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..dit import ModelInputs, WanTransformer
from ..presets import TEXT_ENCODERS, TRANSFORMERS, VAES
from ..text import Tokenizer, UMT5Encoder
from ..vae import LatentStats, WanVAE
from .flow_matching import LogitNormalTimesteps, flow_matching_loss
from .optimizer import Optimizers, learning_rate_factor
from .runs import RunLog, load_state, save_state
from .shapes import WORDINGS, Scene, caption, held_out, render, sample_scene

log = logging.getLogger(__name__)

# Captions end long before this; shorter than the model's 512 so that training batches stay small.
CAPTION_TOKENS = 24


@dataclass(frozen=True)
class T2VTraining:
    """Everything that decides the result of a training run."""

    steps: int
    clips: int = 4096
    batch: int = 32
    seed: int = 0
    muon_lr: float = 1.5e-3
    adam_lr: float = 2e-3
    caption_dropout: float = 0.1
    average: float = 0.998
    timesteps: LogitNormalTimesteps = LogitNormalTimesteps(mean=0.3, std=1.2, shift=3.0)


class TextToVideo(nn.Module):
    """The text encoder and the transformer as one trainable module."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = UMT5Encoder(TEXT_ENCODERS["nano_umt5"])
        self.transformer = WanTransformer(TRANSFORMERS["nano_t2v"])
        self.text_encoder.reset_parameters()
        self.transformer.init_weights()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        context = self.text_encoder(ids, mask) * mask.unsqueeze(-1)
        return self.transformer(ModelInputs(noisy, timesteps, self.transformer.prepare_text(context)))


class Clips:
    """Latents of rendered scenes, with freshly worded captions. Latents are cached in a file beside the run."""

    def __init__(self, vae: WanVAE, tokenizer: Tokenizer, options: T2VTraining, cache: Path) -> None:
        generator = torch.Generator().manual_seed(options.seed + 1)
        self._scenes = [sample_scene(generator) for _ in range(options.clips)]
        self._tokenizer = tokenizer
        self._dropout = options.caption_dropout
        if cache.exists():
            self._latents = torch.load(cache, weights_only=True)
        else:
            stats = LatentStats.of(VAES["nano_vae"])
            groups = [self._scenes[i:i + 8] for i in range(0, len(self._scenes), 8)]
            self._latents = torch.cat([stats.normalise(vae.encode(render(group))).half() for group in groups])
            torch.save(self._latents, cache)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [count, 16, 5, 8, 8], token ids and mask [count, tokens]."""
        index = torch.randint(0, len(self._scenes), (count,), generator=generator)
        words = torch.rand(count, 2, generator=generator).tolist()
        captions = ["" if drop < self._dropout else _reword(self._scenes[i], draw)
                    for i, (drop, draw) in zip(index.tolist(), words)]
        ids, mask = self._tokenizer.encode(captions, CAPTION_TOKENS)
        used = int(mask.sum(1).max())
        return self._latents[index].float(), ids[:, :used], mask[:, :used]


def train_t2v(options: T2VTraining, clips: Clips, run: Path) -> TextToVideo:
    """Train transformer and text encoder from nothing; returns their weight average. A run in `run` is continued."""
    torch.manual_seed(options.seed)
    return _train(TextToVideo(), lambda model: model, options, clips, run, "t2v")


def train_expert(name: str, base: TextToVideo, options: T2VTraining, clips: Clips, run: Path) -> TextToVideo:
    """Continue the transformer of `base` in the noise range of `options.timesteps`, the text encoder frozen."""
    model = TextToVideo()
    model.load_state_dict(base.state_dict())
    model.text_encoder.requires_grad_(False)
    return _train(model, lambda model: model.transformer, options, clips, run, name)


def expert_options(options: T2VTraining, boundary: float, *, high: bool) -> T2VTraining:
    """`options` with the noise range of one expert, as sigmas; the ranges overlap a little where the models meet."""
    limits = {"low": boundary - 0.05} if high else {"high": boundary + 0.05}
    return replace(options, timesteps=replace(options.timesteps, **limits))


def _train(model: TextToVideo, trained: Callable[[TextToVideo], nn.Module], options: T2VTraining, clips: Clips,
           run: Path, name: str) -> TextToVideo:
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(
        options.average))
    both = nn.ModuleDict({"model": model, "average": average})
    optimizers = Optimizers(trained(model), muon_lr=options.muon_lr, adam_lr=options.adam_lr,
                            adam_names=("token_embedding", "pos_embedding", "modulation", "patch_embedding",
                                        "head.head", "time_embedding.0", "text_embedding.0"))
    generator = torch.Generator().manual_seed(options.seed + 2)
    start = load_state(run / f"{name}_state.pt", both, optimizers, generator)
    with RunLog(run / f"{name}.csv", ("step", "loss", "minutes"), start) as record:
        began, total = time.perf_counter(), 0.0
        for step in range(start, options.steps):
            latents, ids, mask = clips.draw(options.batch, generator)
            sigmas, weights = options.timesteps.sample(options.batch, generator)
            noise = torch.randn(latents.shape, generator=generator)
            loss = flow_matching_loss(lambda noisy, timesteps: model(noisy, timesteps, ids, mask),
                                      latents, noise, sigmas, weights)
            loss.backward()
            optimizers.step(learning_rate_factor(step / options.steps))
            average.update_parameters(model)
            total += loss.item()
            if (step + 1) % 100 == 0:
                record.add(step + 1, total / 100, (time.perf_counter() - began) / 60)
                total = 0.0
            if (step + 1) % 500 == 0 or step + 1 == options.steps:
                save_state(run / f"{name}_state.pt", both, optimizers, generator, step + 1)
    return average.module


def _reword(scene: Scene, draw: float) -> str:
    """The scene's caption in a random wording that is not held out."""
    first = int(draw * len(WORDINGS))
    for offset in range(len(WORDINGS)):
        candidate = replace(scene, wording=(first + offset) % len(WORDINGS))
        if not held_out(candidate):
            return caption(candidate)
    raise ValueError(f"every wording of {scene.combination} is held out; it must not be trained on.")
