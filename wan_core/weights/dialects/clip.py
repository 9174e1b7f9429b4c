"""CLIP vision models under the names of the transformers library, and the image half of whole CLIP files."""
import re
from collections.abc import Iterable

from torch import Tensor

from ..tensor_file import Joined

# transformers' CLIPVisionModelWithProjection, the layout of the clip_vision files repackaged for ComfyUI. Names that
# lead to the same official one are joined in this order.
CLIP_TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "cls_embedding",
    "vision_model.embeddings.patch_embedding.weight": "patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight": "pos_embedding",
    "vision_model.pre_layrnorm.weight": "pre_norm.weight",
    "vision_model.pre_layrnorm.bias": "pre_norm.bias",
    "vision_model.encoder.layers.{}.layer_norm1.weight": "transformer.{}.norm1.weight",
    "vision_model.encoder.layers.{}.layer_norm1.bias": "transformer.{}.norm1.bias",
    "vision_model.encoder.layers.{}.self_attn.q_proj.weight": "transformer.{}.attn.to_qkv.weight",
    "vision_model.encoder.layers.{}.self_attn.k_proj.weight": "transformer.{}.attn.to_qkv.weight",
    "vision_model.encoder.layers.{}.self_attn.v_proj.weight": "transformer.{}.attn.to_qkv.weight",
    "vision_model.encoder.layers.{}.self_attn.q_proj.bias": "transformer.{}.attn.to_qkv.bias",
    "vision_model.encoder.layers.{}.self_attn.k_proj.bias": "transformer.{}.attn.to_qkv.bias",
    "vision_model.encoder.layers.{}.self_attn.v_proj.bias": "transformer.{}.attn.to_qkv.bias",
    "vision_model.encoder.layers.{}.self_attn.out_proj.weight": "transformer.{}.attn.proj.weight",
    "vision_model.encoder.layers.{}.self_attn.out_proj.bias": "transformer.{}.attn.proj.bias",
    "vision_model.encoder.layers.{}.layer_norm2.weight": "transformer.{}.norm2.weight",
    "vision_model.encoder.layers.{}.layer_norm2.bias": "transformer.{}.norm2.bias",
    "vision_model.encoder.layers.{}.mlp.fc1.weight": "transformer.{}.mlp.0.weight",
    "vision_model.encoder.layers.{}.mlp.fc1.bias": "transformer.{}.mlp.0.bias",
    "vision_model.encoder.layers.{}.mlp.fc2.weight": "transformer.{}.mlp.2.weight",
    "vision_model.encoder.layers.{}.mlp.fc2.bias": "transformer.{}.mlp.2.bias",
    "vision_model.post_layernorm.weight": "post_norm.weight",
    "vision_model.post_layernorm.bias": "post_norm.bias",
    "visual_projection.weight": "head",
}

# Tensors whose axes differ, by their official names.
_LAYOUT = {
    "cls_embedding": lambda tensor: tensor.view(1, 1, -1),
    "pos_embedding": lambda tensor: tensor[None],
    "head": Tensor.t,
}

# What whole CLIP files hold beside the image half: the text half, the temperature of training, a table of 0, 1, 2 ...
CLIP_UNUSED = ("textual.", "log_scale", "text_model.", "text_projection.", "logit_scale",
               "vision_model.embeddings.position_ids")

_NUMBER = re.compile(r"\.(\d+)\.")


def official_clip_names(names: Iterable[str], dialect: str) -> dict[str, str | Joined]:
    """Maps the official name of each tensor of a CLIP file's image half to its name in the file, or how it is joined.

    `dialect`: 'official' (with or without the prefix `visual.`) or 'transformers'. The text half is left out.
    """
    names = [name for name in names if not name.startswith(CLIP_UNUSED)]
    if dialect == "official":
        return {name.removeprefix("visual."): name for name in names}
    blocks = dict.fromkeys(match[1] for match in map(_NUMBER.search, names) if match)
    sources: dict[str, list[str]] = {}
    for theirs, ours in CLIP_TRANSFORMERS.items():
        for block in blocks if "{}" in theirs else ("",):
            sources.setdefault(ours.replace("{}", block), []).append(theirs.replace("{}", block))
    present = set(names)
    # Where one of several is missing, the others keep their names, and the official one is reported as missing.
    mapping = {ours: Joined(tuple(theirs), _LAYOUT.get(ours)) for ours, theirs in sources.items()
               if present.issuperset(theirs)}
    used = {name for joined in mapping.values() for name in joined.names}
    return mapping | {name: name for name in names if name not in used}
