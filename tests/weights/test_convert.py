"""Weights quantised on load and into files: equal to the formulas, small, complete, and readable by other programs."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wan_core import nano
from wan_core.weights import LoadError, describe, open_model, open_weights
from wan_core.weights.convert import TARGETS, converted
from wan_core.weights.gguf_encode import quantise
from wan_core.weights.quantised import dense
from wan_core.weights.write import write_quantised

from .test_encode import by_formula

MATRIX = "blocks.2.ffn.0.weight"


@pytest.fixture(scope="module")
def file():
    return open_model(nano.T2V, "transformer")[0]


@pytest.fixture
def wide(tmp_path):
    """A file with a matrix whose columns are a multiple of 256 and one whose columns are not."""
    shapes = {"blocks.0.ffn.0.weight": (64, 512), "blocks.0.ffn.2.weight": (512, 64), "head.head.weight": (64, 512)}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, tmp_path / "wide.safetensors")
    return open_weights(tmp_path / "wide.safetensors")


def quantised(weight, form):
    """What each format makes of a weight: by its own formula, or by the gguf package."""
    if TARGETS[form].container == "safetensors":
        return by_formula(weight, form)
    kind, size = GGMLQuantizationType[form.upper()], TARGETS[form].columns
    rows = weight if not weight.shape[1] % size else weight.view(-1, size)
    raw = quantise(rows, kind.name).numpy() if size == 256 or form == "iq4_nl" else quants.quantize(rows.numpy(), kind)
    return torch.from_numpy(quants.dequantize(raw, kind)).view(weight.shape)


@pytest.mark.parametrize("form", TARGETS)
def test_matrices_of_the_blocks_are_quantised(form, file):
    """Promise: they become what the format's formula says, and nothing else changes."""
    whole = converted(file, form)
    assert whole.shapes() == file.shapes() and list(whole) == list(file)
    assert len(whole.quantised) == 60 and all("blocks." in name for name in whole.quantised)
    assert torch.equal(whole[MATRIX].dequantise(), quantised(file[MATRIX].float(), form))
    for name in ("head.head.weight", "text_embedding.0.weight", "blocks.2.modulation", "blocks.2.ffn.0.bias"):
        assert torch.equal(whole[name], file[name])
    assert [whole.size(name) for name in whole] == [whole[name].nbytes for name in whole]


@pytest.mark.parametrize("form", [form for form, target in TARGETS.items() if target.columns < 256])
def test_a_written_file_is_the_same_model(form, file, tmp_path):
    """Promise: what is read from the file is what was quantised, bit for bit; the file is recognised and complete."""
    path, steps = tmp_path / f"model.{TARGETS[form].container}", []
    nbytes = write_quantised(file, form, path, lambda done, of: steps.append((done, of)))
    assert nbytes == path.stat().st_size < 0.62 * file.nbytes and steps[-1] == (len(file), len(file))
    report, expected = describe(path), converted(file, form)
    assert report.checked and not report.missing + report.unexpected + report.misshapen and not report.remark
    assert "nano_t2v" in report.recognition.names
    read, _ = open_model(path, "transformer")
    assert read.quantised == expected.quantised
    for name in file:
        assert torch.equal(dense(read[name]), dense(expected[name])), name
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", [form for form, target in TARGETS.items() if target.columns == 256])
def test_blocks_lie_within_the_rows_of_a_file(form, file, wide, tmp_path):
    """Promise: in memory every matrix is quantised; in a file those with whole blocks in their rows, others stay as
    they are, and a model without any such matrix is refused before anything is written."""
    assert len(converted(wide, form).quantised) == 2
    path = tmp_path / "wide.gguf"
    write_quantised(wide, form, path, lambda done, of: None)
    read = open_weights(path)
    assert read.quantised == {"blocks.0.ffn.0.weight": form.upper()}
    assert torch.equal(read["blocks.0.ffn.0.weight"].dequantise(),
                       converted(wide, form)["blocks.0.ffn.0.weight"].dequantise())
    assert all(torch.equal(read[name], wide[name]) for name in wide if name not in read.quantised)
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blocks.0.ffn.0.weight")
    assert tensor.tensor_type.name == form.upper() and tensor.data.shape == (64, 2 * TARGETS[form].scheme.format.nbytes)
    with pytest.raises(ValueError, match=f"quantised to {form}; the sizes of its matrices are no multiples of 256"):
        write_quantised(file, form, tmp_path / "nano.gguf", lambda done, of: None)
    assert not (tmp_path / "nano.gguf").exists()


def test_gguf_files_open_in_the_gguf_package(file, tmp_path):
    """Promise: the package lists the tensors with their types and shapes, and reads the same numbers."""
    path = tmp_path / "model.gguf"
    write_quantised(file, "q8_0", path, lambda done, of: None)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == set(file)
    for name, tensor in tensors.items():
        assert tuple(reversed(tensor.shape.tolist())) == file.shapes()[name]
    assert tensors[MATRIX].tensor_type == GGMLQuantizationType.Q8_0
    assert tensors["blocks.2.modulation"].tensor_type == GGMLQuantizationType.F32
    assert tensors["patch_embedding.weight"].tensor_type == GGMLQuantizationType.BF16
    numbers = quants.dequantize(tensors[MATRIX].data, tensors[MATRIX].tensor_type)
    assert np.array_equal(numbers, converted(file, "q8_0")[MATRIX].dequantise().numpy())


