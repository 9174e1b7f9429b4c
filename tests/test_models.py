"""Handles: opening reads a header and no weights, what does not fit is refused, precision reaches the right tensors."""

import json
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch

from tests.golden_cases import golden_dir
from tests.small_models import (
    SMALL,
    save_module,
    write_clip_vision,
    write_halves,
    write_hollow,
    write_text_encoder,
    write_transformer,
)
from tests.vocabulary import write_gguf_text_encoder
from wan_core import nano
from wan_core.conditioning import TextCondition, VaceCondition
from wan_core.dit import ModelInputs, WanTransformer
from wan_core.memory import OneAtATime
from wan_core.models import (
    Model,
    Part,
    add_vace,
    load_clip_vision,
    load_experts,
    load_model,
    load_text_encoder,
    load_vae,
)
from wan_core.presets import CLIP_VISION, PRESETS, TEXT_ENCODERS, TRANSFORMERS, VAES, TransformerSpec
from wan_core.sampling import Conditions, Guidance, denoise, make_schedule
from wan_core.training.nano_tokenizer import train_tokenizer
from wan_core.vae import Tiling
from wan_core.vision import preprocess
from wan_core.weights import LoadError, expected_shapes, save_weights
from wan_core.weights.fp8 import choose_fp8_products

CPU = OneAtATime("cpu")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Files with the released models' tensors, hollow: dozens of GB that are not there."""
    folder = tmp_path_factory.mktemp("released")

    def write(name):
        shapes = json.loads((golden_dir() / "keys" / f"{name}.json").read_text())
        return write_hollow(folder / f"{name}.safetensors", {key: tuple(shape) for key, shape in shapes.items()})

    return {name: write(name) for name in ("wan21_t2v_14b", "wan21_t2v_1_3b", "wan22_i2v_a14b_expert")}


