"""Train the nano VACE module: blocks beside the trained text-to-video transformer, which stays as it is.

The blocks begin as copies of the transformer's, with hints that are zero, as the official ones did. Four tasks, all on
the same clips: filling a box (inpainting), following a control video (the shape in white on black), going on from the
first frames (extension), and showing a reference picture's shape.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..conditioning import VaceCondition, encode_control
from ..dit import ModelInputs, VaceControl, VaceTransformer
from ..presets import TRANSFORMERS
from ..text import UMT5Encoder
from ..vae import LatentStats, WanVAE
from .clips import Captioned, Clips, embed
from .flow_matching import flow_matching_loss
from .loop import NanoTraining, noise_like, train
from .shapes import FRAMES, SIZE, Scene, coverage, render

# Task -> share of the clips.
_TASKS = {"inpaint": 0.45, "control": 0.25, "extend": 0.12, "reference": 0.18}

# Share of the boxes to be filled that cover all of the shape's way; the others lie anywhere.
_COVERING = 0.7
_BOX_SIDES = (24, 52)


class ControlledClips:
    """For each clip a task, its control latents, and the reference's latent where the task has one."""

    def __init__(self, vae: WanVAE, clips: Clips, options: NanoTraining, cache: Path) -> None:
        generator = Generator().manual_seed(options.seed + 4)
        tasks = torch.multinomial(torch.tensor(list(_TASKS.values())), len(clips.scenes), replacement=True,
                                  generator=generator)
        names = list(_TASKS)
        with_reference = tasks == names.index("reference")
        self.groups = {False: (~with_reference).nonzero().flatten(), True: with_reference.nonzero().flatten()}
        if not cache.exists():
            rows = [_encode(vae, scene, names[task], generator) for scene, task in zip(clips.scenes, tasks.tolist())]
            torch.save(rows, cache)
        self._controls = torch.load(cache, weights_only=True)

    def of(self, batch: Captioned) -> tuple[Tensor, Tensor]:
        """Controls [B, 96, R + T, H, W], and the clips' latents with the reference in front [B, C, R + T, H, W]."""
        controls = torch.stack([self._controls[index] for index in batch.index.tolist()]).float()
        references = controls[:, :batch.latents.shape[1], :controls.shape[2] - batch.latents.shape[2]]
        return controls, torch.cat([references, batch.latents], 2)


def _encode(vae: WanVAE, scene: Scene, task: str, generator: Generator) -> Tensor:
    """The control of one clip [96, R + T, H, W], in half precision."""
    clip, stats = render([scene])[0], LatentStats.of(vae.spec)
    video, mask, references = torch.zeros_like(clip), torch.ones(1, *clip.shape[1:]), []
    if task == "inpaint":
        mask = box_mask(scene, generator)
        # What is to be filled is officially shown as grey.
        video = clip * (1 - mask)
    elif task == "control":
        video = (coverage([scene])[0] * 2 - 1).expand_as(clip)
    elif task == "extend":
        kept = int(torch.randint(1, FRAMES // 2 + 2, (), generator=generator))
        video[:, :kept], mask[:, :kept] = clip[:, :kept], 0
    else:
        # The shape alone, in the middle of a white picture.
        still = replace(scene, x0=SIZE / 2, y0=SIZE / 2, speed=0.0, background="white")
        references = [render([still])[0, :, :1]]
    latents = encode_control(vae.encode, stats, vae.spec.spatial_stride, video, mask, references)
    return VaceCondition.of(latents, stats).control[0].half()


def box_mask(scene: Scene, generator: Generator) -> Tensor:
    """A mask [1, F, H, W] that is 1 in a box: mostly one around all of the shape's way, else one anywhere."""
    draws = torch.rand(5, generator=generator).tolist()
    if draws[0] < _COVERING:
        margin = 2 + 4 * draws[1]
        left, top, right, bottom = scene.way()
        left, top, right, bottom = left - margin, top - margin, right + margin, bottom + margin
    else:
        width, height = (_BOX_SIDES[0] + draw * (_BOX_SIDES[1] - _BOX_SIDES[0]) for draw in draws[1:3])
        left, top = draws[3] * (SIZE - width), draws[4] * (SIZE - height)
        right, bottom = left + width, top + height
    mask = torch.zeros(1, FRAMES, SIZE, SIZE)
    mask[..., max(0, math.floor(top)):math.ceil(bottom), max(0, math.floor(left)):math.ceil(right)] = 1
    return mask


def new_module(t2v: Mapping[str, Tensor]) -> VaceTransformer:
    """The transformer of `t2v`, frozen, with VACE blocks that begin as copies of its blocks and give no hints yet."""
    model = VaceTransformer(TRANSFORMERS["nano_vace"])
    model.init_weights()
    own = model.state_dict()
    for name, target in own.items():
        if name in t2v:
            target.copy_(t2v[name])
    for index, layer in enumerate(model.spec.vace_layers):
        block = model.vace_blocks[index]
        for name, target in block.state_dict().items():
            if f"blocks.{layer}.{name}" in t2v:
                target.copy_(t2v[f"blocks.{layer}.{name}"])
        for projection in (block.before_proj, block.after_proj):
            if projection is not None:
                torch.nn.init.zeros_(projection.weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vace"))
    return model


def train_vace(options: NanoTraining, clips: Clips, controlled: ControlledClips, text_encoder: UMT5Encoder,
               t2v: Mapping[str, Tensor], run: Path) -> dict[str, Tensor]:
    """Train the VACE blocks; returns the tensors of the module. A run in `run` is continued."""
    torch.manual_seed(options.seed)
    model = new_module(t2v)
    share = _TASKS["reference"]

    def loss(generator: Generator) -> Tensor:
        reference = torch.rand((), generator=generator).item() < share
        batch = clips.draw(options.batch, generator, controlled.groups[reference])
        controls, latents = controlled.of(batch)
        text = model.prepare_text(embed(text_encoder, batch))
        sigmas, weights = options.timesteps.sample(options.batch, generator)
        return flow_matching_loss(
            lambda noisy, timesteps: model(ModelInputs(noisy, timesteps, text, controls=(VaceControl(controls),))),
            latents, noise_like(latents, generator), sigmas, weights)

    average = train("vace", model, _Trained(model), loss, options, run)
    return {name: tensor for name, tensor in average.state_dict().items() if name.startswith("vace")}


class _Trained(torch.nn.Module):
    """The parts of the model that learn, under their own names."""

    def __init__(self, model: VaceTransformer) -> None:
        super().__init__()
        self.vace_patch_embedding = model.vace_patch_embedding
        self.vace_blocks = model.vace_blocks
