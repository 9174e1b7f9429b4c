"""LoRA files for tests: the layers of tiny transformers, random adapters for them, and the ways to write keys."""

from pathlib import Path

import torch
from torch import Tensor

from tests.small_models import SMALL
from wan_core.presets import TransformerSpec
from wan_core.weights import expected_shapes, save_weights

# As Wan 2.1 I2V: channels and CLIP features.
CLIP_SPEC = TransformerSpec(model_type="i2v", dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=96, in_dim=36,
                            image_dim=32, image_tokens=257)
SHAPES = {name: expected_shapes(spec) for name, spec in SMALL.items()} | {"clip": expected_shapes(CLIP_SPEC)}

# Module -> shape of its weight, of everything that trainers put a LoRA on.
LINEAR = {name: {key.removesuffix(".weight"): shape for key, shape in shapes.items()
                 if key.endswith(".weight") and len(shape) == 2} for name, shapes in SHAPES.items()}

# How a factor's key ends: (down, up).
PAIRS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "bare": (".lora_A", ".lora_B"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "old": (".lora.down.weight", ".lora.up.weight"),
    "older": ("_lora.down.weight", "_lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}

PREFIXES = ("", "diffusion_model.", "model.diffusion_model.", "model.", "pipe.dit.", "unet.", "base_model.model.")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.1


def low_rank(shape: tuple[int, ...], rank: int = 3) -> tuple[Tensor, Tensor]:
    """Random factors (down, up) for a weight of `shape` [out, in]."""
    return random(rank, shape[1]), random(shape[0], rank)


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_weights(path, tensors, metadata)
    return path


def low_rank_file(path: Path, modules: dict[str, tuple[int, ...]], prefix: str = "diffusion_model.",
                  pair: str = "kohya", **metadata: str) -> Path:
    """A file with a random LoRA of rank 3 on each of `modules`."""
    tensors = {}
    for module, shape in modules.items():
        for ending, factor in zip(PAIRS[pair], low_rank(shape), strict=True):
            tensors[prefix + module + ending] = factor
    return write(path, tensors, **metadata)
