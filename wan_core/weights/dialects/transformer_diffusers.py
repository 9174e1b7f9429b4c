"""Wan transformers under the names of diffusers: WanTransformer3DModel and WanVACETransformer3DModel."""
from collections.abc import Iterable

from .names import renaming, translate

# The layers of a block; those of a VACE block have the same names and two more.
_BLOCK = {
    "scale_shift_table": "modulation",
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    # Numbered by their order here, by their age in the official code. The other two have no weights.
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}

TRANSFORMER_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
    "vace_patch_embedding": "vace_patch_embedding",
    "vace_blocks.{}.proj_in": "vace_blocks.{}.before_proj",
    "vace_blocks.{}.proj_out": "vace_blocks.{}.after_proj",
    # By this one an Animate transformer is recognised, and refused.
    "face_adapter.{}.norm_k": "face_adapter.fuser_blocks.{}.k_norm",
    **{f"{blocks}.{{}}.{theirs}": f"{blocks}.{{}}.{ours}"
       for blocks in ("blocks", "vace_blocks") for theirs, ours in _BLOCK.items()},
}


def official_transformer_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the official name of each tensor of a diffusers transformer to its name in the file; raises as
    `official_names`."""
    return renaming(names, lambda name: translate(name, TRANSFORMER_DIFFUSERS))
