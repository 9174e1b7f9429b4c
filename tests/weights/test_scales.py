"""FP8, int8, MXFP8 and NVFP4 weights with their scales: equal to their formulas in float64, in every way of storing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from wan_core.weights import LoadError, open_weights
from wan_core.weights.quantised import Quantised
from wan_core.weights.scales import with_scales

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(table):
    return torch.frombuffer(bytearray(json.dumps(table).encode()), dtype=torch.uint8)


@pytest.fixture
def opened(tmp_path):
    """Writes tensors and metadata to a file and opens it with its scales joined."""
    def write(tensors, metadata=None):
        path = tmp_path / "x.safetensors"
        save_file(tensors, path, metadata)
        return with_scales(open_weights(path))

    return write


def stored_ways(codes, scale, form):
    """The ways in which one scaled layer can be stored: tensors and metadata of each."""
    scaled = {"a.weight": codes, "a.bias": torch.ones(64, dtype=torch.bfloat16)}
    table = {"format_version": "1.0", "layers": {"a": {"format": form}}}
    return {
        "legacy": ({**scaled, "a.scale_weight": scale, "a.scale_input": torch.ones(()),
                    "scaled_fp8": torch.empty(0, dtype=codes.dtype)}, None),
        "layer text": ({**scaled, "a.weight_scale": scale, "a.comfy_quant": text({"format": form})}, None),
        "header": ({**scaled, "a.weight_scale": scale, "a.input_scale": torch.ones(())},
                   {"_quantization_metadata": json.dumps(table)}),
        "header, word only": ({**scaled, "a.weight_scale": scale},
                              {"_quantization_metadata": json.dumps({"layers": {"a": form}})}),
        "header without prefix": (
            {f"model.diffusion_model.{name}": tensor for name, tensor in {**scaled, "a.weight_scale": scale}.items()},
            {"_quantization_metadata": json.dumps(table)}),
        "scale only": ({**scaled, "a.scale_weight": scale}, None),
    }


@pytest.mark.parametrize("way", stored_ways(torch.zeros(1), torch.zeros(1), ""))
@pytest.mark.parametrize("form", FP8)
@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1), (64, 4, 1)], ids=str)
def test_fp8_is_codes_times_scale(way, form, shape, opened):
    """Promise: one scale, one a row or one a part of a row, in every way of storing, as the formula in float64."""
    codes, scale = numbers(64, 32).to(FP8[form]), numbers(*shape, seed=1).abs() / 50
    file = opened(*stored_ways(codes, scale, form)[way])
    name, = (name for name in file if name.endswith("a.weight"))
    weight = file[name]
    assert isinstance(weight, Quantised) and len(file) == 2
    parts = max(1, scale.numel() // 64)
    expected = (codes.double().view(64, parts, -1) * (scale.double().view(-1, parts, 1))).view(64, 32)
    assert torch.equal(weight.dequantise(), expected.float())
    assert torch.equal(weight.dequantise(torch.bfloat16), expected.float().bfloat16())
    index = torch.tensor([[3, 63], [3, 0]])
    assert torch.equal(weight.rows(index, torch.float32), expected.float()[index])
    assert file.quantised[name] == f"FP8 {form[7:11]}" and file.shapes()[name] == (64, 32)


def test_fp8_without_scales_is_taken_as_it_is(opened):
    """Promise: in plain FP8 files all tensors are FP8, norms and biases too, and mean what they are."""
    tensors = {name: numbers(*shape).to(torch.float8_e5m2) for name, shape in
               {"a.weight": (8, 4), "a.bias": (8,), "patch.weight": (8, 4, 1, 2, 2)}.items()}
    file = opened(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(file[name].dequantise(), tensor.float()) and file.quantised[name] == "FP8 e5m2"


def test_fp8_stored_as_bytes(opened):
    """Promise: FP8 codes in a tensor of bytes are read by the format that is stated."""
    codes = numbers(8, 4).to(torch.float8_e4m3fn)
    file = opened({"a.weight": codes.view(torch.uint8), "a.comfy_quant": text({"format": "float8_e4m3fn"})})
    assert torch.equal(file["a.weight"].dequantise(), codes.float())


def test_half_precision_with_a_scale_is_scaled(opened):
    """Promise: a scale beside a bfloat16 weight counts, whatever else is stated of the layer."""
    weight = numbers(8, 4).bfloat16()
    file = opened({"a.weight": weight, "a.scale_weight": torch.tensor(0.5)})
    assert torch.equal(file["a.weight"].dequantise(), weight.float() / 2)


@pytest.mark.parametrize("shape", [(), (64, 1)], ids=str)
def test_int8_is_codes_times_scale(shape, opened):
    """Promise: int8_tensorwise, with one scale or one a row, as the formula in float64."""
    codes, scale = torch.randint(-128, 128, (64, 32), dtype=torch.int8), numbers(*shape).abs()
    file = opened({"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": text({"format": "int8_tensorwise"})})
    assert torch.equal(file["a.weight"].dequantise(), (codes.double() * scale.double()).float())


def test_rotated_int8_is_turned_back(opened):
    """Promise: a weight that was turned by the Kronecker power of the 4x4 Hadamard matrix comes back as it was."""
    weight = torch.randint(-30, 31, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    quarter = torch.tensor([[1., 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.kron(quarter, quarter) / 4
    turned = (weight.view(8, 4, 16) @ matrix.T).reshape(8, 64)
    file = opened({"a.weight": turned.round().to(torch.int8), "a.weight_scale": torch.tensor(1.0),
                   "a.comfy_quant": text({"format": "int8_tensorwise", "params": {"convrot": True,
                                                                                  "convrot_groupsize": 16}})})
    rounded = (turned.round().view(8, 4, 16).double() @ matrix.double()).view(8, 64)
    torch.testing.assert_close(file["a.weight"].dequantise().double(), rounded, atol=1e-4, rtol=0)
    assert (file["a.weight"].dequantise() - weight).abs().max() < 2.5


def tiled(scales):
    """Block scales [rows, columns] in tiles of 128x4, by the formula for one element's place."""
    rows, columns = scales.shape
    padded = (-(-rows // 128) * 128, -(-columns // 4) * 4)
    flat = torch.zeros(padded[0] * padded[1], dtype=scales.dtype)
    for r in range(rows):
        for c in range(columns):
            flat[(r // 128 * (padded[1] // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    return flat.view(padded)


def test_mxfp8_has_a_power_of_two_for_each_32_columns(opened):
    """Promise: codes times two to the exponent, wherever the scale lies in the tiles; exponent 0 is zero."""
    codes = numbers(160, 192).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 134, (160, 6), dtype=torch.uint8)
    exponents[7, 3] = 0
    file = opened({"a.weight": codes, "a.weight_scale": tiled(exponents), "a.comfy_quant": text({"format": "mxfp8"})})
    scale = torch.where(exponents == 0, 0, 2.0 ** (exponents.double() - 127))
    expected = codes.double().view(160, 6, 32) * scale.unsqueeze(-1)
    assert torch.equal(file["a.weight"].dequantise(), expected.view(160, 192).float())


@pytest.mark.parametrize("columns_scaled", [False, True])
def test_nvfp4_has_two_levels_of_scales(columns_scaled, opened):
    """Promise: 4-bit floats, the first of a byte in its upper half, times block scale, tensor scale, column scale."""
    codes = torch.randint(0, 16, (160, 96), dtype=torch.uint8)
    blocks = numbers(160, 6).abs().to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes[:, ::2] << 4 | codes[:, 1::2], "a.weight_scale_2": torch.tensor(0.3),
               "a.weight_scale": tiled(blocks.view(torch.uint8)).view(torch.float8_e4m3fn),
               "a.comfy_quant": text({"format": "nvfp4"})}
    if columns_scaled:
        tensors["a.pre_quant_scale"] = numbers(96, seed=3)
    file = opened(tensors)
    values = torch.tensor(E2M1, dtype=torch.float64)[codes.int()].view(160, 6, 16)
    expected = (values * (blocks.double() * torch.tensor(0.3).double()).unsqueeze(-1)).view(160, 96)
    expected = expected * tensors["a.pre_quant_scale"].double() if columns_scaled else expected
    assert file.shapes()["a.weight"] == (160, 96) and len(file) == 1
    torch.testing.assert_close(file["a.weight"].dequantise().double(), expected, rtol=2e-7, atol=0)


LOW = torch.zeros(8, 4, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(("tensors", "metadata", "message"), [
    ({"a.weight": LOW, "a.scale_weight": torch.ones(3)}, None, r"scale of a.weight \[8, 4\] has the shape \[3\]"),
    ({"a.weight": LOW.view(torch.uint8), "a.comfy_quant": text({"format": "awq_w4a16"})}, None,
     "a.weight in the format 'awq_w4a16', which this version cannot read. Use a file of the model in another"),
    ({"a.weight": LOW, "a.comfy_quant": torch.frombuffer(bytearray(b"{nonsense"), dtype=torch.uint8)}, None,
     "a.comfy_quant is not JSON"),
    ({"a.weight": LOW, "a.comfy_quant": torch.zeros(10_000, dtype=torch.uint8)}, None, "is no short text"),
    ({"a.weight": LOW}, {"_quantization_metadata": "[]"}, "_quantization_metadata is no table"),
    ({"a.weight": LOW}, {"_quantization_metadata": "{}"}, "holds no table of layers"),
    ({"a.weight": LOW.view(torch.int8), "a.comfy_quant": text({"format": "int8_tensorwise"})}, None,
     "in the format int8_tensorwise without its scale"),
    ({"a.weight": LOW.view(torch.int8), "a.weight_scale": torch.ones(()),
      "a.comfy_quant": text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 3})}, None,
     "rotated in groups of 3 of its 4 columns"),
    ({"a.weight": LOW, "a.weight_scale": torch.ones(8, 1), "a.comfy_quant": text({"format": "mxfp8"})}, None,
     "MXFP8 has 8 block scales"),
    ({"a.weight": LOW.view(torch.uint8).view(1, 32).repeat(8, 1), "a.weight_scale": torch.ones(128, 4),
      "a.comfy_quant": text({"format": "nvfp4"})}, None, "NVFP4 without weight_scale_2"),
])
def test_what_does_not_fit_is_refused(tensors, metadata, message, opened):
    """Promise: unknown formats are refused by name, and scales that are missing or of another size by their sizes."""
    with pytest.raises(LoadError, match=message):
        opened(tensors, metadata)
