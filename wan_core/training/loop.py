"""The training loop that the nano transformers share: what decides a run, steps, weight average, state and log."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .flow_matching import LogitNormalTimesteps
from .optimizer import Optimizers, learning_rate_factor
from .runs import RunLog, load_state, save_state

# Parameters that AdamW trains: embeddings, first and last layers. Muon takes the other matrices.
_ADAM_NAMES = ("token_embedding", "pos_embedding", "cls_embedding", "modulation", "patch_embedding", "head.head",
               "time_embedding.0", "text_embedding.0")


@dataclass(frozen=True)
class NanoTraining:
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


def train(name: str, model: nn.Module, trained: nn.Module, loss: Callable[[Generator], Tensor], options: NanoTraining,
          run: Path) -> nn.Module:
    """Train the part `trained` of `model` on `loss(generator)`; returns the weight average of `model`.

    State and log are the files `name`_state.pt and `name`.csv in the folder `run`; a run there goes on.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.average))
    both = nn.ModuleDict({"model": model, "average": average})
    optimizers = Optimizers(trained, muon_lr=options.muon_lr, adam_lr=options.adam_lr, adam_names=_ADAM_NAMES)
    generator = Generator().manual_seed(options.seed + 2)
    start = load_state(run / f"{name}_state.pt", both, optimizers, generator)
    with RunLog(run / f"{name}.csv", ("step", "loss", "minutes"), start) as record:
        began, total = time.perf_counter(), 0.0
        for step in range(start, options.steps):
            value = loss(generator)
            value.backward()
            optimizers.step(learning_rate_factor(step / options.steps))
            average.update_parameters(model)
            total += value.item()
            if (step + 1) % 100 == 0:
                record.add(step + 1, total / 100, (time.perf_counter() - began) / 60)
                total = 0.0
            if (step + 1) % 500 == 0 or step + 1 == options.steps:
                save_state(run / f"{name}_state.pt", both, optimizers, generator, step + 1)
    return average.module


def noise_like(latents: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of the shape of `latents` from the run's generator."""
    return torch.randn(latents.shape, generator=generator)
