"""Builds the module of a spec without memory, and lists the tensors that its checkpoint must have."""
import torch
from torch import nn

from ..presets import CLIPVisionSpec, TextEncoderSpec, TransformerSpec, VAESpec
from .errors import LoadError

Spec = TransformerSpec | VAESpec | TextEncoderSpec | CLIPVisionSpec


def can_run(spec: Spec) -> bool:
    """Whether this version has the module of an architecture; it recognises more of them than it runs."""
    match spec:
        case TransformerSpec():
            return spec.model_type == "t2v"
        case VAESpec():
            return spec.kind == "wan21"
        case _:
            return isinstance(spec, TextEncoderSpec)


def build_module(spec: Spec) -> nn.Module:
    """The module of `spec` on the meta device: shapes and names, no numbers. Fill it with `load_module`.

    Raises LoadError for an architecture that this version cannot run, ValueError for one that contradicts itself.
    """
    if not can_run(spec):
        raise LoadError(f"this version cannot run {spec} yet; it runs text-to-video transformers, the Wan 2.1 VAE and "
                        "UMT5 text encoders")
    # Imported here so that looking into a file imports no more than its own model's room.
    match spec:
        case TransformerSpec():
            from ..dit.model import WanTransformer as module_class
        case VAESpec():
            from ..vae.model import WanVAE as module_class
        case TextEncoderSpec():
            from ..text.umt5 import UMT5Encoder as module_class
    with torch.device("meta"):
        return module_class(spec)


def expected_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `spec` holds; allocates nothing. Raises as `build_module`."""
    return {name: tuple(tensor.shape) for name, tensor in build_module(spec).state_dict().items()}
