"""Train the nano image-to-video transformer with its CLIP-type vision encoder.

The transformer begins with blocks of the trained text-to-video model; the vision encoder begins from nothing and learns
with it. Of the clips most have their first frame given, some the first and the last (the vision encoder then sees both
pictures), a few several first frames or the last one only, so that one model serves all of these tasks.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from ..conditioning import ImageChannels, encode_known_frames
from ..dit import ModelInputs, WanTransformer
from ..presets import CLIP_VISION, TRANSFORMERS
from ..text import UMT5Encoder
from ..vae import LatentStats, WanVAE
from ..vision import CLIPVision, preprocess
from .begin import begin_from
from .clips import Captioned, Clips, embed
from .flow_matching import flow_matching_loss
from .loop import NanoTraining, noise_like, train
from .shapes import FRAMES, Scene, render

# Blocks of the text-to-video model that become those of this shallower one.
_BLOCKS = (0, 1, 3, 5)

# (start frames, end frames) -> share of the clips.
_KNOWN = {(1, 0): 0.6, (1, 1): 0.25, (5, 0): 0.1, (0, 1): 0.05}
_TWO_PICTURES = 0.25


class ImageToVideo(nn.Module):
    """The vision encoder and the transformer as one trainable module."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = CLIPVision(CLIP_VISION["nano_clip"])
        self.transformer = WanTransformer(TRANSFORMERS["nano_i2v"])
        self.transformer.init_weights()

    @torch.no_grad()
    def begin_from(self, t2v: Mapping[str, Tensor]) -> None:
        """Take over the weights of a text-to-video transformer; new channels and image attention start at zero."""
        begin_from(self.transformer, t2v, _BLOCKS)
        patches, video = self.transformer.patch_embedding.weight.zero_(), t2v["patch_embedding.weight"]
        patches[:, :video.shape[1]] = video
        for name, parameter in self.transformer.named_parameters():
            if ".v_img." in name:
                parameter.zero_()

    def forward(self, noisy: Tensor, timesteps: Tensor, channels: Tensor, pictures: Tensor, context: Tensor) -> Tensor:
        """`pictures` [B, P, 3, S, S] preprocessed, `context` [B, N, text_dim]; the others as the transformer's."""
        tokens = torch.cat([self.vision(picture) for picture in pictures.unbind(1)], 1)
        transformer = self.transformer
        return transformer(ModelInputs(torch.cat([noisy, channels], 1), timesteps, transformer.prepare_text(context),
                                       transformer.prepare_image(tokens)))


class KnownClips:
    """For each clip the conditioning channels, and the first and last frame as the vision encoder sees them."""

    def __init__(self, vae: WanVAE, clips: Clips, options: NanoTraining, cache: Path) -> None:
        generator = Generator().manual_seed(options.seed + 3)
        shares = torch.tensor(list(_KNOWN.values()))
        self.kind = torch.multinomial(shares, len(clips.scenes), replacement=True, generator=generator)
        if not cache.exists():
            kinds = list(_KNOWN)
            rows = [_encode(vae, scene, *kinds[kind]) for scene, kind in zip(clips.scenes, self.kind.tolist())]
            torch.save({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, cache)
        stored = torch.load(cache, weights_only=True)
        self._channels, self._pictures = stored["channels"], stored["pictures"]
        two = torch.tensor([start > 0 and end > 0 for start, end in _KNOWN])[self.kind]
        self.groups = {False: (~two).nonzero().flatten(), True: two.nonzero().flatten()}

    def of(self, batch: Captioned, *, two: bool) -> tuple[Tensor, Tensor]:
        """Channels [B, 20, T, H, W] and preprocessed pictures [B, 1 or 2, 3, S, S] of a batch."""
        size = CLIP_VISION["nano_clip"].image_size
        pictures = self._pictures[batch.index][:, :2 if two else 1]
        seen = preprocess(pictures.flatten(0, 1).float() / 127.5 - 1, size)
        return self._channels[batch.index].float(), seen.unflatten(0, pictures.shape[:2])


def _encode(vae: WanVAE, scene: Scene, start: int, end: int) -> dict[str, Tensor]:
    frames = render([scene])[0].movedim(1, 0)
    known = encode_known_frames(vae.encode, FRAMES, frames[:start] if start else None, frames[-end:] if end else None)
    shown = frames[[0, -1] if start else [-1, -1]]
    return {"channels": ImageChannels.of(known, LatentStats.of(vae.spec)).channels.half(),
            "pictures": ((shown + 1) * 127.5).round().to(torch.uint8)[None]}


def train_i2v(options: NanoTraining, clips: Clips, known: KnownClips, text_encoder: UMT5Encoder,
              t2v: Mapping[str, Tensor], run: Path) -> ImageToVideo:
    """Train both modules, the text encoder frozen; returns their weight average. A run in `run` is continued."""
    torch.manual_seed(options.seed)
    model = ImageToVideo()
    model.begin_from(t2v)

    def loss(generator: Generator) -> Tensor:
        two = torch.rand((), generator=generator).item() < _TWO_PICTURES
        batch = clips.draw(options.batch, generator, known.groups[two])
        channels, pictures = known.of(batch, two=two)
        context = embed(text_encoder, batch)
        sigmas, weights = options.timesteps.sample(options.batch, generator)
        return flow_matching_loss(lambda noisy, timesteps: model(noisy, timesteps, channels, pictures, context),
                                  batch.latents, noise_like(batch.latents, generator), sigmas, weights)

    return train("i2v", model, model, loss, options, run)