def resident_bytes() -> int:
    """Memory in use by this process; 0 where the system does not say it in Linux's way."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def test_opening_reads_the_header_alone(released):
    """A handle on two experts of 28.6 GB is made in a moment and takes no memory for weights."""
    path = released["wan21_t2v_14b"]
    assert path.stat().st_size > 28e9
    began, before = time.process_time(), resident_bytes()
    model = load_experts(path, path, placement=CPU)
    assert time.process_time() - began < 5
    assert resident_bytes() - before < 100e6
    assert model.preset is PRESETS["wan22_t2v_a14b"] and model.high.stored_dtype == torch.bfloat16
    assert model.spec == TRANSFORMERS["wan21_t2v_14b"] and model.high.label == "wan21_t2v_14b.safetensors"


def test_the_architecture_decides_on_the_preset(released):
    """Among presets of one architecture the plain one is taken unless another is named; pairs are pairs."""
    path = released["wan21_t2v_14b"]
    assert load_model(path, placement=CPU).preset.name == "wan21_t2v_14b"
    assert load_model(path, preset="wan21_t2i_14b", placement=CPU).preset.name == "wan21_t2i_14b"
    assert load_experts(path, path, preset="wan22_t2v_a14b", placement=CPU).preset.name == "wan22_t2v_a14b"
    assert load_model(released["wan21_t2v_1_3b"], placement=CPU).preset.name == "wan21_t2v_1_3b"


def test_two_image_to_video_experts_are_their_own_preset(released):
    """The shapes tell I2V-A14B from T2V-A14B: its boundary, shift and guidance are taken without being asked for."""
    path = released["wan22_i2v_a14b_expert"]
    pair = load_experts(path, path, placement=CPU)
    sampling = pair.preset.sampling
    assert pair.preset.name == "wan22_i2v_a14b" and pair.boundary == 0.9
    assert (sampling.guidance_high, sampling.guidance_low, sampling.shift) == (3.5, 3.5, 5.0)
    with pytest.raises(LoadError, match="different architectures.*fits wan22_i2v_a14b, .*fits wan21_t2v_14b"):
        load_experts(path, released["wan21_t2v_14b"], placement=CPU)


def test_presets_that_do_not_fit_are_refused(released, files):
    """An unknown preset, one of another architecture, a pair where a single model is wanted and the other way round."""
    large, small = released["wan21_t2v_14b"], released["wan21_t2v_1_3b"]
    with pytest.raises(ValueError, match="unknown preset 'wan3'; known are wan21_t2v_1_3b"):
        load_model(small, preset="wan3", placement=CPU)
    with pytest.raises(LoadError, match="1_3b.safetensors is no single model of preset nano_t2v; it fits wan21_t2v_1"):
        load_model(small, preset="nano_t2v", placement=CPU)
    with pytest.raises(LoadError, match="no single model of preset wan22_t2v_a14b; it fits wan21_t2v_14b"):
        load_model(large, preset="wan22_t2v_a14b", placement=CPU)
    with pytest.raises(LoadError, match="no pair of experts of preset wan21_t2v_14b; it fits wan22_t2v_a14b"):
        load_experts(large, large, preset="wan21_t2v_14b", placement=CPU)
    with pytest.raises(LoadError, match="there is no pair of experts of that architecture. Open it as a single"):
        load_experts(small, small, placement=CPU)
    with pytest.raises(LoadError, match="no single model of that architecture. Open the files of both experts"):
        load_model(released["wan22_i2v_a14b_expert"], placement=CPU)


def test_a_pair_of_two_architectures_is_refused(released, files):
    """A high-noise file with the low-noise file of another model is an error that names both."""
    with pytest.raises(LoadError, match="14b.safetensors fits wan21_t2v_14b.*model.safetensors fits nano_t2v"):
        load_experts(released["wan21_t2v_14b"], files.model, placement=CPU)


def test_an_unreleased_size_is_refused(tmp_path):
    """A text-to-video transformer of no known size has no sampling defaults, so it is an error that says so."""
    spec = TransformerSpec(model_type="t2v", dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16)
    path = write_hollow(tmp_path / "other.safetensors", expected_shapes(spec))
    with pytest.raises(LoadError, match="other.safetensors fits no released model"):
        load_model(path, placement=CPU)


def test_files_of_another_kind_are_refused(files):
    """Each loader takes its own kind of file only, and says what the other one is."""
    with pytest.raises(LoadError, match="vae.safetensors seems to be a Wan VAE.*holds a transformer"):
        load_model(files.vae, placement=CPU)
    with pytest.raises(LoadError, match="model.safetensors seems to be Nano T2V.*holds a VAE"):
        load_vae(files.model, placement=CPU)
    with pytest.raises(LoadError, match="vae.safetensors seems to be.*holds a text encoder"):
        load_text_encoder(files.vae, placement=CPU)


def test_tokenizer_comes_from_the_file_or_beside_it(files, tmp_path):
    """Inside the checkpoint, as spiece.model beside it, or given by name; without any of them it is an error."""
    inside = load_text_encoder(files.text_encoder, placement=CPU).tokenizer
    bare = write_text_encoder(tmp_path / "bare.safetensors", tokenizer=False)
    with pytest.raises(LoadError, match="bare.safetensors holds no tokenizer, .* Give google/umt5-xxl's"):
        load_text_encoder(bare, placement=CPU)
    (tmp_path / "other.model").write_bytes(inside.to_bytes())
    given = load_text_encoder(bare, tokenizer=tmp_path / "other.model", placement=CPU).tokenizer
    (tmp_path / "spiece.model").write_bytes(inside.to_bytes())
    beside = load_text_encoder(bare, placement=CPU).tokenizer
    text = "a red circle moving left"
    assert inside.pieces(text) == given.pieces(text) == beside.pieces(text)
    with pytest.raises(ValueError, match="cannot read tokenizer"):
        load_text_encoder(bare, tokenizer=tmp_path / "absent.model", placement=CPU)


@pytest.mark.parametrize("encoder, tokenizer", [
    ("text_encoder/model.safetensors", "tokenizer/spiece.model"), ("umt5.safetensors", "tokenizer/spiece.model"),
    ("umt5.safetensors", "google/umt5-xxl/spiece.model")])
@pytest.mark.parametrize("how", ["file", "folder", "relative"])
def test_tokenizer_comes_from_the_folders_of_a_model(files, tmp_path, monkeypatch, encoder, tokenizer, how):
    """In the layout of diffusers and in that of the official repositories it is found, by whatever path one comes."""
    inside = load_text_encoder(files.text_encoder, placement=CPU).tokenizer
    path, spiece = tmp_path / encoder, tmp_path / tokenizer
    for folder in (path.parent, spiece.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_text_encoder(path, tokenizer=False)
    with pytest.raises(LoadError, match="tokenizer/spiece.model or google/umt5-xxl/spiece.model in its folder"):
        load_text_encoder(path, placement=CPU)
    spiece.write_bytes(inside.to_bytes())
    monkeypatch.chdir(path.parent)
    given = {"file": path, "folder": tmp_path, "relative": path.name}[how]
    assert load_text_encoder(given, placement=CPU).tokenizer.to_bytes() == inside.to_bytes()


def test_the_nearest_tokenizer_is_taken(files, tmp_path):
    """What is given comes before what is inside the file, then what is beside it, then what is in other folders."""
    def spiece(path, words):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train_tokenizer(words.split(), 300))
        return path

    folder = tmp_path / "text_encoder"
    folder.mkdir()
    bare = write_text_encoder(folder / "bare.safetensors", tokenizer=False)
    within = write_gguf_text_encoder(folder / "within.gguf", files.text_encoder)
    places = [spiece(tmp_path / place, words) for place, words in (
        ("text_encoder/google/umt5-xxl/spiece.model", "red green"), ("text_encoder/tokenizer/spiece.model", "one two"),
        ("tokenizer/spiece.model", "left right"), ("text_encoder/spiece.model", "circle square"))]
    given = spiece(tmp_path / "given.model", "slow fast")
    for path in places[::-1]:
        assert load_text_encoder(bare, placement=CPU).tokenizer.to_bytes() == path.read_bytes()
        path.rename(path.with_name("away"))
    for path in places:
        path.with_name("away").rename(path)
    for file in (within, files.text_encoder, bare):
        encoder = load_text_encoder(file, tokenizer=given, placement=CPU)
        assert encoder.tokenizer.to_bytes() == given.read_bytes()
    def ids(file):
        return load_text_encoder(file, placement=CPU).tokenizer.pieces("a red circle moving left")

    assert ids(within) == ids(files.text_encoder) != ids(bare)


def test_a_gguf_text_encoder_is_whole(tmp_path):
    """The bundled encoder as one GGUF file, tokenizer and all, gives the same embeddings as the safetensors file."""
    path = write_gguf_text_encoder(tmp_path / "umt5.gguf", nano.TEXT_ENCODER)
    ours, theirs = load_text_encoder(path, placement=CPU), load_text_encoder(placement=CPU)
    prompts = ["a red circle moving left", "", "ｒｅｄ 日本 (green:1.3) 😀"]
    assert torch.equal(ours.encode(prompts), theirs.encode(prompts))
    with pytest.raises(LoadError, match="bare.gguf holds no tokenizer"):
        load_text_encoder(write_gguf_text_encoder(tmp_path / "bare.gguf", nano.TEXT_ENCODER, tokenizer=False))


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path):
    """More pieces than the encoder has embeddings is an error, not an index out of range."""
    larger = train_tokenizer((f"{a}{b} {b}{a}" for a in "abcdefghij" for b in "klmnopqrstuvwxyz"), 600)
    (tmp_path / "spiece.model").write_bytes(larger)
    encoder = load_text_encoder(files.text_encoder, tokenizer=tmp_path / "spiece.model", placement=CPU)
    assert encoder.tokenizer.vocab_size > 336
    with pytest.raises(ValueError, match="the tokenizer has .* pieces but the text encoder only 336"):
        encoder.encode(["a red circle"])


def test_text_encoder_gives_zero_padded_embeddings(files):
    """512 rows per prompt, float32, zero beyond the prompt's tokens."""
    encoder = load_text_encoder(files.text_encoder, placement=OneAtATime("cpu"))
    context = encoder.encode(["a red circle moving left", ""])
    assert context.shape == (2, 512, 96) and context.dtype == torch.float32
    used = context.ne(0).any(-1).sum(1).tolist()
    assert used == [len(encoder.tokenizer.pieces("a red circle moving left")) + 1, 1]


