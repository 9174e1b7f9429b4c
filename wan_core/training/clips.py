"""Captioned latents of rendered scenes: what the nano transformers learn from.

Latents are computed once and cached in a file; captions are worded anew each time a clip is seen, and some are left
empty, so that guidance has an unconditional branch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..text import Tokenizer, UMT5Encoder
from ..vae import LatentStats, WanVAE
from .loop import NanoTraining
from .nano_vae import LATENT_SIDE
from .shapes import WORDINGS, Scene, caption, held_out, render, sample_scene

# Captions end long before this; shorter than the model's 512 so that training batches stay small.
CAPTION_TOKENS = 24

_BATCH = 8


@dataclass(frozen=True)
class Captioned:
    """A batch: which clips, their latents [B, C, T, H, W] (normalised), token ids and mask [B, tokens]."""

    index: Tensor
    latents: Tensor
    ids: Tensor
    mask: Tensor


class Clips:
    """Scenes with their latents, which are kept in the file `cache` beside the run."""

    def __init__(self, vae: WanVAE, tokenizer: Tokenizer, options: NanoTraining, cache: Path,
                 change: Callable[[Scene], Scene] = lambda scene: scene) -> None:
        """`change` makes of each scene that is drawn the one that is shown."""
        generator = Generator().manual_seed(options.seed + 1)
        self.scenes = [change(sample_scene(generator)) for _ in range(options.clips)]
        self._tokenizer = tokenizer
        self._dropout = options.caption_dropout
        if cache.exists():
            self._latents = torch.load(cache, weights_only=True)
        else:
            stats = LatentStats.of(vae.spec)
            groups = [self.scenes[i:i + _BATCH] for i in range(0, len(self.scenes), _BATCH)]
            side = LATENT_SIDE * vae.spec.spatial_stride
            self._latents = torch.cat([stats.normalise(vae.encode(render(group, side=side))).half()
                                       for group in groups])
            torch.save(self._latents, cache)

    def draw(self, count: int, generator: Generator, among: Tensor | None = None) -> Captioned:
        """`count` clips at random, of those with the indices `among` if given."""
        drawn = torch.randint(0, len(self.scenes) if among is None else len(among), (count,), generator=generator)
        index = drawn if among is None else among[drawn]
        words = torch.rand(count, 2, generator=generator).tolist()
        captions = ["" if drop < self._dropout else _reword(self.scenes[i], draw)
                    for i, (drop, draw) in zip(index.tolist(), words)]
        ids, mask = self._tokenizer.encode(captions, CAPTION_TOKENS)
        used = int(mask.sum(1).max())
        return Captioned(index, self._latents[index].float(), ids[:, :used], mask[:, :used])


@torch.no_grad()
def embed(text_encoder: UMT5Encoder, batch: Captioned) -> Tensor:
    """Embeddings [B, N, dim] of a batch's captions, zero past their ends."""
    return text_encoder(batch.ids, batch.mask) * batch.mask.unsqueeze(-1)


def _reword(scene: Scene, draw: float) -> str:
    """The scene's caption in a random wording that is not held out."""
    first = int(draw * len(WORDINGS))
    for offset in range(len(WORDINGS)):
        candidate = replace(scene, wording=(first + offset) % len(WORDINGS))
        if not held_out(candidate):
            return caption(candidate)
    raise ValueError(f"every wording of {scene.combination} is held out; it must not be trained on.")