def test_fp8_files_open_in_the_safetensors_package(file, tmp_path):
    """Promise: names and types are those of the scaled_fp8 format."""
    path = tmp_path / "model.safetensors"
    write_quantised(file, "fp8_scaled", path, lambda done, of: None)
    with safe_open(path, "pt") as stored:
        assert stored.get_tensor(MATRIX).dtype == torch.float8_e4m3fn
        assert stored.get_tensor("blocks.2.ffn.0.scale_weight").shape == ()
        assert stored.get_tensor("scaled_fp8").dtype == torch.float8_e4m3fn
        assert stored.get_tensor("head.head.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(("form", "stated", "types"), [
    ("int8", "int8_tensorwise", {"weight": torch.int8, "weight_scale": torch.float32}),
    ("mxfp8", "mxfp8", {"weight": torch.float8_e4m3fn, "weight_scale": torch.uint8}),
    ("nvfp4", "nvfp4", {"weight": torch.uint8, "weight_scale": torch.float8_e4m3fn, "weight_scale_2": torch.float32}),
])
def test_newer_files_open_in_the_safetensors_package(form, stated, types, file, tmp_path):
    """Promise: names and types are those of the comfy_quant format, which states each layer's own in JSON."""
    path = tmp_path / "model.safetensors"
    write_quantised(file, form, path, lambda done, of: None)
    with safe_open(path, "pt") as stored:
        layer = {name.removeprefix("blocks.2.ffn.0."): stored.get_tensor(name) for name in stored.keys()
                 if name.startswith("blocks.2.ffn.0.")}
        assert "scaled_fp8" not in stored.keys() and stored.get_tensor("head.head.weight").dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in layer.items()} == {
        **types, "comfy_quant": torch.uint8, "bias": torch.bfloat16}
    assert json.loads(bytes(layer["comfy_quant"].tolist())) == {"format": stated}
    assert form != "int8" or layer["weight_scale"].shape == (384, 1)


@pytest.mark.parametrize(("form", "name", "message"), [
    ("q9_k", "x.gguf", "unknown weight format 'q9_k'; choose fp8_scaled"),
    ("q8_0", "x.safetensors", "q8_0 is written to a .gguf file; x.safetensors ends differently"),
    ("fp8_scaled", "x.gguf", "fp8_scaled is written to a .safetensors file"),
])
def test_bad_requests_are_refused(form, name, message, file, tmp_path):
    """Promise: an unknown format or another ending is refused before anything is written."""
    with pytest.raises(ValueError, match=message):
        write_quantised(file, form, tmp_path / name, lambda done, of: None)
    assert not list(tmp_path.iterdir())


def test_quantised_files_are_not_quantised_again(file, tmp_path):
    """Promise: a file that is quantised is refused, and so is one without matrices to quantise."""
    path = tmp_path / "model.safetensors"
    write_quantised(file, "fp8_scaled", path, lambda done, of: None)
    with pytest.raises(ValueError, match="model.safetensors holds no weights that could be quantised to q8_0"):
        write_quantised(open_model(path, "transformer")[0], "q8_0", tmp_path / "y.gguf", lambda done, of: None)
    with pytest.raises(ValueError, match="no weights that could be quantised"):
        converted(open_model(nano.VAE, "vae")[0], "fp8_scaled")


def test_a_stopped_run_leaves_nothing(file, tmp_path):
    """Promise: an error in the middle leaves no part of a file, and an older file as it was."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")

    def stop(done, of):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantised(file, "q4_0", path, stop)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(value, file, tmp_path):
    """Promise: a NaN or infinite scale is an error that names the weight, when the weights are loaded."""
    from wan_core import load_model

    path = tmp_path / "model.safetensors"
    write_quantised(file, "fp8_scaled", path, lambda done, of: None)
    save_file(load_file(path) | {"blocks.2.ffn.0.scale_weight": torch.tensor(value)}, tmp_path / "bad.safetensors")
    with pytest.raises(LoadError, match=f"bad.safetensors: {MATRIX} cannot be used: its scale holds NaN or infinite"):
        load_model(tmp_path / "bad.safetensors").get("low")


def test_quantised_where_it_is_wanted(file):
    """Promise: a tensor that is read to a device is quantised there: the file's numbers go over as they are."""
    whole = converted(file, "fp8_scaled")
    assert whole.read(MATRIX, "meta").parts["codes"].device.type == "meta"
    assert whole.read("head.head.weight", "meta").device.type == "meta"
    assert whole[MATRIX].parts["codes"].device.type == "cpu"
