"""Which kind of layer a tensor belongs to, by its official name: the rows of reports about files."""
import re

# In the order of a report's rows; the first pattern that is found counts.
_KINDS = {
    "self_attn": re.compile(r"^blocks\.\d+\.self_attn\.(?!norm)"),
    "cross_attn": re.compile(r"^blocks\.\d+\.cross_attn\.(?!norm)"),
    "attention": re.compile(r"^(blocks|transformer)\.\d+\.attn\."),
    "ffn": re.compile(r"^(blocks|transformer)\.\d+\.(ffn|mlp)\."),
    "vace": re.compile(r"^vace_"),
    "encoder": re.compile(r"^encoder\."),
    "decoder": re.compile(r"^decoder\."),
    "modulation": re.compile(r"modulation$"),
    "norms": re.compile(r"(^|[._])norm"),
    "embeddings": re.compile(r"embedding|^img_emb\.|^time_projection\."),
    "head": re.compile(r"^head(\.|$)"),
    "other": re.compile(""),
}

LAYER_KINDS = tuple(_KINDS)


def layer_kind(name: str) -> str:
    """One of `LAYER_KINDS`; 'other' for what has no row of its own."""
    return next(kind for kind, pattern in _KINDS.items() if pattern.search(name))
