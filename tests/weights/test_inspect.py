"""What `inspect` tells a user about a file."""
import pytest
import torch
from safetensors.torch import save_file

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
    assert report.has_spiece_model and not report.unexpected
    assert report.parameters == sum(tensor.numel() for tensor in given.values())
    assert "tokenizer" in format_report(report)


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
    (tmp_path / "y.safetensors").write_text("<html>")
    with pytest.raises(LoadError, match="web page"):
        describe(tmp_path / "y.safetensors")


def test_contradictory_shapes_do_not_stop_the_report(tmp_path):
    """A file whose sizes cannot be built is still described."""
    shapes = expected_shapes(VAES["nano_vae"]) | {"conv2.weight": (4, 4, 1, 1, 1)}
    report = describe(write(tmp_path / "x.safetensors", shapes))
    assert not report.checked and "4 latent channels" in format_report(report)
