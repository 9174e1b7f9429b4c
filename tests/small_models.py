"""Checkpoint files for tests: the nano architectures with random weights, and huge files of zeros that take no room."""

import json
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_core.dit import WanTransformer
from wan_core.presets import CLIP_VISION, TEXT_ENCODERS, TRANSFORMERS, VAES
from wan_core.text import UMT5Encoder
from wan_core.training.nano_tokenizer import train_tokenizer
from wan_core.training.shapes import all_prompts
from wan_core.vae import WanVAE
from wan_core.vision import CLIPVision
from wan_core.weights import save_weights

CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def save_module(path: Path, module: nn.Module, **extra: Tensor) -> Path:
    """Write a module's weights, and tensors beside them, and return the path."""
    save_weights(path, {**module.state_dict(), **extra})
    return path


def write_transformer(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return save_module(path, WanTransformer(TRANSFORMERS["nano_t2v"]))


def write_vae(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return save_module(path, WanVAE(VAES["nano_vae"]))


def write_clip_vision(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return save_module(path, CLIPVision(CLIP_VISION["nano_clip"]))


def write_text_encoder(path: Path, *, tokenizer: bool = True) -> Path:
    torch.manual_seed(0)
    spec = TEXT_ENCODERS["nano_umt5"]
    model = train_tokenizer(islice(all_prompts(), 500), spec.vocab_size)
    extra = {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)} if tokenizer else {}
    return save_module(path, UMT5Encoder(spec), **extra)


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A safetensors file of zeros that are not stored (a hole): of any size, and written at once."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
