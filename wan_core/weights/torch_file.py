"""Reads PyTorch's own files (.pth, .pt, .bin): the table of weights, wherever in a training checkpoint it is.

They are opened with `weights_only=True`: they can hold tensors and no code.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import LoadError, first_few

# Names under which trainers put a model's table of weights, the one to take first. Where there are weights averaged
# over the training (EMA) beside the last ones, they are taken: they are what the authors of such checkpoints show and
# recommend. (Self-Forcing: demo.py reads 'generator_ema', and the README has inference.py read it; CausVid has only
# 'generator'. DiT's find_model, too, prefers 'ema'.) 'state_dict' is Lightning's, and what ComfyUI looks for first.
_TABLES = ("state_dict", "generator_ema", "ema", "generator", "module", "model")
_MAX_NESTING = 3

# What FSDP, activation checkpointing and torch.compile put into names; average tables of FSDP training keep them.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

logger = logging.getLogger(__name__)


def read_torch(path: Path, is_zip: bool) -> dict[str, Tensor]:
    """The weights of a PyTorch file, mapped where it is a zip archive.

    Raises LoadError where it is damaged, holds other objects than tensors, or no table of them.
    """
    # Old files cannot be mapped, and torch.load trusts a name that ends in .safetensors; both are read as a stream.
    mapped = is_zip and path.suffix != ".safetensors"
    try:
        with path.open("rb") as stream:
            content = torch.load(path if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
    # The unpickler runs over untrusted bytes and fails in as many ways as there are bytes.
    except Exception as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise LoadError(f"{path.name} holds Python objects other than tensors; it is refused, because such objects "
                            "can run code. Use a safetensors file of the model.") from error
        raise LoadError(f"{path.name} is damaged, truncated or no PyTorch file ({type(error).__name__}). "
                        "Download it again.") from error
    content = _unwrapped(path, content)
    entries = dict(content) if isinstance(content, Mapping) else {}
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(name, str) and _is_tensor(value)}
    if not tensors:
        found = first_few([str(name) for name in entries]) or type(content).__name__
        raise LoadError(f"{path.name} holds no table of tensors but: {found}. Choose a file of model weights.")
    hollow = [name for name, tensor in tensors.items() if tensor.is_meta]
    if hollow:
        raise LoadError(f"{path.name} holds shapes and no numbers: {first_few(hollow)}. Choose another file.")
    plain = {_plain(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise LoadError(f"{path.name} holds {len(tensors)} tensors, and only {len(plain)} have different names when "
                        f"{', '.join(_WRAPPERS)} are left out: it holds two copies of a model. Keep one.")
    return plain


def _unwrapped(path: Path, content: object) -> object:
    """The innermost table of weights, through at most _MAX_NESTING tables around it."""
    for _ in range(_MAX_NESTING):
        found = [name for name in _TABLES if isinstance(content, Mapping) and _holds_tensors(content.get(name))]
        # Beside weights a table of these names is something else; but 'state_dict' has never meant anything else.
        if not found or found[0] != "state_dict" and any(_is_weight(value) for value in content.values()):
            break
        if len(found) > 1:
            logger.info("%s holds the tables %s; %s is used", path.name, ", ".join(found), found[0])
        content = content[found[0]]
    return content


def _holds_tensors(table: object, depth: int = _MAX_NESTING) -> bool:
    """Whether it is a table of tensors, or has one below the known names."""
    if not isinstance(table, Mapping) or not depth:
        return False
    return any(map(_is_tensor, table.values())) or any(_holds_tensors(table.get(name), depth - 1) for name in _TABLES)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _is_weight(value: object) -> bool:
    """Trainers also keep counters and the state of a random generator, which are no weights."""
    return _is_tensor(value) and value.ndim > 0 and value.is_floating_point()


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
