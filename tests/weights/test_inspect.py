"""What `inspect` tells a user about a file."""
import pytest
import torch
from safetensors.torch import save_file

from tests.vocabulary import write_gguf_text_encoder
from tests.weights.lora.lora_files import LINEAR, low_rank, random
from wan_core.nano import TEXT_ENCODER
from wan_core.presets import TEXT_ENCODERS, TRANSFORMERS, VAES
from wan_core.weights import LoadError, describe, expected_shapes, format_report, open_model


@pytest.fixture
def nano():
    return expected_shapes(TRANSFORMERS["nano_t2v"])


def write(path, shapes, metadata=None, dtype=torch.bfloat16):
    save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, path, metadata)
    return path


def test_a_complete_model(tmp_path, nano):
    """A whole file is reported with presets, prefix, counts, types, size and metadata."""
    path = write(tmp_path / "x.safetensors", {"model.diffusion_model." + k: v for k, v in nano.items()}, {"note": "hi"})
    report = describe(path)
    assert report.recognition.names == ("nano_t2v", "nano_t2v_a") and report.prefix == "model.diffusion_model."
    assert report.tensors == len(nano) and report.dtypes == (("bfloat16", len(nano)),)
    assert report.parameters == sum(torch.Size(shape).numel() for shape in nano.values())
    assert report.nbytes == path.stat().st_size and report.metadata_keys == ("note",)
    assert report.checked and not report.missing + report.unexpected + report.misshapen
    text = format_report(report)
    assert "Nano T2V" in text and "every tensor is there" in text and "'model.diffusion_model.'" in text


def test_an_incomplete_model(tmp_path, nano):
    """Missing, unexpected and misshapen tensors are listed."""
    shapes = nano | {"extra": (1,), "blocks.1.norm3.bias": (7,)}
    del shapes["blocks.0.self_attn.q.weight"]
    report = describe(write(tmp_path / "x.safetensors", shapes))
    assert report.missing == ("blocks.0.self_attn.q.weight",) and report.unexpected == ("extra",)
    assert report.misshapen == ("blocks.1.norm3.bias",)
    text = format_report(report)
    assert "missing     1: blocks.0.self_attn.q.weight" in text and "every tensor" not in text


