"""Tells what a checkpoint is from the names and shapes of its tensors, never from its file name.

The tests are those by which the released files differ (the same that ComfyUI's model_detection relies on): a Wan
transformer has `head.modulation`, its branches each have one tensor that no other branch has, and all sizes can be read
off a few shapes. What shapes cannot tell (a T2V-14B file from an expert of T2V-A14B, 480P from 720P) is answered with
every candidate. Nothing here opens a file.
"""
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace

from .specs import CLIPVisionSpec, TextEncoderSpec, TinyVAESpec, TransformerSpec, VAESpec
from .tables import CLIP_VISION, PRESETS, TEXT_ENCODERS, TINY_VAES, TRANSFORMERS, VAES

Shapes = Mapping[str, tuple[int, ...]]
Spec = TransformerSpec | VAESpec | TinyVAESpec | TextEncoderSpec | CLIPVisionSpec

# What packagers and training programs put before every name; of those that begin alike, the longest first.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "net.", "module.")
HEAD_DIM = 128
CLIP_HEAD_DIM = 80

_LORA = re.compile(
    r"(^|[._])(lora_(A|B|down|up|mid|unet|te\d?)|lora_linear_layer|lora\.(up|down)|lokr_w\d|hada_w\d|lycoris)([._]|$)"
    r"|\.diff(_b|_m)?$")

# Transformers that share Wan's key names but have parts no official model has: tensor name -> what it is.
_VARIANTS = {
    "ref_conv.weight": "a Wan Fun transformer with a reference image",
    "control_adapter.conv.weight": "a Wan Fun camera-control transformer",
    "audio_proj.audio_proj_glob_1.layer.bias": "a HuMo transformer",
    "patch_embedding_mask.weight": "a SCAIL 2 transformer",
    "patch_embedding_pose.weight": "a SCAIL transformer",
    "patch_embedding_global.weight": "a WanDancer transformer",
}

_WHOLE = "choose its index (*.safetensors.index.json) or the folder of all of them"

# Files that people do have beside Wan's: part of a tensor name -> (kind, what it is). The first hit counts.
_FOREIGN = (
    ("first_stage_model.", "other", "a complete Stable Diffusion checkpoint"),
    ("input_blocks.0.0.", "other", "a Stable Diffusion UNet"),
    ("double_blocks.0.", "other", "a Flux or HunyuanVideo transformer"),
    ("joint_blocks.0.", "other", "a Stable Diffusion 3 transformer"),
    ("transformer_blocks.0.", "other", "another model's transformer in the diffusers layout"),
    (".attn1.norm_q.", "transformer", f"one part of a Wan transformer in several files; {_WHOLE}"),
    (".self_attn.norm_q.", "transformer", f"one part of a Wan transformer in several files; {_WHOLE}"),
    ("enc.blk.", "text_encoder", "one part of a T5 encoder in the GGUF layout"),
    ("blk.0.", "other", "a language model in the GGUF layout"),
    ("visual.transformer.resblocks.", "clip_vision", "a CLIP model in the open-clip layout, which is not supported; "
     "use the official models_clip file or ComfyUI's clip_vision_h"),
    ("text_model.encoder.", "other", "a CLIP text encoder"),
    ("text_projection", "other", "a CLIP text encoder"),
    ("vision_model.encoder.", "clip_vision", "a CLIP vision model of an unknown size"),
    ("wav2vec2.", "other", "a wav2vec 2.0 audio encoder"),
    ("encoder.down.0.block.", "vae", "a Stable Diffusion VAE"),
    ("layers.0.self_attn.", "other", "a language model"),
)


@dataclass(frozen=True)
class Recognition:
    """What a set of tensors seems to be.

    `kind`: 'transformer', 'vae', 'text_encoder', 'clip_vision', 'lora' or 'other'. `names`: presets (of a transformer)
    or table entries (of any other part) with exactly this architecture, none for an unreleased size. `spec`: the
    architecture, or None where it cannot be run, and then `reason` says why. `reason`: a phrase for the user that
    completes "this file is ...". `dialect`: 'official', or 'transformers', 'diffusers' or 'gguf' for the key names of
    those libraries.
    """

    kind: str
    names: tuple[str, ...]
    spec: Spec | None
    reason: str
    dialect: str = "official"


