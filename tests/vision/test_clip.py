"""CLIP vision encoder against the official code and transformers, from files in every layout."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.golden_cases import load_case
from wan_core.presets import CLIP_VISION, CLIPVisionSpec
from wan_core.vision import CLIPVision
from wan_core.weights import LoadError, build_module, expected_shapes, load_module, open_model

SPEC = CLIPVisionSpec(image_size=42, patch_size=14, dim=160, mlp_dim=96, num_heads=2, num_layers=3, out_dim=24)
# What whole CLIP files hold besides.
OFFICIAL_REST = {"textual.token_embedding.weight": torch.zeros(3, 4), "log_scale": torch.zeros(())}
TRANSFORMERS_REST = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 4),
                     "text_projection.weight": torch.zeros(2, 4), "logit_scale": torch.zeros(()),
                     "vision_model.embeddings.position_ids": torch.arange(10)[None]}


@pytest.fixture(scope="module")
def oracle() -> CLIPVisionModelWithProjection:
    """transformers' class of the shape of SPEC, no parameter of which is at a value that would hide a mistake."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(
        image_size=SPEC.image_size, patch_size=SPEC.patch_size, hidden_size=SPEC.dim, intermediate_size=SPEC.mlp_dim,
        num_attention_heads=SPEC.num_heads, num_hidden_layers=SPEC.num_layers, projection_dim=SPEC.out_dim,
        hidden_act="gelu")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def official(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of transformers as the official code would have saved the same model."""
    body = "vision_model."
    renamed = {"cls_embedding": tensors[body + "embeddings.class_embedding"][None, None],
               "pos_embedding": tensors[body + "embeddings.position_embedding.weight"][None],
               "patch_embedding.weight": tensors[body + "embeddings.patch_embedding.weight"],
               "head": tensors["visual_projection.weight"].T}
    for leaf in ("weight", "bias"):
        renamed[f"pre_norm.{leaf}"] = tensors[f"{body}pre_layrnorm.{leaf}"]
        renamed[f"post_norm.{leaf}"] = tensors[f"{body}post_layernorm.{leaf}"]
        for block in range(SPEC.num_layers):
            theirs, ours = f"{body}encoder.layers.{block}", f"transformer.{block}"
            renamed[f"{ours}.attn.to_qkv.{leaf}"] = torch.cat(
                [tensors[f"{theirs}.self_attn.{part}_proj.{leaf}"] for part in "qkv"])
            for old, new in (("self_attn.out_proj", "attn.proj"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2"),
                             ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2")):
                renamed[f"{ours}.{new}.{leaf}"] = tensors[f"{theirs}.{old}.{leaf}"]
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def write(path, tensors):
    (torch.save if path.suffix == ".pth" else save_file)(tensors, path)
    return path


def load(path) -> CLIPVision:
    file, recognition = open_model(path, "clip_vision")
    return load_module(build_module(recognition.spec), file)


def pixels(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, SPEC.image_size, SPEC.image_size, generator=torch.Generator().manual_seed(seed))


def test_equals_the_official_encoder():
    """Golden case: max abs error at most 1e-4 in fp32 (its weights are of no size that a file is recognised by)."""
    case = load_case("clip_vision")
    config = case.config
    spec = CLIPVisionSpec(mlp_dim=config["mlp_ratio"] * config["dim"], **{
        key: config[key] for key in ("image_size", "patch_size", "dim", "num_heads", "num_layers", "out_dim")})
    encoder = load_module(build_module(spec), case.weights)
    with torch.no_grad():
        tokens = encoder(case.inputs["pixels"])
    torch.testing.assert_close(tokens, case.outputs["penultimate"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["official.pth", "official.safetensors", "visual.pth", "visual.safetensors",
                                    "transformers.safetensors", "transformers_whole.safetensors"])
def test_every_layout_equals_transformers(tmp_path, oracle, layout):
    """Official names with and without `visual.`, transformers' names, with and without the rest of CLIP: the same
    tokens, last hidden state and embedding as transformers', and nothing of the rest is loaded."""
    theirs = {name: tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    if layout.startswith("official"):
        stored = official(theirs)
    elif layout.startswith("visual"):
        stored = {f"visual.{name}": tensor for name, tensor in official(theirs).items()} | OFFICIAL_REST
    else:
        stored = theirs | (TRANSFORMERS_REST if "whole" in layout else {})
    encoder = load(write(tmp_path / layout, stored))
    assert encoder.spec == SPEC
    with torch.no_grad():
        expected = oracle(pixels(), output_hidden_states=True)
        tokens = encoder(pixels())
        last, embedding = encoder.project(tokens)
    torch.testing.assert_close(tokens, expected.hidden_states[-2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embedding, expected.image_embeds, atol=1e-4, rtol=1e-4)


def test_joined_weights_are_those_of_the_official_file(tmp_path, oracle):
    """Query, key and value of a transformers file fill the one matrix bit for bit, in the file's own type."""
    theirs = {name: tensor.detach().half() for name, tensor in oracle.state_dict().items()}
    loaded = load(write(tmp_path / "x.safetensors", theirs)).state_dict()
    expected = official(theirs)
    assert loaded.keys() == expected.keys()
    assert all(tensor.dtype == torch.float16 and torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_a_file_without_a_part_of_a_joined_tensor(tmp_path, oracle):
    """The joined tensor counts as missing and the parts that are there as unexpected."""
    stored = {name: tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    del stored["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(LoadError, match=r"missing tensors: transformer.1.attn.to_qkv.weight; unexpected tensors: "
                                        r"vision_model.encoder.layers.1.self_attn.[qv]_proj.weight"):
        load(write(tmp_path / "x.safetensors", stored))


def test_parts_that_do_not_fit_each_other(tmp_path, oracle):
    """Query and key of different widths are an error that names both, when the file is opened."""
    stored = {name: tensor.detach().clone() for name, tensor in oracle.state_dict().items()}
    stored["vision_model.encoder.layers.0.self_attn.k_proj.weight"] = torch.zeros(160, 80)
    with pytest.raises(LoadError, match=r"x.safetensors holds tensors that do not fit each other.*k_proj.weight "
                                        r"\[160, 80\]"):
        load(write(tmp_path / "x.safetensors", stored))


def test_the_last_block_is_not_computed():
    """Its weights do not touch the tokens, and on_block is called for the others in their order."""
    torch.manual_seed(0)
    encoder, called = CLIPVision(SPEC), []
    with torch.no_grad():
        for parameter in (*encoder.transformer[-1].parameters(), *encoder.post_norm.parameters(), encoder.head):
            parameter.fill_(float("nan"))
        assert encoder(pixels(), called.append).isfinite().all()
    assert called == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_close_to_fp32(dtype):
    """Rounded weights move the tokens by at most 1 % (their relative error); tokens are float32 all the same."""
    torch.manual_seed(0)
    encoder = CLIPVision(SPEC)
    with torch.no_grad():
        exact = encoder(pixels())
        rounded = encoder.to(dtype)(pixels())
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() <= 1e-2 * exact.norm()


def test_pixels_of_another_size_are_refused():
    """The encoder takes its own size and channels only."""
    encoder = CLIPVision(SPEC)
    for shape in ((1, 3, 28, 28), (1, 4, 42, 42), (3, 42, 42)):
        with pytest.raises(ValueError, match=r"expected \[batch, 3, 42, 42\] from preprocess"):
            encoder(torch.zeros(shape))


def test_impossible_architectures_are_refused():
    """Heads and patches must divide evenly."""
    for change in ({"num_heads": 3}, {"num_heads": 0}, {"image_size": 40}):
        with pytest.raises(ValueError, match="both must divide evenly"):
            replace(SPEC, **change)


def test_nano_has_the_layout_of_the_released_model():
    """The nano encoder's tensors are the released one's, but for the number of blocks."""
    def names(spec):
        return {name for name in expected_shapes(spec) if not name.startswith("transformer.")
                or name.startswith("transformer.0.")}

    assert names(CLIP_VISION["nano_clip"]) == names(CLIP_VISION["clip_vit_h_14"])
