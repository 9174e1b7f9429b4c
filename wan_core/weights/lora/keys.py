"""Reads the key names of LoRA files: which layer of the transformer a tensor belongs to, and what it is there.

Trainers write the same adapter under many names: `diffusion_model.blocks.0.self_attn.q.lora_A.weight`,
`transformer.blocks.0.attn1.to_q.lora.down.weight`, `lora_unet_blocks_0_self_attn_q.lora_down.weight`. A key is read in
three steps, each with a literal table: the ending says the role, the beginning names the packager, and what remains is
looked up with all its dots as underscores, so that dotted, underscored and half-dotted names are one case. That loses
nothing, because no two layers of a Wan transformer have the same name without dots.
"""
import re
from typing import NamedTuple

# Ending -> role. 'down' and 'up' are the two factors of a LoRA; the names of LyCORIS' factors are its own.
ENDINGS = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_A": "down", ".lora_A.default": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_B": "up", ".lora_B.default": "up",
    ".lora_down.weight": "down", ".lora_down.default.weight": "down", ".lora_down": "down",
    ".lora_up.weight": "up", ".lora_up.default.weight": "up", ".lora_up": "up",
    ".lora.down.weight": "down", ".lora.down": "down", "_lora.down.weight": "down", "_lora.down": "down",
    ".lora.up.weight": "up", ".lora.up": "up", "_lora.up.weight": "up", "_lora.up": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.down": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.up": "up",
    ".lora_B.bias": "up_bias", ".lora_B.default.bias": "up_bias", ".lora_up.bias": "up_bias",
    ".lora_mid.weight": "mid", ".lora_mid": "mid",
    ".alpha": "alpha",
    ".dora_scale": "magnitude", ".magnitude": "magnitude",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude", ".lora_magnitude_vector.default.weight": "magnitude",
    ".reshape_weight": "reshape",
    ".lokr_w1": "lokr_w1", ".lokr_w1_a": "lokr_w1_a", ".lokr_w1_b": "lokr_w1_b", ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a", ".lokr_w2_b": "lokr_w2_b", ".lokr_t2": "lokr_t2",
    ".hada_w1_a": "hada_w1_a", ".hada_w1_b": "hada_w1_b", ".hada_w2_a": "hada_w2_a", ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1", ".hada_t2": "hada_t2",
    ".diff": "diff", ".w_norm": "diff", ".diff_b": "bias_diff", ".b_norm": "bias_diff", ".diff_m": "modulation_diff",
    ".set_weight": "set",
}

# What packagers put in front, alone or one after the other.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "base_model.model.", "pipe.dit.", "unet.", "model.",
            "transformer_2.", "transformer.", "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_LOW_NOISE = "transformer_2."

# Layers of a block, of both kinds of blocks: official name -> what diffusers calls it. Its second norm is the third of
# the official code, whose own second has no weights.
BLOCK_LAYERS = {
    "modulation": ("scale_shift_table",),
    "self_attn.q": ("attn1.to_q",),
    "self_attn.k": ("attn1.to_k",),
    "self_attn.v": ("attn1.to_v",),
    "self_attn.o": ("attn1.to_out.0", "attn1.to_out"),
    "self_attn.norm_q": ("attn1.norm_q",),
    "self_attn.norm_k": ("attn1.norm_k",),
    "cross_attn.q": ("attn2.to_q",),
    "cross_attn.k": ("attn2.to_k",),
    "cross_attn.v": ("attn2.to_v",),
    "cross_attn.o": ("attn2.to_out.0", "attn2.to_out"),
    "cross_attn.norm_q": ("attn2.norm_q",),
    "cross_attn.norm_k": ("attn2.norm_k",),
    "cross_attn.k_img": ("attn2.add_k_proj",),
    "cross_attn.v_img": ("attn2.add_v_proj",),
    "cross_attn.norm_k_img": ("attn2.norm_added_k",),
    "norm3": ("norm2",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
    # VACE blocks only.
    "before_proj": ("proj_in",),
    "after_proj": ("proj_out",),
}

# Layers outside the blocks.
OTHER_LAYERS = {
    "patch_embedding": (),
    "vace_patch_embedding": (),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "img_emb.proj.0": ("condition_embedder.image_embedder.norm1",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "img_emb.proj.4": ("condition_embedder.image_embedder.norm2",),
    "img_emb.emb_pos": ("condition_embedder.image_embedder.pos_embed",),
    "head": (),
    "head.head": ("proj_out",),
    "head.modulation": ("scale_shift_table",),
}

# Names above that are parameters themselves and not layers with a weight.
_PARAMETERS = ("modulation", "emb_pos")

_BLOCK = re.compile(r"(vace_)?blocks_([0-9]{1,4})(?:_(.+))?")


class Target(NamedTuple):
    """A tensor of the transformer by its official name: `module` 'blocks.0.self_attn.q', `parameter` 'weight'.

    Parameters are 'weight', 'bias', 'modulation' (of a block or the head) and 'emb_pos'.
    """

    module: str
    parameter: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"


class Key(NamedTuple):
    """A key of a LoRA file, read. `module` is the official name where the tables have it, else as `written`.

    `role` is a value of `ENDINGS`. `written` is the layer's name in the file without ending and prefix. `low_noise`:
    whether the prefix says that the tensor is for the low-noise expert of a pair.
    """

    module: str
    role: str
    written: str
    low_noise: bool


def read_key(name: str) -> Key | None:
    """The parts of a key, or None where its ending is none of an adapter."""
    # The longest one counts: '.lora_A' is also the beginning of '.lora_A.default'.
    ending = max((end for end in ENDINGS if name.endswith(end)), key=len, default=None)
    if ending is None:
        return None
    written, low_noise = name.removesuffix(ending), False
    while prefix := next((p for p in PREFIXES if written.startswith(p)), None):
        written, low_noise = written.removeprefix(prefix), low_noise or prefix == _LOW_NOISE
    # Old diffusers files name the attention processor between the attention and its layer.
    written = written.replace(".processor.", ".")
    return Key(official_module(written), ENDINGS[ending], written, low_noise)


def official_module(written: str) -> str:
    """The official name of a layer in any spelling of the tables; a name that they do not have comes back as it is."""
    flat = _flat(written)
    if block := _BLOCK.fullmatch(flat):
        layer = _BLOCK_NAMES.get(block[3] or "")
        return written if layer is None else f"{block[1] or ''}blocks.{int(block[2])}{layer and '.' + layer}"
    return _OTHER_NAMES.get(flat, written)


def target_of(module: str, parameter: str) -> Target:
    """The tensor that an adapter of `module` is for, where `parameter` is its usual one.

    A full difference may name a modulation itself as if it were a layer.
    """
    owner, _, leaf = module.rpartition(".")
    return Target(owner, leaf) if leaf in _PARAMETERS else Target(module, parameter)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _by_flat_name(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {_flat(name): official for official, others in table.items() for name in (official, *others)}


# '' is a block itself: its modulation is written as a difference of the block.
_BLOCK_NAMES = {"": ""} | _by_flat_name(BLOCK_LAYERS)
_OTHER_NAMES = _by_flat_name(OTHER_LAYERS)