def test_handles_are_values(files):
    """A handle cannot be changed; a changed copy shares the file and the placement and leaves the first as it was."""
    model = load_model(files.model, placement=CPU)
    with pytest.raises(FrozenInstanceError):
        model.attention = "sdpa-math"
    other = replace(model, attention="sdpa-math")
    assert model.attention == "sdpa" and other.low is model.low and other.placement is model.placement


def test_experts_are_chosen_by_the_boundary(files):
    """At or above 0.875 * 1000 the high-noise file, below it the low-noise one; a single model throughout."""
    pair = load_experts(files.high, files.low, placement=OneAtATime("cpu"))
    assert [pair.name_at(timestep) for timestep in (1000.0, 875.0, 874.99, 0.0)] == ["high", "high", "low", "low"]
    high = pair.get("high").head.head.weight.clone()
    assert not torch.equal(pair.get("low").head.head.weight, high)
    single = load_model(files.low, placement=OneAtATime("cpu"))
    assert single.boundary is None and {single.name_at(timestep) for timestep in (1000.0, 0.0)} == {"low"}
    assert torch.equal(single.get("low").head.head.weight, pair.get("low").head.head.weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_islands_keep_the_files_precision(files, dtype):
    """In half precision the matrices are converted; norms, modulation, time path and head stay float32."""
    model = load_model(files.model, placement=OneAtATime("cpu"), dtype=dtype).get("low")
    islands = ("time_embedding.", "time_projection.", "head.", "norm", "modulation")
    for name, parameter in model.named_parameters():
        expected = torch.float32 if any(part in name for part in islands) else getattr(torch, dtype)
        assert parameter.dtype == expected, name


def test_islands_stored_in_bf16_are_not_widened(tmp_path):
    """A file that is bf16 throughout stays so in memory; its islands still compute in float32."""
    torch.manual_seed(0)
    path = save_module(tmp_path / "half.safetensors", WanTransformer(TRANSFORMERS["nano_t2v"]).bfloat16())
    handle = load_model(path, placement=OneAtATime("cpu"), dtype="bfloat16")
    model = handle.get("low")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    text = model.prepare_text(torch.randn(1, 4, 96))
    with torch.no_grad():
        assert model(ModelInputs(torch.randn(1, 16, 1, 2, 2), torch.tensor([500.0]), text)).dtype == torch.float32
    assert load_model(path, placement=OneAtATime("cpu")).get("low").head.head.weight.dtype == torch.bfloat16


def test_stored_dtype_is_that_of_most_weights(tmp_path):
    """Many small float32 tensors do not outvote few large bf16 ones, nor does a tokenizer."""
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16 if len(shape) > 1 else torch.float32)
               for name, shape in expected_shapes(TRANSFORMERS["nano_t2v"]).items()}
    save_weights(tmp_path / "mixed.safetensors", tensors)
    assert Part.open(tmp_path / "mixed.safetensors", "transformer").stored_dtype == torch.bfloat16