def strip_prefix(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Finds the prefix that most names carry; returns it ('' for none) and the mapping stripped name -> full name.

    Names without the prefix are kept as they are. Raises ValueError where two names become the same one.
    """
    names = list(names)
    prefix = next((p for p in PREFIXES if 2 * sum(n.startswith(p) for n in names) > len(names)), "")
    # The blocks of an official CLIP vision model without its own prefix are `transformer.0` and so on.
    if prefix == "transformer." and "transformer.0.norm1.weight" in names:
        prefix = ""
    mapping = {}
    for name in names:
        short = name.removeprefix(prefix)
        if short in mapping:
            raise ValueError(f"the tensors {mapping[short]!r} and {name!r} have the same name without the prefix "
                             f"{prefix!r}: the file holds two copies of a model; keep one")
        mapping[short] = name
    return prefix, mapping


def foreign_dialect(names: Collection[str]) -> tuple[str, str] | None:
    """Kind and dialect of a model whose names have to be translated before `recognise`; None for all others.

    `names` are without prefix, see `strip_prefix`.
    """
    return next(((kind, dialect) for anchor, kind, dialect in _FOREIGN_ANCHORS if anchor in names), None)


def recognise(shapes: Shapes) -> Recognition:
    """Recognises a checkpoint from its tensors' names (without prefix, see `strip_prefix`) and shapes.

    Names are the official ones, but for CLIP vision models, which transformers' names tell as well (see
    `foreign_dialect` for all others). Never raises on odd content: what cannot be recognised comes back as kind 'other'
    with spec None.
    """
    if any(_LORA.search(name) for name in shapes):
        return Recognition("lora", (), None, "a LoRA, which is applied to a model and is none by itself")
    for anchor, kind, dialect, derive in _ANCHORS:
        if anchor in shapes:
            try:
                return derive(shapes, dialect)
            except _Odd as odd:
                return Recognition(kind, (), None, f"{_KINDS[kind]}, but {odd}", dialect)
    return _foreign(shapes)


class _Odd(ValueError):
    """A shape that is absent or makes no sense; the text completes "a Wan transformer, but ..."."""


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name)
    if shape is None:
        raise _Odd(f"its tensor {name!r} is missing")
    if not -len(shape) <= axis < len(shape) or min(shape) < 1:
        raise _Odd(f"its tensor {name!r} has the impossible shape {list(shape)}")
    return shape[axis]


def _indices(shapes: Shapes, pattern: str) -> set[int]:
    """The numbers that the one group of `pattern`, matched from the start of a name, takes."""
    compiled = re.compile(pattern)
    return {int(match[1]) for match in map(compiled.match, shapes) if match}


def _transformer(shapes: Shapes, dialect: str) -> Recognition:
    for name, what in _VARIANTS.items():
        if name in shapes:
            return Recognition("transformer", (), None, f"{what}, which is not supported", dialect)
    dim, in_dim = _size(shapes, "head.modulation", -1), _size(shapes, "patch_embedding.weight", 1)
    if dim % HEAD_DIM:
        raise _Odd(f"its width {dim} is not a multiple of the head size {HEAD_DIM}")
    patch = tuple(_size(shapes, "patch_embedding.weight", axis) for axis in (2, 3, 4))
    out_dim = _size(shapes, "head.head.weight", 0) // (patch[0] * patch[1] * patch[2])
    num_layers = len(_indices(shapes, r"blocks\.(\d{1,6})\."))
    has_image, two_images = "img_emb.proj.0.bias" in shapes, "img_emb.emb_pos" in shapes
    spec = TransformerSpec(
        model_type=_model_type(shapes, in_dim, out_dim), dim=dim, ffn_dim=_size(shapes, "blocks.0.ffn.0.weight", 0),
        num_heads=dim // HEAD_DIM, num_layers=num_layers, in_dim=in_dim, out_dim=out_dim, patch_size=patch,
        text_dim=_size(shapes, "text_embedding.0.weight", 1), freq_dim=_size(shapes, "time_embedding.0.weight", 1),
        image_dim=_size(shapes, "img_emb.proj.0.bias", 0) if has_image else None,
        image_tokens=(_size(shapes, "img_emb.emb_pos", 1) if two_images else 257) if has_image else 0,
        **(_vace_fields(shapes, num_layers) if "vace_patch_embedding.weight" in shapes else {}))
    # How many tokens one image has is the vision model's affair; with two, they have positions in the file.
    assumed = ("text_len", "eps", "num_heads", *(() if two_images else ("image_tokens",)))
    names = tuple(preset.name for preset in PRESETS.values()
                  if _same(TRANSFORMERS[preset.transformer], spec, *assumed))
    if names:
        return Recognition("transformer", names, TRANSFORMERS[PRESETS[names[0]].transformer], _candidates(names))
    return Recognition("transformer", (), spec, f"a Wan transformer of type {spec.model_type}, width {dim}, "
                       f"{num_layers} blocks, {in_dim} to {out_dim} channels: no released model has this size")


def with_vace(spec: TransformerSpec, shapes: Shapes) -> TransformerSpec:
    """The architecture of a text-to-video transformer together with a VACE module of these tensors.

    Raises ValueError, with a phrase that completes "the module ...", where the two do not belong together.
    """
    try:
        dim = _size(shapes, "vace_patch_embedding.weight", 0)
        # Of another model's module it says more that the model is another one than how many blocks there are.
        if spec.model_type != "t2v" or dim != spec.dim:
            raise ValueError(f"is made for a text-to-video transformer of width {dim}, and this is one of type "
                             f"{spec.model_type} and width {spec.dim}")
        return replace(spec, model_type="vace", **_vace_fields(shapes, spec.num_layers))
    except _Odd as odd:
        raise ValueError(f"is no whole VACE module: {odd}") from odd


def _vace_fields(shapes: Shapes, num_layers: int) -> dict[str, object]:
    """Of a TransformerSpec, what belongs to VACE."""
    count = len(_indices(shapes, r"vace_blocks\.(\d{1,6})\."))
    if not 0 < count <= num_layers:
        raise _Odd("its control blocks are missing" if not count else f"it has {count} control blocks for {num_layers}")
    _size(shapes, "vace_blocks.0.before_proj.weight", 0)
    # The control blocks of both released models are spread evenly, the first one on block 0.
    return {"vace_layers": tuple(range(0, num_layers, max(1, num_layers // count)))[:count],
            "vace_in_dim": _size(shapes, "vace_patch_embedding.weight", 1)}


def _vace_module(shapes: Shapes, dialect: str) -> Recognition:
    dim = _size(shapes, "vace_patch_embedding.weight", 0)
    count = len(_indices(shapes, r"vace_blocks\.(\d{1,6})\."))
    return Recognition("vace_module", (), None, f"a VACE module of {count} blocks for a text-to-video model of width "
                       f"{dim}, which is added to such a model", dialect)


def _model_type(shapes: Shapes, in_dim: int, out_dim: int) -> str:
    if "vace_patch_embedding.weight" in shapes:
        return "vace"
    if "casual_audio_encoder.encoder.final_linear.weight" in shapes:  # "casual" is the files' own spelling
        return "s2v"
    if "face_adapter.fuser_blocks.0.k_norm.weight" in shapes:
        return "animate"
    if "img_emb.emb_pos" in shapes:
        return "flf2v"
    # An image enters as 4 mask channels and one latent more.
    if "img_emb.proj.0.bias" in shapes or in_dim == 2 * out_dim + 4:
        return "i2v"
    if in_dim == out_dim:
        return "ti2v" if in_dim == VAES["wan22_vae"].z_dim else "t2v"
    raise _Odd(f"it takes {in_dim} and returns {out_dim} channels, which no supported model does "
               "(Wan Fun control and camera models do)")


def _vae(shapes: Shapes, dialect: str) -> Recognition:
    nested = "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes
    known = VAES["wan22_vae" if nested else "wan21_vae"]
    dim, z_dim = _size(shapes, "encoder.conv1.weight", 0), _size(shapes, "conv2.weight", 0)
    if z_dim != known.z_dim:
        raise _Odd(f"it has {z_dim} latent channels where the {known.kind} family has {known.z_dim}")
    levels = _encoder_levels(shapes, nested)
    spec = VAESpec(
        kind=known.kind, dim=dim, decoder_dim=_size(shapes, "decoder.head.0.gamma", 0), z_dim=z_dim,
        # Pruned VAEs are distilled to the latent space of the released one, so its statistics hold for them.
        mean=known.mean, std=known.std,
        dim_mult=tuple(max(1, _size(shapes, f"{level[0]}.residual.2.weight", 0) // dim) for level in levels),
        num_res_blocks=sum(f"{item}.residual.2.weight" in shapes for item in levels[0]),
        temporal_downsample=tuple(f"{level[-1]}.time_conv.weight" in shapes for level in levels[:-1]),
        spatial_stride=2 ** (len(levels) - 1) * (2 if nested else 1),
        temporal_stride=2 ** sum(f"{level[-1]}.time_conv.weight" in shapes for level in levels[:-1]))
    return _by_table("vae", VAES, spec, dialect, f"a {spec.kind} VAE of width {dim}: no released one has this size")


def _tiny_vae(shapes: Shapes, dialect: str) -> Recognition:
    if "decoder.1.weight" not in shapes:
        return Recognition("vae", (), None, "a preview VAE of the 'super' kind, which is not supported; use the plain "
                           "taew2_2 file", dialect)
    z_dim, pixels = _size(shapes, "decoder.1.weight", 1), _size(shapes, "decoder.22.bias", 0)
    known = next((spec for spec in TINY_VAES.values() if spec.z_dim == z_dim), None)
    if known is None or pixels != 3 * known.patch ** 2:
        raise _Odd(f"it has {z_dim} latent channels and {pixels} colours of pixels, which belong to another model's "
                   "latents than Wan's")
    spec = replace(known, widths=tuple(_size(shapes, f"decoder.{index}.weight", 0) for index in (1, 8, 14, 20)),
                   encoder_width=_size(shapes, "encoder.0.weight", 0))
    names = tuple(name for name, table in TINY_VAES.items() if _same(table, spec, "vae", "mean", "std"))
    if names:
        return Recognition("vae", names, TINY_VAES[names[0]], f"a tiny preview VAE ({names[0]})", dialect)
    return Recognition("vae", (), spec, f"a tiny preview VAE of widths {spec.widths}: no released one has this size",
                       dialect)


def _encoder_levels(shapes: Shapes, nested: bool) -> list[list[str]]:
    """Names of the encoder's residual and resampling layers, one list a resolution (the resampling layer last)."""
    top = sorted(_indices(shapes, r"encoder\.downsamples\.(\d{1,6})\."))
    if nested:
        levels = [[f"encoder.downsamples.{i}.downsamples.{j}" for j in
                   sorted(_indices(shapes, rf"encoder\.downsamples\.{i}\.downsamples\.(\d{{1,6}})\."))] for i in top]
    else:
        levels = [[]]
        for name in (f"encoder.downsamples.{index}" for index in top):
            levels[-1].append(name)
            if f"{name}.resample.1.weight" in shapes:
                levels.append([])
    if not levels or not all(levels):
        raise _Odd("its encoder's layers are incomplete")
    return levels


