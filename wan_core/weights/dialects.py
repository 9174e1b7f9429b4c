"""Key names of repackaged checkpoints, translated to the official ones.

One literal table per dialect, `{}` standing for a block's number. A name that a table does not have is kept, so that
loading reports it as unexpected instead of dropping it.
"""
import re
from collections.abc import Iterable

# transformers' UMT5EncoderModel, the layout of the text encoder files repackaged for ComfyUI.
UMT5_TRANSFORMERS = {
    "shared.weight": "token_embedding.weight",
    "encoder.block.{}.layer.0.layer_norm.weight": "blocks.{}.norm1.weight",
    "encoder.block.{}.layer.0.SelfAttention.q.weight": "blocks.{}.attn.q.weight",
    "encoder.block.{}.layer.0.SelfAttention.k.weight": "blocks.{}.attn.k.weight",
    "encoder.block.{}.layer.0.SelfAttention.v.weight": "blocks.{}.attn.v.weight",
    "encoder.block.{}.layer.0.SelfAttention.o.weight": "blocks.{}.attn.o.weight",
    "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight": "blocks.{}.pos_embedding.embedding.weight",
    "encoder.block.{}.layer.1.layer_norm.weight": "blocks.{}.norm2.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": "blocks.{}.ffn.gate.0.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": "blocks.{}.ffn.fc1.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight": "blocks.{}.ffn.fc2.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
}

# The token embedding once more: a file may hold it under either name or both.
UMT5_ALIAS = "encoder.embed_tokens.weight"

_NUMBER = re.compile(r"\.(\d+)\.")


def official_umt5_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the official name of each tensor of a transformers-layout UMT5 file to its name in the file."""
    mapping = {}
    for name in names:
        number = _NUMBER.search(name)
        pattern = _NUMBER.sub(".{}.", name, count=1) if number else name
        official = UMT5_TRANSFORMERS.get(pattern)
        mapping[official.replace("{}", number[1] if number else "") if official else name] = name
    alias = mapping.pop(UMT5_ALIAS, None)
    return mapping if alias is None else {"token_embedding.weight": alias} | mapping