@pytest.mark.parametrize(("load", "spec"), [
    (load_model, TRANSFORMERS["nano_t2v"]), (load_experts, TRANSFORMERS["nano_t2v"]), (load_vae, VAES["nano_vae"]),
    (load_text_encoder, TEXT_ENCODERS["nano_umt5"])])
def test_unfit_weights_are_refused_at_once(tmp_path, load, spec):
    """A quantised or an incomplete file is an error when the handle is made, before another model has run."""
    shapes = expected_shapes(spec)
    save_weights(tmp_path / "int8.safetensors", {name: torch.zeros(shape, dtype=torch.int8)
                                                 for name, shape in shapes.items()})
    with pytest.raises(LoadError, match="int8.safetensors does not fit.*weights of type int8 are not supported"):
        load(tmp_path / "int8.safetensors", placement=CPU)
    last = list(shapes)[-1]
    cut = write_hollow(tmp_path / "cut.safetensors", {name: shape for name, shape in shapes.items() if name != last})
    with pytest.raises(LoadError, match=f"cut.safetensors does not fit.*missing tensors: {last}"):
        load(cut, placement=CPU)


def test_bf16_run_stays_near_the_fp32_run(files):
    """A single step of sampling in bf16 is within 2e-2 relative of fp32."""
    context = TextCondition(torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(0)))
    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    exact, rounded = (
        denoise(load_model(files.model, placement=OneAtATime("cpu"), dtype=dtype), noise,
                make_schedule("euler", 1, 3.0), Conditions([context]), Guidance(1.0, 1.0), solver="euler")
        for dtype in ("float32", "bfloat16"))
    assert 0 < (rounded - exact).norm() <= 2e-2 * (exact - noise).norm()


def test_unknown_precision_is_refused_at_once(files):
    """A wrong precision is an error when the handle is made, before any text is encoded."""
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        load_model(files.model, dtype="int3", placement=CPU)
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        load_experts(files.high, files.low, dtype="int3", placement=CPU)
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        load_vae(files.vae, dtype="int3", placement=CPU)


