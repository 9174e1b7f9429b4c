"""Key names of repackaged checkpoints, translated to the official ones: one file of literal tables a model kind.

A dialect is told by `presets.foreign_dialect`; `official_names` gives the translation. A name that no table has is
kept, so that loading reports it as unexpected instead of dropping it.
"""
from collections.abc import Iterable

from .clip import CLIP_TRANSFORMERS, CLIP_UNUSED, official_clip_names
from .transformer_diffusers import TRANSFORMER_DIFFUSERS, official_transformer_names
from .umt5 import UMT5_ALIAS, UMT5_GGUF, UMT5_TRANSFORMERS, official_umt5_names
from .vae_diffusers import VAE_DIFFUSERS, official_vae_names

__all__ = [
    "CLIP_TRANSFORMERS", "CLIP_UNUSED", "TRANSFORMER_DIFFUSERS", "UMT5_ALIAS", "UMT5_GGUF", "UMT5_TRANSFORMERS",
    "VAE_DIFFUSERS", "official_clip_names", "official_names", "official_transformer_names", "official_umt5_names",
    "official_vae_names",
]


def official_names(names: Iterable[str], kind: str, dialect: str) -> dict[str, str]:
    """Maps the official name of each tensor of a file to its name in the file; kinds are those of `Recognition`.

    Raises ValueError, with a phrase that completes "the file ...", where two names stand for the same tensor.
    """
    match kind, dialect:
        case "transformer", "diffusers":
            return official_transformer_names(names)
        case "vae", "diffusers":
            return official_vae_names(names)
        case "text_encoder", "transformers" | "gguf":
            return official_umt5_names(names, dialect)
    raise ValueError(f"holds a {kind} under the names of {dialect}, for which there is no table")
