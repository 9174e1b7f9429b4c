"""Checkpoint files for tests: the nano architectures with random weights, and huge files of zeros that take no room."""

import json
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_core.dit import VaceTransformer, WanTransformer
from wan_core.presets import CLIP_VISION, TEXT_ENCODERS, TRANSFORMERS, VAES, TransformerSpec
from wan_core.text import UMT5Encoder
from wan_core.training.nano_tokenizer import train_tokenizer
from wan_core.training.shapes import all_prompts
from wan_core.vae import WanVAE
from wan_core.vision import CLIPVision
from wan_core.weights import save_weights

# One of each type that a file's tensors tell completely: one head of 128 channels, as in no released model.
SMALL = {
    "t2v": TransformerSpec(model_type="t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=4, text_dim=96),
    # As Wan 2.2 I2V: channels and no CLIP features.
    "i2v": TransformerSpec(model_type="i2v", dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=96, in_dim=36),
    "ti2v": TransformerSpec(model_type="ti2v", dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=96, in_dim=48,
                            out_dim=48),
    "vace": TransformerSpec(model_type="vace", dim=128, ffn_dim=64, num_heads=1, num_layers=4, text_dim=96,
                            vace_layers=(0, 2), vace_in_dim=96),
}
CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def save_module(path: Path, module: nn.Module, **extra: Tensor) -> Path:
    """Write a module's weights, and tensors beside them, and return the path."""
    save_weights(path, {**module.state_dict(), **extra})
    return path


def write_transformer(path: Path, seed: int = 0, spec: TransformerSpec = TRANSFORMERS["nano_t2v"]) -> Path:
    torch.manual_seed(seed)
    return save_module(path, (VaceTransformer if spec.vace_layers else WanTransformer)(spec))


def write_halves(model: Path, module: Path, spec: TransformerSpec, seed: int = 0) -> dict[str, Tensor]:
    """Write a VACE transformer as a text-to-video model and a VACE module; returns all its tensors."""
    torch.manual_seed(seed)
    tensors = VaceTransformer(spec).state_dict()
    for path, is_vace in ((model, False), (module, True)):
        save_weights(path, {name: tensor for name, tensor in tensors.items() if name.startswith("vace_") == is_vace})
    return tensors


def write_vae(path: Path, seed: int = 0, name: str = "nano_vae") -> Path:
    torch.manual_seed(seed)
    return save_module(path, WanVAE(VAES[name]))


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