def test_text_encoder_with_tokenizer(tmp_path):
    """The tokenizer inside a text encoder file is seen and counts neither as weight nor as stranger."""
    shapes = expected_shapes(TEXT_ENCODERS["nano_umt5"])
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(given | {"spiece_model": torch.zeros(10, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    report = describe(tmp_path / "x.safetensors")
    assert report.tokenizer == "spiece_model" and not report.unexpected
    assert report.parameters == sum(tensor.numel() for tensor in given.values())
    assert "tokenizer   inside (spiece_model)" in format_report(report)


def test_text_encoder_with_vocabulary_in_the_header(tmp_path):
    """The vocabulary in the header of a GGUF text encoder is seen; a file without it says nothing of a tokenizer."""
    path = write_gguf_text_encoder(tmp_path / "x.gguf", TEXT_ENCODER)
    report, count = describe(path), TEXT_ENCODERS["nano_umt5"].vocab_size
    assert report.checked and report.complete and report.tokenizer == f"vocabulary of {count} pieces"
    assert f"tokenizer   inside (vocabulary of {count} pieces)" in format_report(report)
    report = describe(write_gguf_text_encoder(tmp_path / "y.gguf", TEXT_ENCODER, tokenizer=False))
    assert report.complete and not report.tokenizer and "tokenizer" not in format_report(report)


def test_models_that_cannot_run_yet(tmp_path, nano):
    """A recognised model without its module is named, with a note and without a made-up completeness."""
    shapes = nano | {"face_adapter.fuser_blocks.0.k_norm.weight": (128,)}
    report = describe(write(tmp_path / "x.safetensors", shapes))
    assert report.recognition.spec.model_type == "animate" and not report.checked
    assert "cannot run it yet" in format_report(report)


def test_quantised_types_are_counted(tmp_path, nano):
    """FP8 weights are counted by their format, and nothing is said against them."""
    report = describe(write(tmp_path / "x.safetensors", nano, dtype=torch.float8_e4m3fn))
    assert report.dtypes == (("FP8 e4m3", len(nano)),) and report.checked and not report.remark


def test_types_without_arithmetic_are_noted(tmp_path, nano):
    """Types that this version cannot compute with are noted, in the words in which loading refuses them."""
    path = write(tmp_path / "x.safetensors", nano, dtype=torch.int8)
    report = describe(path)
    assert report.remark.startswith("Weights of type int8 are not supported in this version; use the bf")
    with pytest.raises(LoadError) as caught:
        open_model(path, "transformer")
    assert report.remark[1:] in str(caught.value)


def test_foreign_files(tmp_path):
    """A LoRA is called one; a file of another format is the same error as on loading."""
    report = describe(write(tmp_path / "x.safetensors", {"blocks.0.self_attn.q.lora_A.weight": (4, 128)}))
    assert report.recognition.kind == "lora" and "LoRA" in format_report(report)
    assert report.lora is None and "its counterpart (up) is missing" in report.remark
    (tmp_path / "y.safetensors").write_text("<html>")
    with pytest.raises(LoadError, match="web page"):
        describe(tmp_path / "y.safetensors")


def test_formats_by_kind_of_layer(tmp_path, nano):
    """Each kind of layer is reported with the formats of its tensors, in a fixed order."""
    tensors = {name: torch.zeros(shape, dtype=torch.float8_e4m3fn if ".ffn." in name and len(shape) == 2 else
                                 torch.bfloat16) for name, shape in nano.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    layers = dict(describe(tmp_path / "x.safetensors").layers)
    assert list(layers) == ["self_attn", "cross_attn", "ffn", "modulation", "norms", "embeddings", "head"]
    assert dict(layers["ffn"]) == {"FP8 e4m3": 12, "bfloat16": 12} and dict(layers["self_attn"]) == {"bfloat16": 48}
    assert sum(count for formats in layers.values() for _, count in formats) == len(nano)
    text = describe(write(tmp_path / "y.safetensors", expected_shapes(TRANSFORMERS["nano_vace"])))
    assert "vace" in dict(text.layers)
    vae = dict(describe(write(tmp_path / "z.safetensors", expected_shapes(VAES["nano_vae"]))).layers)
    assert {"encoder", "decoder"} <= set(vae)


def test_a_lora_in_detail(tmp_path):
    """A LoRA file is described by kinds of adapters, ranks, layers, the model it seems to be for, and its experts."""
    tensors = {"strange.key": random(2), "diffusion_model.blocks.1.norm3.diff": random(128)}
    for number, module in enumerate(("blocks.0.self_attn.q", "blocks.3.ffn.2", "blocks.2.cross_attn.k_img")):
        name = f"diffusion_model.{module}"
        shape = LINEAR["t2v"].get(module, (128, 128))
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = low_rank(shape, rank=4 + number // 2)
    tensors["diffusion_model.blocks.0.self_attn.q.dora_scale"] = random(128, 1)
    tensors |= {f"diffusion_model.blocks.0.self_attn.k.lokr_{part}": random(*shape) for part, shape in
                (("w1", (4, 4)), ("w2_a", (32, 2)), ("w2_b", (2, 32)))}
    save_file(tensors, tmp_path / "x.safetensors")
    report = describe(tmp_path / "x.safetensors")
    found = report.lora
    assert dict(found.kinds) == {"LoRA": 2, "DoRA of LoRA": 1, "LoKr": 1, "full difference": 1}
    assert found.ranks == ((2, 1), (4, 2), (5, 1)) and found.unknown == ("strange.key",)
    assert dict(found.layers) == {"self_attn": 2, "ffn": 1, "cross_attn": 1, "norms": 1}
    assert (found.width, found.blocks, found.experts) == (128, 4, ("both",)) and found.fits == ("nano_i2v",)
    text = format_report(report)
    assert "made for    a model of width 128 with 4 blocks: nano_i2v" in text and "unknown     1: strange.key" in text


def test_the_models_that_a_lora_fits(tmp_path):
    """Width and blocks tell the released models apart, and adapters of the CLIP branch those that have one."""
    def fits(**shapes):
        save_file({f"{module}.lora_{kind}.weight": factor for module, shape in shapes.items()
                   for kind, factor in zip("AB", low_rank(shape), strict=True)}, tmp_path / "x.safetensors")
        return describe(tmp_path / "x.safetensors").lora.fits

    assert "wan22_t2v_a14b" in fits(**{"blocks.39.self_attn.q": (5120, 5120)})
    assert set(fits(**{"blocks.0.cross_attn.k_img": (5120, 1280), "blocks.39.cross_attn.q": (5120, 5120)})) == {
        "wan21_i2v_14b", "wan21_flf2v_14b", "wan22_animate_14b"}
    assert fits(**{"blocks.29.self_attn.q": (3072, 3072)}) == ("wan22_ti2v_5b",)
    assert fits(**{"blocks.40.self_attn.q": (5120, 5120)}) == ()


def test_contradictory_shapes_do_not_stop_the_report(tmp_path):
    """A file whose sizes cannot be built is still described."""
    shapes = expected_shapes(VAES["nano_vae"]) | {"conv2.weight": (4, 4, 1, 1, 1)}
    report = describe(write(tmp_path / "x.safetensors", shapes))
    assert not report.checked and "4 latent channels" in format_report(report)
