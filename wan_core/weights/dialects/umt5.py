"""UMT5 encoders under the names of the transformers library and of GGUF files (llama.cpp's T5)."""
from collections.abc import Iterable

from .names import renaming, translate

# transformers' UMT5EncoderModel, the layout of the text encoder files repackaged for ComfyUI.
UMT5_TRANSFORMERS = {
    "shared": "token_embedding",
    "encoder.block.{}.layer.0.layer_norm": "blocks.{}.norm1",
    "encoder.block.{}.layer.0.SelfAttention.q": "blocks.{}.attn.q",
    "encoder.block.{}.layer.0.SelfAttention.k": "blocks.{}.attn.k",
    "encoder.block.{}.layer.0.SelfAttention.v": "blocks.{}.attn.v",
    "encoder.block.{}.layer.0.SelfAttention.o": "blocks.{}.attn.o",
    "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias": "blocks.{}.pos_embedding.embedding",
    "encoder.block.{}.layer.1.layer_norm": "blocks.{}.norm2",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0": "blocks.{}.ffn.gate.0",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1": "blocks.{}.ffn.fc1",
    "encoder.block.{}.layer.1.DenseReluDense.wo": "blocks.{}.ffn.fc2",
    "encoder.final_layer_norm": "norm",
}

# The names of llama.cpp (gguf-py, MODEL_ARCH.T5ENCODER). `ffn_gate` is wi_0, the half that goes through the GELU, and
# `ffn_up` is wi_1.
UMT5_GGUF = {
    "token_embd": "token_embedding",
    "enc.blk.{}.attn_norm": "blocks.{}.norm1",
    "enc.blk.{}.attn_q": "blocks.{}.attn.q",
    "enc.blk.{}.attn_k": "blocks.{}.attn.k",
    "enc.blk.{}.attn_v": "blocks.{}.attn.v",
    "enc.blk.{}.attn_o": "blocks.{}.attn.o",
    "enc.blk.{}.attn_rel_b": "blocks.{}.pos_embedding.embedding",
    "enc.blk.{}.ffn_norm": "blocks.{}.norm2",
    "enc.blk.{}.ffn_gate": "blocks.{}.ffn.gate.0",
    "enc.blk.{}.ffn_up": "blocks.{}.ffn.fc1",
    "enc.blk.{}.ffn_down": "blocks.{}.ffn.fc2",
    "enc.output_norm": "norm",
}

# The token embedding once more: a file may hold it under either name or both.
UMT5_ALIAS = "encoder.embed_tokens.weight"

# The decoder and the word scores of a whole model, which an encoder has no use for.
_UNUSED = ("dec.", "output.", "decoder.", "lm_head.")


def official_umt5_names(names: Iterable[str], dialect: str = "transformers") -> dict[str, str]:
    """Maps the official name of each tensor of a UMT5 file to its name in the file.

    `dialect`: 'transformers' or 'gguf'. A decoder is left out. Raises as `official_names`.
    """
    table = UMT5_GGUF if dialect == "gguf" else UMT5_TRANSFORMERS
    mapping = renaming((name for name in names if not name.startswith(_UNUSED)), lambda name: translate(name, table))
    alias = mapping.pop(UMT5_ALIAS, None)
    return mapping if alias is None else {"token_embedding.weight": alias} | mapping
