"""Foreign key names: what other libraries write is opened under the official names and computes what they compute."""
import re
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from tests.dit.oracle import Oracle, transformer
from tests.dit.test_branches import given, in_diffusers, prepared
from tests.vae.small import SMALL, random_latents, random_vae, random_video
from tests.vae.test_model import diffusers_vae
from wan_core.presets import PRESETS, TEXT_ENCODERS, TRANSFORMERS, VAES, TransformerSpec, strip_prefix
from wan_core.weights import (
    LoadError,
    build_module,
    expected_shapes,
    load_module,
    open_model,
    open_weights,
    recognise_file,
)
from wan_core.weights.dialects import TRANSFORMER_DIFFUSERS, UMT5_GGUF, UMT5_TRANSFORMERS, official_names
from wan_core.weights.tensor_file import TensorFile

T2V = TransformerSpec(model_type="t2v", dim=128, ffn_dim=192, num_heads=1, num_layers=2, text_dim=48)
I2V = replace(T2V, model_type="i2v", in_dim=36, image_dim=40, image_tokens=257)
BRANCHES = {
    "t2v": T2V, "i2v": I2V, "flf2v": replace(I2V, model_type="flf2v", image_tokens=14),
    "i2v-2.2": replace(T2V, model_type="i2v", in_dim=36),
    "ti2v": replace(T2V, model_type="ti2v", in_dim=48, out_dim=48),
    "vace": replace(T2V, model_type="vace", num_layers=4, vace_layers=(0, 2), vace_in_dim=96),
}
UMT5 = replace(TEXT_ENCODERS["nano_umt5"], num_layers=3, dim=32, dim_attn=32, dim_ffn=48, num_heads=4, vocab_size=64)


def hollow(path, shapes, dtype=torch.bfloat16) -> TensorFile:
    """An open file of these shapes that has no numbers."""
    path.touch()
    return TensorFile(path, "safetensors", {}, dict.fromkeys(shapes, dtype), shapes,
                      lambda name, device: torch.empty(shapes[name], dtype=dtype, device="meta"))


