"""Filling modules: every difference between file and module is found before anything is assigned."""
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan_core.presets import CLIP_VISION, TEXT_ENCODERS, TRANSFORMERS, VAES, TransformerSpec
from wan_core.weights import (
    LoadError,
    build_module,
    expected_shapes,
    load_module,
    open_model,
    open_weights,
    recognise_file,
)
from wan_core.weights.dialects import UMT5_TRANSFORMERS

SPEC = TransformerSpec(model_type="t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=16)


class Small(nn.Module):
    """A parameter, a nested one and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.zeros(4))


def small() -> Small:
    with torch.device("meta"):
        return Small()


def tensors() -> dict[str, torch.Tensor]:
    return {"inner.weight": torch.randn(2, 3), "inner.bias": torch.randn(2), "scale": torch.randn(2),
            "table": torch.randn(4)}


def random_file(path, shapes, prefix="", dtype=torch.float32):
    save_file({prefix + name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, path)
    return path


def test_parameters_and_buffers_get_their_values():
    """Parameters and buffers hold the given numbers, on the CPU, frozen, and nothing was copied."""
    given = tensors()
    module = load_module(small(), given)
    assert all(torch.equal(value, given[name]) for name, value in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.scale.data_ptr() == given["scale"].data_ptr()
    assert isinstance(module.inner.weight, nn.Parameter) and not isinstance(module.table, nn.Parameter)


def test_file_tensors_are_assigned_as_views(tmp_path):
    """A model of the file's own type on the CPU is the mapped file itself."""
    save_file(tensors(), tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as file:
        module = load_module(small(), file)
        assert module.inner.weight.data_ptr() == file["inner.weight"].data_ptr()


def test_types_are_chosen_per_tensor():
    """`dtype_for` sees name and stored type and decides."""
    seen = {}

    def dtype_for(name, dtype):
        seen[name] = dtype
        return torch.bfloat16 if name.startswith("inner") else torch.float32

    given = tensors()
    given["scale"] = given["scale"].half()
    module = load_module(small(), given, dtype_for=dtype_for)
    assert seen["scale"] == torch.float16 and module.scale.dtype == torch.float32
    assert module.inner.weight.dtype == torch.bfloat16


def test_all_differences_are_in_one_error(tmp_path):
    """Missing, unexpected and misshapen tensors are named together, and the module stays empty."""
    given = tensors() | {"scale": torch.ones(5), "other": torch.ones(1)}
    del given["inner.bias"]
    save_file(given, tmp_path / "x.safetensors")
    module = small()
    with pytest.raises(LoadError) as caught:
        load_module(module, open_weights(tmp_path / "x.safetensors"))
    text = str(caught.value)
    for part in ("x.safetensors does not fit Small", "missing tensors: inner.bias;", "unexpected tensors: other;",
                 "scale is [5] and should be [2]", "seems to be an unknown model"):
        assert part in text
    assert all(parameter.is_meta for parameter in module.parameters())


def test_only_the_first_few_names_are_listed():
    """A wholly different file does not flood the message."""
    with pytest.raises(LoadError, match="and 197 more") as caught:
        load_module(small(), tensors() | {f"blocks.{i}.lora_A.weight": torch.ones(1) for i in range(200)})
    assert "a LoRA" in str(caught.value) and len(str(caught.value)) < 400


def test_extras_are_ignored_by_name_only():
    """The tokenizer in repackaged files does not count as unexpected, other extras do."""
    extras = {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    load_module(small(), tensors() | extras)
    with pytest.raises(LoadError, match="unexpected tensors: spiece_model"):
        load_module(small(), tensors() | extras, ignore=())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_types_without_arithmetic_are_refused_by_name(dtype):
    """Quantised weights are an error that names their type, not noise in the video."""
    given = tensors()
    given["inner.weight"] = given["inner.weight"].to(getattr(torch, dtype))
    with pytest.raises(LoadError, match=f"{dtype} are not supported in this version; use the bfloat16"):
        load_module(small(), given)


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
def test_transformer_files_load_under_every_prefix(tmp_path, prefix):
    """From a file with any prefix to a filled transformer."""
    path = random_file(tmp_path / "x.safetensors", expected_shapes(SPEC), prefix, torch.bfloat16)
    file, recognition = open_model(path, "transformer")
    module = load_module(build_module(recognition.spec), file)
    assert recognition.spec == SPEC and not any(p.is_meta for p in module.parameters())
    assert module.head.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind, spec", [
    ("transformer", TRANSFORMERS["nano_t2v"]), ("vae", VAES["nano_vae"]), ("text_encoder", TEXT_ENCODERS["nano_umt5"]),
    ("clip_vision", CLIP_VISION["nano_clip"])])
def test_nothing_stays_on_the_meta_device(tmp_path, kind, spec):
    """A loaded module has no empty parameter or buffer left, whether it is in the checkpoint or not."""
    file, recognition = open_model(random_file(tmp_path / "x.safetensors", expected_shapes(spec)), kind)
    module = load_module(build_module(recognition.spec), file)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_transformers_layout_of_the_text_encoder(tmp_path, embedding):
    """ComfyUI's repackaged text encoder fills the official module with the right tensors."""
    spec = TEXT_ENCODERS["nano_umt5"]
    expected = {name: torch.randn(shape) for name, shape in expected_shapes(spec).items()}
    stored = {"spiece_model": torch.zeros(5, dtype=torch.uint8)}
    for theirs, ours in UMT5_TRANSFORMERS.items():
        for block in range(spec.num_layers if "{}" in theirs else 1):
            stored[f"{theirs}.weight".format(block)] = expected[f"{ours}.weight".format(block)]
    if embedding == "both":
        stored["encoder.embed_tokens.weight"] = stored["shared.weight"].clone()
    else:
        stored[embedding] = stored.pop("shared.weight")
    save_file(stored, tmp_path / "x.safetensors")
    file, recognition = open_model(tmp_path / "x.safetensors", "text_encoder")
    module = load_module(build_module(recognition.spec), file)
    assert recognition.names == ("nano_umt5",) and "spiece_model" in file
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_the_wrong_kind_of_file_is_named(tmp_path):
    """A VAE where a transformer belongs is told by name, before anything is built."""
    path = random_file(tmp_path / "x.safetensors", expected_shapes(VAES["nano_vae"]))
    with pytest.raises(LoadError, match=r"x.safetensors seems to be a Wan VAE \(nano_vae\). Choose .* a transformer"):
        open_model(path, "transformer")


@pytest.mark.parametrize("name, shape, what", [
    ("face_adapter.fuser_blocks.0.k_norm.weight", (128,), "animate"),
    ("casual_audio_encoder.encoder.final_linear.weight", (128, 128), "s2v"),
])
def test_known_models_that_cannot_run_yet(tmp_path, name, shape, what):
    """A released model without its branch is refused as what it is."""
    path = random_file(tmp_path / "x.safetensors", expected_shapes(SPEC) | {name: shape})
    with pytest.raises(LoadError, match=f"recognised as .*{what}.* cannot run yet"):
        open_model(path, "transformer")


SPECS = {"transformer": SPEC, "vae": VAES["nano_vae"], "text_encoder": TEXT_ENCODERS["nano_umt5"]}
LAST = {"transformer": "head.head.bias", "vae": "decoder.head.2.bias", "text_encoder": "norm.weight"}


def spoil(tensors: dict[str, torch.Tensor], name: str, how: str) -> str:
    """Makes a checkpoint unfit in one tensor; returns what an error must say of it."""
    shape = list(tensors[name].shape)
    match how:
        case "missing":
            del tensors[name]
            return f"missing tensors: {name}"
        case "unexpected":
            tensors["extra.weight"] = torch.ones(2)
            return "unexpected tensors: extra.weight"
        case "misshapen":
            tensors[name] = torch.ones(7, 7)
            return f"misshapen tensors: {name} is [7, 7] and should be {shape}"
        case _:
            tensors[name] = tensors[name].to(getattr(torch, how))
            return f"weights of type {how} are not supported in this version; use the bfloat16"


@pytest.mark.parametrize("how", ["missing", "unexpected", "misshapen", "int8"])
@pytest.mark.parametrize("kind", SPECS)
def test_unfit_files_are_refused_when_they_are_opened(tmp_path, kind, how):
    """The header is enough to refuse a file, and the text is the one that loading would give."""
    tensors = {name: torch.zeros(shape) for name, shape in expected_shapes(SPECS[kind]).items()}
    message = spoil(tensors, LAST[kind], how)
    save_file(tensors | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    with pytest.raises(LoadError) as opening:
        open_model(tmp_path / "x.safetensors", kind)
    file, recognition = recognise_file(open_weights(tmp_path / "x.safetensors"))
    with pytest.raises(LoadError) as loading:
        load_module(build_module(recognition.spec), file)
    assert message in str(opening.value) and str(opening.value) == str(loading.value)
    assert str(opening.value).startswith("x.safetensors does not fit") and "spiece_model" not in str(opening.value)


@pytest.mark.parametrize("branch", [
    {"img_emb.proj.0.bias": (40,)}, {"vace_patch_embedding.weight": (128, 96, 1, 2, 2)},
    {"vace_patch_embedding.weight": (128, 96, 1, 2, 2), "vace_blocks.0.before_proj.weight": (128, 128)}])
def test_branches_that_are_cut_off_are_refused_when_they_are_opened(tmp_path, branch):
    """The first tensors of an image or control branch and nothing more of it."""
    path = random_file(tmp_path / "x.safetensors", expected_shapes(SPEC) | branch)
    with pytest.raises(LoadError, match="x.safetensors .*(missing tensors: .* seems to be|control blocks are missing)"):
        open_model(path, "transformer")


def test_sizes_that_contradict_each_other_are_refused_when_they_are_opened(tmp_path):
    """An architecture that cannot be built at all is an error that names the file."""
    shapes = {name: (70, *shape[1:]) if name.endswith("attn.q.weight") else shape
              for name, shape in expected_shapes(TEXT_ENCODERS["nano_umt5"]).items()}
    with pytest.raises(LoadError, match="x.safetensors seems to be a UMT5 encoder.*, but .*70 is not a multiple of"):
        open_model(random_file(tmp_path / "x.safetensors", shapes), "text_encoder")


def test_names_that_collide_without_their_prefix(tmp_path):
    """A file with two copies of a tensor is refused instead of taking either."""
    save_file({"model.a": torch.ones(1), "model.b": torch.ones(1), "a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match="x.safetensors.*two copies"):
        open_model(tmp_path / "x.safetensors", "vae")
