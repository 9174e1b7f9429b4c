"""Train a LoRA for a transformer: low-rank factors on its blocks' linear layers, everything else as it is.

The factors are attached as any LoRA is when a video is made, so what is learned is what runs later. Defaults follow the
recipe that Wan LoRAs are published with (DiffSynth-Studio, `examples/wanvideo/model_training`): layers q, k, v, o and
both of the feed-forward network, `up` beginning at zero.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..dit import ModelInputs, WanTransformer
from ..text import UMT5Encoder
from ..weights.lora import LowRank, Target
from ..weights.lora.attach import Attachment
from .clips import Clips, embed
from .flow_matching import LogitNormalTimesteps, UniformTimesteps, flow_matching_loss
from .loop import noise_like

_LAYERS = re.compile(r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]$|blocks\.\d+\.ffn\.[02]$")


@dataclass(frozen=True)
class LoraTraining:
    """Everything that decides the result, beside clips and model. `alpha` over `rank` scales what is learned."""

    steps: int
    rank: int = 32
    alpha: float = 32.0
    batch: int = 1
    seed: int = 0
    learning_rate: float = 1e-4
    timesteps: LogitNormalTimesteps | UniformTimesteps = UniformTimesteps()


def train_lora(model: WanTransformer, clips: Clips, text_encoder: UMT5Encoder, options: LoraTraining,
               on_step: Callable[[int, float], None] = lambda step, loss: None) -> dict[str, Tensor]:
    """The tensors of the trained LoRA under native names, bfloat16; `model` comes back as it was.

    `on_step(step, loss)` is called after each step and may raise to stop.
    """
    generator = Generator().manual_seed(options.seed)
    adapters = {Target(name, "weight"): _factors(module.weight, options, generator)
                for name, module in model.named_modules() if _LAYERS.search(name)}
    factors = [factor for adapter in adapters.values() for factor in (adapter.down, adapter.up)]
    optimizer = torch.optim.AdamW(factors, lr=options.learning_rate, weight_decay=0.0)
    attachment = Attachment(model, [adapters])
    try:
        attachment.set([1.0])
        with torch.enable_grad():
            for step in range(options.steps):
                loss = _loss(model, clips, text_encoder, options, generator)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(factors, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                on_step(step, loss.item())
    finally:
        attachment.detach()
    return _named(adapters, options)


def _factors(weight: Tensor, options: LoraTraining, generator: Generator) -> LowRank:
    down = torch.empty(options.rank, weight.shape[1])
    torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up = torch.zeros(weight.shape[0], options.rank)
    return LowRank(down.requires_grad_(True), up.requires_grad_(True), scale=options.alpha / options.rank)


def _loss(model: WanTransformer, clips: Clips, text_encoder: UMT5Encoder, options: LoraTraining,
          generator: Generator) -> Tensor:
    batch = clips.draw(options.batch, generator)
    text = model.prepare_text(embed(text_encoder, batch))
    sigmas, weights = options.timesteps.sample(options.batch, generator)
    return flow_matching_loss(lambda noisy, timesteps: model(ModelInputs(noisy, timesteps, text)), batch.latents,
                              noise_like(batch.latents, generator), sigmas, weights)


def _named(adapters: dict[Target, LowRank], options: LoraTraining) -> dict[str, Tensor]:
    tensors = {}
    for target, adapter in adapters.items():
        name = f"diffusion_model.{target.module}"
        tensors[f"{name}.lora_A.weight"] = adapter.down.detach().bfloat16()
        tensors[f"{name}.lora_B.weight"] = adapter.up.detach().bfloat16()
        tensors[f"{name}.alpha"] = torch.tensor(options.alpha)
    return tensors