def saved(path, tensors, prefix=""):
    save_file({prefix + name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def opened(path, kind):
    """The module that a file fills, and what the file was recognised as."""
    file, recognition = open_model(path, kind)
    return load_module(build_module(recognition.spec), file), recognition


@pytest.mark.parametrize("branch, prefix", [*((branch, "") for branch in BRANCHES), ("i2v", "transformer.")])
@torch.no_grad()
def test_diffusers_transformers_compute_the_same(tmp_path, branch, prefix):
    """A file of diffusers' class, opened by us, has the velocity of that class; max abs error 1e-4."""
    spec = BRANCHES[branch]
    oracle = Oracle(transformer(spec))
    ours, recognition = opened(saved(tmp_path / "x.safetensors", oracle.module.state_dict(), prefix), "transformer")
    assert (recognition.spec, recognition.dialect) == (spec, "diffusers")
    calls = given(spec, grid=(2, 4, 6))
    torch.testing.assert_close(ours(prepared(ours, calls)), in_diffusers(oracle, calls), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("change", [
    {"decoder_dim": 12},
    {"num_res_blocks": 2, "dim_mult": (1, 1, 2, 2), "temporal_downsample": (True, False, True)}])
@torch.no_grad()
def test_diffusers_vaes_compute_the_same(tmp_path, kind, change):
    """A file of diffusers' class in both layouts, opened by us, gives its latents and pixels; max abs error 1e-4."""
    spec = replace(SMALL[kind], **change)
    oracle = diffusers_vae(random_vae(spec))
    ours, recognition = opened(saved(tmp_path / "x.safetensors", oracle.state_dict()), "vae")
    assert (recognition.spec, recognition.dialect) == (spec, "diffusers")
    video, latents = random_video(spec, 5, 2, 2), random_latents(spec, 2, 2, 2)
    torch.testing.assert_close(ours.encode(video), oracle.encode(video).latent_dist.mode(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.decode(latents), oracle.decode(latents).sample.clamp(-1, 1), atol=1e-4, rtol=0)


def inverse(shapes, table):
    """Shapes under the names on the left of a table, from those under its right, block by block."""
    named = {}
    for theirs, ours in table.items():
        pattern = re.compile(re.escape(ours).replace(r"\{\}", r"(\d+)") + r"((?:\.weight|\.bias)?)")
        for name, shape in shapes.items():
            if match := pattern.fullmatch(name):
                named[theirs.format(*match.groups()[:-1]) + match.groups()[-1]] = shape
    assert len(named) == len(shapes)
    return named


@pytest.mark.parametrize("name", sorted({PRESETS[preset].transformer for preset in (
    "wan21_t2v_1_3b", "wan21_i2v_14b_480p", "wan21_flf2v_14b", "wan21_vace_1_3b", "wan22_ti2v_5b", "wan22_i2v_a14b")}))
def test_released_sizes_are_recognised_as_their_preset(tmp_path, name):
    """A released model under diffusers' names has the spec and presets of the official file, and nothing is left."""
    shapes = expected_shapes(TRANSFORMERS[name])
    file, recognition = recognise_file(hollow(tmp_path / "x", inverse(shapes, TRANSFORMER_DIFFUSERS)))
    assert recognition.spec == TRANSFORMERS[name] and recognition.dialect == "diffusers"
    assert recognition.names == recognise_file(hollow(tmp_path / "y", shapes))[1].names != ()
    assert file.shapes() == shapes


@torch.no_grad()
def transformers_umt5(spec):
    """transformers' encoder of this size, with random norms."""
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(
        vocab_size=spec.vocab_size, d_model=spec.dim, d_kv=spec.dim_attn // spec.num_heads, d_ff=spec.dim_ffn,
        num_layers=spec.num_layers, num_heads=spec.num_heads, relative_attention_num_buckets=spec.num_buckets,
        relative_attention_max_distance=spec.max_distance, feed_forward_proj="gated-gelu")).eval()
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def in_gguf(names):
    """llama.cpp's names of these tensors of transformers, from the gguf package."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, UMT5.num_layers)
    return {name: known.get_name(name, try_suffixes=(".weight",)) for name in names}


@pytest.mark.parametrize("dialect", ["transformers", "gguf"])
@torch.no_grad()
def test_text_encoders_compute_the_same(tmp_path, dialect):
    """UMT5 under transformers' and llama.cpp's names gives the embeddings of transformers; max abs error 1e-4."""
    oracle = transformers_umt5(UMT5)
    tensors = {name: tensor for name, tensor in oracle.state_dict().items() if name != "encoder.embed_tokens.weight"}
    if dialect == "gguf":
        names = in_gguf(tensors)
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        tensors["dec.blk.0.attn_q.weight"] = torch.zeros(2, 2)  # of a whole model, and of no use
    ours, recognition = opened(saved(tmp_path / "x.safetensors", tensors), "text_encoder")
    assert (recognition.spec, recognition.dialect) == (UMT5, dialect)
    ids = torch.randint(3, UMT5.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(ours(ids, mask), oracle(ids, mask).last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dialect, table", [("transformers", UMT5_TRANSFORMERS), ("gguf", UMT5_GGUF)])
def test_the_released_text_encoder_is_recognised(tmp_path, dialect, table):
    """UMT5-XXL is known under both names; T5-XXL, with one position bias for all blocks, is not taken for it."""
    shapes = inverse(expected_shapes(TEXT_ENCODERS["umt5_xxl"]), table)
    recognition = recognise_file(hollow(tmp_path / "x", shapes))[1]
    assert (recognition.names, recognition.dialect) == (("umt5_xxl",), dialect)
    shared = {name: shape for name, shape in shapes.items()
              if not re.search(r"relative_attention_bias|attn_rel_b", name) or re.search(r"bl(oc)?k\.0\.", name)}
    recognition = recognise_file(hollow(tmp_path / "y", shared))[1]
    assert recognition.spec is None and "as in T5" in recognition.reason


def test_what_stands_beside_a_layer_is_renamed_with_it():
    """A packager's extra tensors follow their layer; names without a row are kept."""
    names = ["blocks.3.attn1.to_out.0.weight", "blocks.3.attn1.to_out.0.lora_note", "blocks.3.other.weight", "x"]
    assert official_names(names, "transformer", "diffusers") == {
        "blocks.3.self_attn.o.weight": names[0], "blocks.3.self_attn.o.lora_note": names[1],
        "blocks.3.other.weight": names[2], "x": "x"}


def test_foreign_names_beside_official_ones_are_refused(tmp_path):
    """A file with a tensor under both names says so instead of taking either."""
    shapes = inverse(expected_shapes(T2V), TRANSFORMER_DIFFUSERS) | {"blocks.1.norm3.weight": (128,)}
    with pytest.raises(LoadError, match="x: holds 'blocks.1.norm3.weight' twice, as 'blocks.1.norm2.weight' and as"):
        recognise_file(hollow(tmp_path / "x", shapes))


@pytest.mark.parametrize("missing, kind, text", [
    ("blocks.1.attn2.norm_k.weight", "transformer", "missing tensors: blocks.1.cross_attn.norm_k.weight"),
    ("scale_shift_table", "transformer", "one part of a Wan transformer"),
])
def test_incomplete_files_are_explained(tmp_path, missing, kind, text):
    """What is missing in a file of foreign names is named, and what it is the part of."""
    tensors = Oracle(transformer(T2V)).module.state_dict()
    del tensors[missing]
    with pytest.raises(LoadError, match=text):
        open_model(saved(tmp_path / "x.safetensors", tensors), kind)


def test_one_of_several_files_is_named(tmp_path):
    """The second file of a model in several files, opened by itself, leads to its index; half a VAE says what lacks."""
    shapes = {name: shape for name, shape in inverse(expected_shapes(T2V), TRANSFORMER_DIFFUSERS).items()
              if name.startswith("blocks.1")}
    reason = recognise_file(hollow(tmp_path / "x", shapes))[1].reason
    assert "in several files; choose its index (*.safetensors.index.json) or the folder" in reason
    vae = diffusers_vae(random_vae(SMALL["wan21"])).state_dict()
    half = {name: tuple(tensor.shape) for name, tensor in vae.items() if name.startswith("decoder.")}
    recognition = recognise_file(hollow(tmp_path / "x", half))[1]
    assert (recognition.kind, recognition.dialect) == ("vae", "diffusers")
    assert "tensor 'encoder.conv1.weight' is missing" in recognition.reason


def test_released_vaes_are_recognised(tmp_path):
    """The sizes of both released VAEs under diffusers' names are those VAEs, with nothing left over."""
    for name, kind in (("wan21_vae", "wan21"), ("wan22_vae", "wan22")):
        official = expected_shapes(VAES[name])
        spec = replace(SMALL[kind], num_res_blocks=VAES[name].num_res_blocks)
        small = saved(tmp_path / f"{kind}.safetensors", diffusers_vae(random_vae(spec)).state_dict())
        with open_weights(small) as file:
            mapping = official_names(file.names, "vae", "diffusers")
        shapes = {theirs: official[ours] for ours, theirs in mapping.items()}
        renamed, recognition = recognise_file(hollow(tmp_path / "x", shapes))
        assert recognition.names == (name,) and renamed.shapes() == official


def test_a_name_of_clip_is_no_prefix():
    """The blocks of an official CLIP vision model begin with what is a prefix elsewhere, and keep it."""
    names = [f"transformer.{block}.norm1.weight" for block in range(9)] + ["cls_embedding"]
    assert strip_prefix(names)[0] == ""
    assert strip_prefix([f"module.{name}" for name in names])[0] == "module."
    assert strip_prefix([f"transformer.{name}" for name in names])[0] == "transformer."
