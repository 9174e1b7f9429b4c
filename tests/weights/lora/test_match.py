"""Matching with a model: every key is matched, skipped for a reason or unknown, and no match at all is an error."""
import pytest
import torch

from tests.weights.lora.lora_files import LINEAR, SHAPES, low_rank, low_rank_file, random, write
from wan_core.weights import LoadError
from wan_core.weights.lora import Skipped, Target, open_lora

PATCH = Target("patch_embedding", "weight")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("model", ["t2v", "vace", "clip", "ti2v"])
def test_every_linear_layer_is_found(tmp_path, model):
    """A LoRA on all linear layers of a model matches them all, VACE's and the CLIP branch's too."""
    matched = open_lora(low_rank_file(tmp_path / "x.safetensors", LINEAR[model])).match(SHAPES[model])
    assert {target.name for target in matched.adapters} == {f"{module}.weight" for module in LINEAR[model]}
    assert matched.skipped == matched.unknown == ()
    for target, adapter in matched.adapters.items():
        assert adapter.delta(SHAPES[model][target.name]).shape == SHAPES[model][target.name]


def test_the_clip_branch_is_skipped_in_one_line(tmp_path):
    """A LoRA of 2.1 I2V on a model without CLIP: all keys of that branch under one reason, the others matched."""
    clip = {module for module in LINEAR["clip"] if "_img" in module or "img_" in module}
    path = low_rank_file(tmp_path / "x.safetensors", {m: s for m, s in LINEAR["clip"].items() if m != "head.head"})
    tensors = {"blocks.0.cross_attn.norm_k_img.diff": random(128), "img_emb.proj.0.diff_b": random(32)}
    opened = open_lora(path)
    more = open_lora(write(tmp_path / "y.safetensors", tensors | {"blocks.0.norm3.diff": random(128)}))
    shapes = SHAPES["i2v"] | {name: shape for name, shape in SHAPES["clip"].items() if "img" not in name}
    matched = opened.match(shapes)
    assert len(matched.skipped) == 1 and len(matched.skipped[0].keys) == 2 * len(clip) and len(clip) == 6
    assert "CLIP image branch" in matched.skipped[0].reason and matched.unknown == ()
    assert more.match(shapes).skipped == (Skipped(tuple(tensors), matched.skipped[0].reason),)
    assert more.match(SHAPES["clip"]).skipped == ()


def test_vace_blocks_are_skipped_on_other_models(tmp_path):
    """VACE's layers have their own reason where the model has none."""
    path = low_rank_file(tmp_path / "x.safetensors", LINEAR["vace"])
    matched = open_lora(path).match(SHAPES["t2v"])
    assert len(matched.adapters) == len(LINEAR["t2v"])
    assert [skipped.reason for skipped in matched.skipped] == ["for VACE blocks, which this model does not have"]


@pytest.mark.parametrize("kind", ["diff", "lora"])
def test_a_narrower_patch_embedding_is_widened(tmp_path, kind):
    """What was trained on 16 channels changes the first 16 of a model's 36, and the others not at all."""
    narrow, wide = SHAPES["t2v"]["patch_embedding.weight"], SHAPES["i2v"]["patch_embedding.weight"]
    if kind == "diff":
        tensors = {"patch_embedding.diff": random(*narrow)}
    else:
        tensors = {"patch_embedding.lora_down.weight": random(3, *narrow[1:]),
                   "patch_embedding.lora_up.weight": random(128, 3, 1, 1, 1)}
    opened = open_lora(write(tmp_path / "x.safetensors", tensors))
    before = opened.match(SHAPES["t2v"]).adapters[PATCH].delta(narrow)
    adapter = opened.match(SHAPES["i2v"]).adapters[PATCH]
    after = adapter.delta(wide)
    assert torch.equal(after[:, :16], before) and before.any() and not after[:, 16:].any()
    x = torch.randn(5, after[0].numel())
    assert torch.allclose(adapter.apply(x), x @ after.flatten(1).T, atol=1e-5)


