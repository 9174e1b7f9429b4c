"""Runs that take a few milliseconds: transformers of two blocks, latents of eight tokens, three steps."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.small_models import SMALL, write_transformer
from tests.weights.lora.lora_files import random, write
from wan_core import open_lora
from wan_core.conditioning import KnownLatents, TextCondition
from wan_core.memory import OneAtATime
from wan_core.models import Model, Part
from wan_core.pipeline import sample
from wan_core.presets import PRESETS
from wan_core.sampling import Conditions, Guidance, denoise, make_schedule

SPEC = replace(SMALL["t2v"], num_layers=2)
SHAPE = (1, 16, 2, 4, 4)
GUIDANCE = Guidance(3.0, 2.0)
MASK = torch.ones(1, 1, *SHAPE[2:])
MASK[:, :, 0, :2] = 0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_tiny(folder: Path) -> Path:
    """Write two experts of random weights and a LoRA into `folder`: factors, a norm and the modulation."""
    for seed, name in enumerate(("high", "low"), 1):
        write_transformer(folder / f"{name}.safetensors", seed, SPEC)
    write(folder / "lora.safetensors", {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": random(4, 128),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": random(128, 4),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": random(128),
        "diffusion_model.blocks.1.modulation.diff": random(1, 6, 128)})
    return folder


def tiny_model(folder: Path, kind: str, **options: object) -> Model:
    """A 'single' model, one with a 'lora' for a part of the run, or a 'pair' of experts, of `write_tiny`'s files."""
    high, low = (Part.open(folder / f"{name}.safetensors", "transformer") for name in ("high", "low"))
    preset = PRESETS["nano_t2v_a" if kind == "pair" else "nano_t2v"]
    model = Model(high if kind == "pair" else low, low, preset, OneAtATime("cpu"), **options)
    return model.with_lora(open_lora(folder / "lora.safetensors"), 0.7, end=0.5) if kind == "lora" else model


def conditions(prompt: int = 2, known: KnownLatents | None = None) -> Conditions:
    return Conditions([TextCondition(randn(1, 5, SPEC.text_dim, seed=prompt))],
                      [TextCondition(randn(1, 3, SPEC.text_dim, seed=3))], known)


def tiny_denoise(experts: object, steps: int = 3, solver: str = "unipc", shape: Sequence[int] = SHAPE,
                 masked: bool = False, within: AbstractContextManager = nullcontext(), **options: object) -> Tensor:
    """The loop alone, guided, `within` a context; of an expert pair both experts work."""
    noise, schedule = randn(*shape), make_schedule(solver, steps, 3.0)
    known = conditions(known=KnownLatents(randn(*shape, seed=8), MASK, noise) if masked else None)
    with within:
        return denoise(experts, noise, schedule, known, GUIDANCE, solver=solver, **options)


def tiny_run(model: Model, steps: int = 3, solver: str = "unipc", shape: Sequence[int] = SHAPE, seed: int = 0,
             prompt: int = 2, shift: float = 3.0, guidance: Guidance = GUIDANCE, masked: bool = False,
             step_seed: int = 0, **options: object) -> Tensor:
    """The same from raw latents to raw latents; `step_seed` is of the noise that a solver adds."""
    latents = randn(*shape, seed=8) if masked else torch.zeros(*shape)
    return sample(model, latents, make_schedule(solver, steps, shift), conditions(prompt), guidance,
                  noise=randn(*shape, seed=seed), mask=MASK if masked else None, solver=solver,
                  seed=step_seed, **options)