def test_unknown_attention_is_refused_at_once(files):
    """So is a wrong attention backend."""
    with pytest.raises(ValueError, match="unknown attention backend 'saga'"):
        load_model(files.model, attention="saga", placement=CPU)
    with pytest.raises(ValueError, match="unknown attention backend 'saga'"):
        load_experts(files.high, files.low, attention="saga", placement=CPU)


def test_tiles_off_the_grid_are_refused_at_once(files):
    """A tiling that cannot work is an error when the handle is made."""
    with pytest.raises(ValueError, match="tile height is 60"):
        load_vae(files.vae, tiling=Tiling(60, 64, 16), placement=CPU)


def test_vae_handle_runs_as_it_was_made(files):
    """The handle's tiling and precision reach the VAE, both ways."""
    plain = load_vae(files.vae, placement=OneAtATime("cpu"))
    assert plain.spec == VAES["nano_vae"]
    tiled = replace(plain, tiling=Tiling(16, 16, 8))
    latents, calls = torch.randn(1, 16, 1, 4, 2, generator=torch.Generator().manual_seed(0)), []
    assert plain.decode(latents, on_piece=lambda: calls.append("plain")).shape == (1, 3, 1, 32, 16)
    tiled.decode(latents, on_piece=lambda: calls.append("tiled"))
    tiled.encode(torch.zeros(1, 3, 1, 32, 16), on_piece=lambda: calls.append("tiled"))
    assert calls == ["plain"] + 6 * ["tiled"]
    half = replace(plain, dtype="bfloat16")
    assert half.module().conv1.weight.dtype == torch.bfloat16
    out = torch.empty(1, 3, 1, 32, 16)
    assert half.decode(latents, out=out).data_ptr() == out.data_ptr()


def test_clip_vision_handle_runs_as_it_was_made(tmp_path):
    """Pictures are prepared with the crop that is asked for; precision and on_block reach the module."""
    path = write_clip_vision(tmp_path / "clip.safetensors")
    encoder, called = load_clip_vision(path, placement=OneAtATime("cpu")), []
    picture = torch.rand(2, 3, 40, 90, generator=torch.Generator().manual_seed(0)) * 2 - 1
    squashed = encoder.encode(picture, on_block=called.append)
    assert encoder.spec == CLIP_VISION["nano_clip"] and called == [0, 1, 2]
    assert squashed.shape == (2, 17, 64) and squashed.dtype == torch.float32 and not squashed.requires_grad
    assert torch.equal(squashed, encoder.module()(preprocess(picture, 64)))
    assert torch.equal(encoder.encode(picture, "center"), encoder.module()(preprocess(picture, 64, "center")))
    half = replace(encoder, dtype="bfloat16")
    assert half.module().head.dtype == torch.bfloat16 and half.encode(picture).dtype == torch.float32
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        load_clip_vision(path, dtype="int3", placement=CPU)


