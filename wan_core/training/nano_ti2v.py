"""Train the nano text-and-image-to-video transformer: one model for prompts alone and for prompts with a first frame.

As with the released TI2V 5B the first frame is neither a channel nor a token: it lies in the latent as it is, at
timestep 0, and the loss counts the other frames. A quarter of the clips have no known frame; a few have several.

Latent channels that the decoder does not read are hidden from the transformer, and its answer for them stays zero.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..dit import ModelInputs, WanTransformer
from ..presets import TRANSFORMERS
from ..text import UMT5Encoder
from .begin import begin_from
from .clips import Clips, embed
from .flow_matching import flow_matching_loss
from .loop import NanoTraining, noise_like, train

# Blocks of the text-to-video model that become those of this shallower one.
_BLOCKS = (0, 1, 3, 5)

# Share of the clips with no known latent frame, with one (the first frame), and with two (the first five).
_KNOWN = (0.25, 0.65, 0.1)


def train_ti2v(options: NanoTraining, clips: Clips, channels: Tensor, text_encoder: UMT5Encoder,
               t2v: Mapping[str, Tensor], run: Path) -> WanTransformer:
    """Train the transformer, the text encoder frozen; returns its weight average. A run in `run` is continued.

    `channels` [C] bool are those that the VAE's decoder reads.
    """
    torch.manual_seed(options.seed)
    model = WanTransformer(TRANSFORMERS["nano_ti2v"])
    model.init_weights()
    begin_from(model, t2v, _BLOCKS)
    # No gradient reaches what only ever sees zeros, so these columns stay zero.
    model.patch_embedding.weight.data[:, ~channels] = 0
    seen, shares = channels.view(-1, 1, 1, 1).float(), torch.tensor(_KNOWN)

    def loss(generator: Generator) -> Tensor:
        batch = clips.draw(options.batch, generator)
        text = model.prepare_text(embed(text_encoder, batch))
        count = torch.multinomial(shares, options.batch, replacement=True, generator=generator)
        known = torch.arange(batch.latents.shape[2]) < count[:, None]
        sigmas, weights = options.timesteps.sample(options.batch, generator)
        return flow_matching_loss(lambda noisy, timesteps: model(ModelInputs(noisy * seen, timesteps, text)),
                                  batch.latents, noise_like(batch.latents, generator), sigmas, weights, known, channels)

    return train("ti2v", model, model, loss, options, run)
