"""Wan VAEs under the names of diffusers' AutoencoderKLWan, in both of its layouts.

The official code numbers the layers of a level through, resampling after the residual layers; diffusers keeps the
resampling apart. In the VAE of Wan 2.1 the official numbers run on from level to level (and so do diffusers' in the
encoder), in that of Wan 2.2 every level begins anew. So numbers of layers are computed; all other names are in tables.
"""
import re
from collections.abc import Iterable

from .names import renaming, translate

VAE_DIFFUSERS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_in": "decoder.conv1",
    "decoder.norm_out": "decoder.head.0",
    "decoder.conv_out": "decoder.head.2",
}

# Layers that stand between the levels' ones and the outermost.
_MIDDLE = {
    "encoder.mid_block.resnets.0": "encoder.middle.0",
    "encoder.mid_block.attentions.0": "encoder.middle.1",
    "encoder.mid_block.resnets.1": "encoder.middle.2",
    "decoder.mid_block.resnets.0": "decoder.middle.0",
    "decoder.mid_block.attentions.0": "decoder.middle.1",
    "decoder.mid_block.resnets.1": "decoder.middle.2",
}

# The parts of residual, attention and resampling layers.
VAE_LAYER_DIFFUSERS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
    "norm": "norm",
    "to_qkv": "to_qkv",
    "proj": "proj",
    "resample.1": "resample.1",
    "time_conv": "time_conv",
}

_STAGES = {"encoder.down_blocks": "encoder.downsamples", "decoder.up_blocks": "decoder.upsamples"}
# A layer's path and the part of it.
_LAYER = re.compile(r"((?:en|de)coder\.(?:mid_block\.\w+\.\d{1,6}|(?:down|up)_blocks\.\d{1,6}"
                    r"(?:\.resnets\.\d{1,6}|\.(?:down|up)sampler(?:s\.0)?)?))\.(.+)")
_LEVEL_LAYER = re.compile(r"((?:en|de)coder\.(?:down|up)_blocks)\.(\d+)(?:\.(resnets)\.(\d+)|\.(\w+?)(?:\.0)?)?")


def official_vae_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the official name of each tensor of a diffusers VAE to its name in the file; raises as `official_names`."""
    names = list(names)
    layers = _layers({match[1] for match in map(_LAYER.fullmatch, names) if match})

    def translated(name: str) -> str | None:
        match = _LAYER.fullmatch(name)
        if match is None:
            return translate(name, VAE_DIFFUSERS)
        layer, part = layers.get(match[1]), translate(match[2], VAE_LAYER_DIFFUSERS)
        return f"{layer}.{part}" if layer and part else None

    return renaming(names, translated)


def _layers(paths: Iterable[str]) -> dict[str, str]:
    """The official path of each of these layers; those that cannot be are left out."""
    found = {path: match for path in paths if (match := _LEVEL_LAYER.fullmatch(path))}
    # Only the encoder of Wan 2.1 has layers that belong to no level; a decoder by itself has `upsamplers`.
    is_flat = any(match[3] is None and match[5] is None or match[5] == "upsamplers" for match in found.values())
    layers = dict(_MIDDLE)
    for stage, official in _STAGES.items():
        of_stage = {path: match for path, match in found.items() if match[1] == stage}
        per_level = 1 + max((int(match[4]) for match in of_stage.values() if match[3]), default=0)
        for path, match in of_stage.items():
            level = int(match[2])
            if match[3] is None and match[5] is None:
                layers[path] = f"{official}.{level}"
                continue
            index = int(match[4]) if match[3] else per_level
            layers[path] = (f"{official}.{level * (per_level + 1) + index}" if is_flat else
                            f"{official}.{level}.{official.split('.')[1]}.{index}")
    return layers