def test_other_files_are_no_clip_vision_model(files, tmp_path):
    """Another part of a model and another CLIP are refused as what they are."""
    with pytest.raises(LoadError, match="vae.safetensors seems to be a Wan VAE.*holds a CLIP vision model"):
        load_clip_vision(files.vae, placement=CPU)
    vit_l = write_hollow(tmp_path / "l.safetensors", {
        "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 1024)})
    with pytest.raises(LoadError, match="l.safetensors seems to be a CLIP vision model, but its width is 1024"):
        load_clip_vision(vit_l, placement=CPU)
    clip = write_clip_vision(tmp_path / "clip.safetensors")
    with pytest.raises(LoadError, match=r"clip.safetensors seems to be a CLIP vision model \(nano_clip\).*holds a VAE"):
        load_vae(clip, placement=CPU)


def test_latents_and_prompts_that_do_not_fit_are_named(files):
    """Channels, dimensions and odd sizes of latents, and the width of an embedding, are checked on the handle."""
    model = load_model(files.model, placement=CPU)
    model.check_latents(torch.zeros(2, 16, 1, 2, 4))
    model.check_context(torch.zeros(1, 3, 96))
    for shape, message in (((1, 48, 1, 2, 2), r"Nano T2V takes \[batch, 16"), ((16, 1, 2, 2), r"\[16, 1, 2, 2\]"),
                           ((1, 16, 1, 3, 2), "16x24 pixels; width and height must be multiples of 16")):
        with pytest.raises(ValueError, match=message):
            model.check_latents(torch.zeros(shape))
    with pytest.raises(ValueError, match="width of 4096, Nano T2V takes 96. Use the text encoder nano_umt5"):
        model.check_context(torch.zeros(1, 3, 4096))


def handle(path: Path) -> Model:
    """A handle on a transformer of no released size, with the nano preset's settings."""
    part = Part.open(path, "transformer")
    return Model(part, part, PRESETS["nano_t2v"], OneAtATime("cpu"))


def run(model: Model, controls: bool = True) -> torch.Tensor:
    """One step of a model from fixed noise, with a fixed VACE control or without one."""
    noise, control, text = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in
                            enumerate([(1, 16, 2, 4, 4), (1, 96, 2, 4, 4), (1, 5, model.spec.text_dim)]))
    prompt = TextCondition(text, beside=(VaceCondition(control),) if controls else ())
    return denoise(model, noise, make_schedule("euler", 2, 1.0), Conditions([prompt]), Guidance(1.0, 1.0),
                   solver="euler")


def test_a_vace_module_makes_the_whole_model(tmp_path):
    """A whole VACE file, and the same weights as a text-to-video model with a module: bit for bit the same result."""
    save_weights(tmp_path / "whole.safetensors",
                 write_halves(tmp_path / "t2v.safetensors", tmp_path / "module.safetensors", SMALL["vace"]))
    plain, whole = handle(tmp_path / "t2v.safetensors"), handle(tmp_path / "whole.safetensors")
    joined = add_vace(plain, tmp_path / "module.safetensors")
    assert joined.spec == whole.spec == SMALL["vace"] and plain.spec == SMALL["t2v"]
    assert joined.high is joined.low and joined.preset.title == "Nano T2V with VACE"
    assert joined.low.label == "t2v.safetensors"
    result = run(whole)
    assert torch.equal(run(joined), result) and not torch.equal(run(whole, controls=False), result)
    assert torch.equal(run(joined, controls=False), run(plain, controls=False))


def test_vace_modules_of_an_expert_pair(tmp_path):
    """Each expert gets its own module, or both the same one; a single model takes one."""
    names = [[tmp_path / f"{expert}_{part}.safetensors" for part in ("t2v", "module")] for expert in ("high", "low")]
    tensors = [write_halves(*paths, TRANSFORMERS["nano_vace"], seed) for seed, paths in enumerate(names)]
    (high, high_module), (low, low_module) = names
    pair = load_experts(high, low, placement=OneAtATime("cpu"))

    def embedded(model: Model) -> list[torch.Tensor]:
        return [model.get(name).vace_patch_embedding.weight.clone() for name in ("high", "low")]

    own, shared = add_vace(pair, high_module, low_module), add_vace(pair, high_module)
    expected = [part["vace_patch_embedding.weight"] for part in tensors]
    assert own.spec == TRANSFORMERS["nano_vace"] and own.boundary == pair.boundary
    assert all(map(torch.equal, embedded(own), expected))
    assert all(map(torch.equal, embedded(shared), [expected[0], expected[0]]))
    assert torch.equal(own.get("low").head.head.weight, tensors[1]["head.head.weight"])
    with pytest.raises(ValueError, match="a second VACE module was given, and Nano T2V is a single model"):
        add_vace(load_model(high, placement=CPU), high_module, low_module)


def test_files_that_are_no_vace_module(files, tmp_path):
    """A whole model, another part, a module of another width or without a tensor: refused, the wrong file named."""
    module = tmp_path / "module.safetensors"
    tensors = write_halves(tmp_path / "t2v.safetensors", module, SMALL["vace"])
    nano, plain = load_model(files.model, placement=CPU), handle(tmp_path / "t2v.safetensors")
    with pytest.raises(LoadError, match="model.safetensors seems to be Nano T2V .*a whole VACE model is loaded as"):
        add_vace(nano, files.model)
    with pytest.raises(LoadError, match="vae.safetensors seems to be a Wan VAE"):
        add_vace(nano, files.vae)
    with pytest.raises(LoadError, match="module.safetensors seems to be a VACE module of 2 blocks.*a transformer"):
        load_model(module, placement=CPU)
    released = write_hollow(tmp_path / "large.safetensors", {
        name: shape for name, shape in expected_shapes(TRANSFORMERS["wan21_vace_14b"]).items()
        if name.startswith("vace_")})
    with pytest.raises(LoadError, match="large.safetensors is made for a text-to-video transformer of width 5120, and "
                                        ".*type t2v and width 128. Choose the module of t2v.safetensors"):
        add_vace(plain, released)
    with pytest.raises(LoadError, match="module.safetensors is made for a text-.*one of type i2v .*Add it to a text"):
        add_vace(handle(write_transformer(tmp_path / "i2v.safetensors", spec=SMALL["i2v"])), module)
    cut = {name: tensor for name, tensor in tensors.items() if name.startswith("vace_")}
    del cut["vace_blocks.1.after_proj.bias"]
    save_weights(tmp_path / "cut.safetensors", cut)
    with pytest.raises(LoadError, match="cut.safetensors cannot be added.*missing tensors: vace_blocks.1.after_proj"):
        add_vace(plain, tmp_path / "cut.safetensors")
    del cut["vace_blocks.0.before_proj.weight"]
    save_weights(tmp_path / "cut.safetensors", cut)
    with pytest.raises(LoadError, match="cut.safetensors is no whole VACE module: its tensor .*before_proj.weight. is"):
        add_vace(plain, tmp_path / "cut.safetensors")


def test_fp8_products_are_a_choice():
    """Promise: "off" multiplies the numbers that the weights stand for, "on" rounds the activations to FP8 too and
    stays near it, and the choice is that of each handle; where the device cannot, "on" is refused."""
    model = load_model(dtype="bfloat16", placement=CPU).quantised("fp8_scaled")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((1, 16, 2, 4, 4), generator=generator)
    context = torch.randn((1, 5, 96), generator=generator)

    def velocity(handle):
        module = handle.get("low")
        with torch.no_grad():
            return module(ModelInputs(latents, torch.tensor([700.0]), module.prepare_text(context)))

    off, on = velocity(replace(model, fp8_products="off")), velocity(replace(model, fp8_products="on"))
    assert torch.equal(velocity(model), off), "a CPU is not faster at it"
    assert 1e-3 < (on - off).norm() / off.norm() < 0.1
    assert "FP8 e4m3 weights in FP8" in replace(model, fp8_products="on").summary() and "in FP8" not in model.summary()
    with pytest.raises(ValueError, match="unknown choice of FP8 products 'yes'"):
        replace(model, fp8_products="yes")
    with pytest.raises(ValueError, match="the device meta has none: they need an NVIDIA card"):
        choose_fp8_products("on", torch.device("meta"))


@pytest.mark.parametrize("encode", [False, True])
def test_a_vae_that_runs_out_of_memory_goes_on_in_tiles(encode, caplog):
    """Promise: the result is that of tiles from the start, wherever memory ran out; with nothing left to save the error
    reaches the user."""
    vae = load_vae(placement=OneAtATime("cpu"))
    latents, video = torch.randn(1, 16, 2, 10, 10), torch.rand(1, 3, 5, 80, 80) * 2 - 1

    def run(handle):
        return handle.encode(video) if encode else handle.decode(latents)

    def fail(*_):
        raise torch.OutOfMemoryError("injected")

    expected = run(replace(vae, tiling=Tiling(64, 64, 8)))
    start = replace(vae, tiling=Tiling(128, 128, 16))
    start.module().get_submodule("encoder.middle.0" if encode else "decoder.middle.0").register_forward_hook(fail)
    assert torch.equal(run(start), expected)
    assert "goes on with tiles of 64 pixels" in caplog.text
    small = replace(vae, tiling=Tiling(64, 64, 8))
    small.module().get_submodule("encoder.middle.0" if encode else "decoder.middle.0").register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        run(small)


def test_a_text_encoder_that_runs_out_of_memory_goes_on_block_by_block(caplog):
    """Promise: its blocks come and go from then on, and the embedding is the same bit for bit."""
    encoder = load_text_encoder(placement=OneAtATime("cpu"))
    expected = encoder.encode(["a red circle"])

    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")

    encoder.module().blocks[1].register_forward_hook(fail)
    assert torch.equal(encoder.encode(["a red circle"]), expected)
    assert "goes on with its blocks coming and going" in caplog.text