def _text_encoder(shapes: Shapes, dialect: str) -> Recognition:
    bias, blocks = "blocks.0.pos_embedding.embedding.weight", r"blocks\.(\d{1,6})\."
    num_layers, biases = (len(_indices(shapes, pattern)) for pattern in (blocks, blocks + "pos_embedding"))
    if "pos_embedding.embedding.weight" in shapes or biases == 1 < num_layers:
        raise _Odd("all its blocks share one position bias, as in T5, where UMT5 has one a block")
    spec = TextEncoderSpec(
        vocab_size=_size(shapes, "token_embedding.weight", 0), dim=_size(shapes, "token_embedding.weight", -1),
        dim_attn=_size(shapes, "blocks.0.attn.q.weight", 0), dim_ffn=_size(shapes, "blocks.0.ffn.gate.0.weight", 0),
        num_heads=_size(shapes, bias, 1), num_layers=num_layers, num_buckets=_size(shapes, bias, 0))
    return _by_table("text_encoder", TEXT_ENCODERS, spec, dialect,
                     f"a UMT5 encoder of width {spec.dim} and {spec.num_layers} blocks: no released one has this size")


def _clip_vision(shapes: Shapes, dialect: str) -> Recognition:
    if dialect == "official":
        root = "visual." if "visual.cls_embedding" in shapes else ""
        patches, positions = root + "patch_embedding.weight", root + "pos_embedding"
        block, head = root + "transformer.", (root + "head", -1)
        mlp = block + "0.mlp.0.weight"
    else:
        root = "vision_model."
        patches, positions = root + "embeddings.patch_embedding.weight", root + "embeddings.position_embedding.weight"
        block, head = root + "encoder.layers.", ("visual_projection.weight", 0)
        mlp = block + "0.mlp.fc1.weight"
    dim, patch, tokens = _size(shapes, patches, 0), _size(shapes, patches, -1), _size(shapes, positions, -2)
    # Shapes do not tell heads and activation; ViT-B, ViT-L, bigG and SigLIP differ in them, and in their width.
    known_heads = {known.dim: known.num_heads for known in CLIP_VISION.values()}
    if dim not in known_heads and dim % CLIP_HEAD_DIM:
        raise _Odd(f"its width is {dim} and not the 1280 of ViT-H/14, which Wan uses")
    # One token is the class token, the others are a square of patches.
    side = math.isqrt(tokens - 1)
    if not side or side * side != tokens - 1:
        raise _Odd(f"its {tokens} positions are no square of patches and a class token")
    spec = CLIPVisionSpec(
        image_size=side * patch, patch_size=patch, dim=dim, mlp_dim=_size(shapes, mlp, 0),
        num_heads=known_heads.get(dim, dim // CLIP_HEAD_DIM),
        num_layers=len(_indices(shapes, re.escape(block) + r"(\d{1,6})\.")), out_dim=_size(shapes, *head))
    return _by_table("clip_vision", CLIP_VISION, spec, dialect, f"a CLIP vision model of width {dim} and "
                     f"{spec.num_layers} blocks: no released one has this size")


_KINDS = {"transformer": "a Wan transformer", "vace_module": "a VACE module", "vae": "a Wan VAE",
          "tiny_vae": "a tiny preview VAE", "text_encoder": "a T5-type text encoder",
          "clip_vision": "a CLIP vision model"}

# One tensor that a complete file of the kind always has, for each dialect of its key names.
_ANCHORS = (
    ("head.modulation", "transformer", "official", _transformer),
    ("vace_patch_embedding.weight", "vace_module", "official", _vace_module),
    ("decoder.middle.0.residual.0.gamma", "vae", "official", _vae),
    ("decoder.22.bias", "tiny_vae", "official", _tiny_vae),
    ("blocks.0.ffn.gate.0.weight", "text_encoder", "official", _text_encoder),
    ("visual.cls_embedding", "clip_vision", "official", _clip_vision),
    ("cls_embedding", "clip_vision", "official", _clip_vision),
    ("vision_model.embeddings.patch_embedding.weight", "clip_vision", "transformers", _clip_vision),
)

# The same for names that are translated first.
_FOREIGN_ANCHORS = (
    ("condition_embedder.time_embedder.linear_1.weight", "transformer", "diffusers"),
    ("encoder.mid_block.attentions.0.to_qkv.weight", "vae", "diffusers"),
    ("decoder.mid_block.attentions.0.to_qkv.weight", "vae", "diffusers"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "text_encoder", "transformers"),
    ("enc.blk.0.attn_q.weight", "text_encoder", "gguf"),
)


def _same(known: Spec, derived: Spec, *assumed: str) -> bool:
    """Equality but for the fields that shapes do not tell."""
    return all(getattr(known, field.name) == getattr(derived, field.name)
               for field in fields(known) if field.name not in assumed)


def _by_table(kind: str, table: Mapping[str, Spec], spec: Spec, dialect: str, otherwise: str) -> Recognition:
    assumed = ("text_len", "max_distance") if kind == "text_encoder" else ("mean", "std")
    names = tuple(name for name, known in table.items() if _same(known, spec, *assumed))
    if names:
        return Recognition(kind, names, table[names[0]], f"{_KINDS[kind]} ({' or '.join(names)})", dialect)
    return Recognition(kind, (), spec, otherwise, dialect)


def _candidates(names: tuple[str, ...]) -> str:
    return " or ".join(f"one expert of {PRESETS[name].title}" if PRESETS[name].experts else PRESETS[name].title
                       for name in names)


def _foreign(shapes: Shapes) -> Recognition:
    if "encoder.conv_in.weight" in shapes or "decoder.conv_in.weight" in shapes:
        return Recognition("vae", (), None, "a Stable Diffusion VAE")
    for fragment, kind, what in _FOREIGN:
        if any(fragment in name for name in shapes):
            return Recognition(kind, (), None, what)
    if any(name.startswith(("encoder.downsamples.", "decoder.upsamples.")) for name in shapes):
        return Recognition("vae", (), None, "one half of a Wan VAE; encoder and decoder are both needed")
    examples = ", ".join(list(shapes)[:3]) or "none"
    return Recognition("other", (), None, f"an unknown model (first tensors: {examples})")