def test_a_wider_patch_embedding_is_skipped(tmp_path):
    """What was trained on 36 channels cannot change 16; both shapes are in the reason."""
    opened = open_lora(write(tmp_path / "x.safetensors", {
        "patch_embedding.diff": random(*SHAPES["i2v"]["patch_embedding.weight"]),
        "patch_embedding.diff_b": random(128)}))
    matched = opened.match(SHAPES["t2v"])
    assert [skipped.keys for skipped in matched.skipped] == [("patch_embedding.diff",)]
    assert "[128, 36, 1, 2, 2]" in matched.skipped[0].reason and "[128, 16, 1, 2, 2]" in matched.skipped[0].reason
    assert list(matched.adapters) == [("patch_embedding", "bias")]


def test_other_shapes_are_skipped(tmp_path):
    """A layer of another size is skipped with both sizes, and the rest still works."""
    modules = {"blocks.0.ffn.0": (64, 128), "blocks.1.ffn.0": (96, 128)}
    matched = open_lora(low_rank_file(tmp_path / "x.safetensors", modules)).match(SHAPES["t2v"])
    assert [target.module for target in matched.adapters] == ["blocks.0.ffn.0"]
    assert len(matched.skipped) == 1 and len(matched.skipped[0].keys) == 2
    assert "[96, 128]" in matched.skipped[0].reason and "[64, 128]" in matched.skipped[0].reason


def test_magnitudes_of_another_size_are_skipped(tmp_path):
    """DoRA magnitudes that fit neither rows nor columns are found when matching, not when merging."""
    down, up = low_rank((64, 128))
    opened = open_lora(write(tmp_path / "x.safetensors", {
        "blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up,
        "blocks.0.ffn.0.dora_scale": random(7, 1), "blocks.0.ffn.0.diff_b": random(64)}))
    assert "neither" in opened.match(SHAPES["t2v"]).skipped[0].reason


def test_layers_that_the_model_lacks_are_unknown(tmp_path):
    """Names that neither model nor tables have are listed by their keys."""
    modules = {"blocks.0.ffn.0": (64, 128), "blocks.9.ffn.0": (64, 128), "face_adapter.fuser_blocks.0.linear2": (8, 8)}
    matched = open_lora(low_rank_file(tmp_path / "x.safetensors", modules)).match(SHAPES["t2v"])
    assert len(matched.adapters) == 1 and len(matched.unknown) == 4
    own = SHAPES["t2v"] | {"face_adapter.fuser_blocks.0.linear2.weight": (8, 8)}
    assert len(open_lora(tmp_path / "x.safetensors").match(own).adapters) == 2


def test_a_lora_for_another_size_is_named(tmp_path):
    """Nothing matched is an error that compares width and blocks of both models."""
    modules = {f"blocks.{n}.{layer}": (48, 48) for n in range(3) for layer in ("self_attn.q", "cross_attn.o")}
    opened = open_lora(low_rank_file(tmp_path / "small.safetensors", modules))
    with pytest.raises(LoadError, match=r"small\.safetensors.*width 48 with 3 blocks.*width 128 with 4 blocks"):
        opened.match(SHAPES["t2v"])


def test_a_lora_for_another_architecture_is_named(tmp_path):
    """Keys of another model are shown."""
    opened = open_lora(low_rank_file(tmp_path / "x.safetensors", {"double_blocks.0.img_attn.qkv": (9, 3)}))
    with pytest.raises(LoadError, match="double_blocks.0.img_attn.qkv.*of another model"):
        opened.match(SHAPES["t2v"])


def test_a_lora_of_a_missing_branch_alone(tmp_path):
    """A file that holds nothing but a branch which the model lacks says so."""
    opened = open_lora(low_rank_file(tmp_path / "x.safetensors", {"blocks.3.cross_attn.k_img": (128, 128)}))
    with pytest.raises(LoadError, match="CLIP image branch"):
        opened.match(SHAPES["t2v"])
