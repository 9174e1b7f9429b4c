"""Train the nano text-to-video transformer with its text encoder, and a high/low-noise expert pair from it.

The single model and the text encoder learn together. The experts begin as copies of the single model and go on in their
own range of noise only, with the text encoder frozen (so one text encoder serves all three), as Wan 2.2 splits its two
experts at `boundary`.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from ..dit import ModelInputs, WanTransformer
from ..presets import TEXT_ENCODERS, TRANSFORMERS
from ..text import UMT5Encoder
from .clips import Clips
from .flow_matching import flow_matching_loss
from .loop import NanoTraining, noise_like, train


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


def train_t2v(options: NanoTraining, clips: Clips, run: Path) -> TextToVideo:
    """Train transformer and text encoder from nothing; returns their weight average. A run in `run` is continued."""
    torch.manual_seed(options.seed)
    model = TextToVideo()
    return _train("t2v", model, model, options, clips, run)


def train_expert(name: str, base: TextToVideo, options: NanoTraining, clips: Clips, run: Path) -> TextToVideo:
    """Continue the transformer of `base` in the noise range of `options.timesteps`, the text encoder frozen."""
    model = TextToVideo()
    model.load_state_dict(base.state_dict())
    model.text_encoder.requires_grad_(False)
    return _train(name, model, model.transformer, options, clips, run)


def expert_options(options: NanoTraining, boundary: float, *, high: bool) -> NanoTraining:
    """`options` with the noise range of one expert, as sigmas; the ranges overlap a little where the models meet."""
    limits = {"low": boundary - 0.05} if high else {"high": boundary + 0.05}
    return replace(options, timesteps=replace(options.timesteps, **limits))


def _train(name: str, model: TextToVideo, trained: nn.Module, options: NanoTraining, clips: Clips,
           run: Path) -> TextToVideo:
    def loss(generator: Generator) -> Tensor:
        batch = clips.draw(options.batch, generator)
        sigmas, weights = options.timesteps.sample(options.batch, generator)
        return flow_matching_loss(lambda noisy, timesteps: model(noisy, timesteps, batch.ids, batch.mask),
                                  batch.latents, noise_like(batch.latents, generator), sigmas, weights)

    return train(name, model, trained, loss, options, run)
