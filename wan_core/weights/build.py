"""Builds the module of a spec without memory, and lists the tensors that its checkpoint must have."""
from collections.abc import Callable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..presets import CLIPVisionSpec, TextEncoderSpec, TinyVAESpec, TransformerSpec, VAESpec
from .errors import LoadError

Spec = TransformerSpec | VAESpec | TinyVAESpec | TextEncoderSpec | CLIPVisionSpec


def can_run(spec: Spec) -> bool:
    """Whether this version has the module of an architecture; it recognises more of them than it runs."""
    match spec:
        case TransformerSpec():
            return spec.model_type in ("t2v", "i2v", "flf2v", "ti2v", "vace")
        case VAESpec():
            return spec.kind in ("wan21", "wan22")
        case _:
            return isinstance(spec, TinyVAESpec | TextEncoderSpec | CLIPVisionSpec)


def build_module(spec: Spec) -> nn.Module:
    """The module of `spec` on the meta device: shapes and names, no numbers. Fill it with `load_module`.

    Raises LoadError for an architecture that this version cannot run, ValueError for one that contradicts itself.
    """
    if not can_run(spec):
        raise LoadError(f"this version cannot run {spec} yet; it runs text-, image- and first-last-frame-to-video "
                        "transformers, VACE, Wan VAEs, UMT5 text encoders and CLIP vision models")
    # Imported here so that looking into a file imports no more than its own model's room.
    match spec:
        case TransformerSpec(model_type="vace"):
            from ..dit.vace import VaceTransformer as module_class
        case TransformerSpec():
            from ..dit.model import WanTransformer as module_class
        case VAESpec():
            from ..vae.model import WanVAE as module_class
        case TinyVAESpec():
            from ..vae.tiny import TinyVAE as module_class
        case TextEncoderSpec():
            from ..text.umt5 import UMT5Encoder as module_class
        case CLIPVisionSpec():
            from ..vision.clip import CLIPVision as module_class
    with torch.device("meta"), _Uninitialised():
        return module_class(spec)


class _Uninitialised(TorchFunctionMode):
    """Skips the functions of torch.nn.init. On the meta device they do nothing, and the first ones take a second."""

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def expected_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `spec` holds; allocates nothing. Raises as `build_module`."""
    return {name: tuple(tensor.shape) for name, tensor in build_module(spec).state_dict().items()}
