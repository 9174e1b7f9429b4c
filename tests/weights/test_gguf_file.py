"""GGUF files: what the gguf package writes is read lazily and equal to the package's own reading; damage is named."""

import struct
import time

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from wan_core.weights import LoadError, open_weights
from wan_core.weights.gguf_blocks import FORMATS
from wan_core.weights.quantised import Quantised

from .test_gguf_blocks import random_blocks

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def write(tmp_path):
    """Writes a GGUF file of (name, array, type) entries and values; returns its path."""
    def write_file(entries, values=(), name="model.gguf"):
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, "wan")
        for key, value in values:
            writer.add_array(key, value)
        for tensor, array, kind in entries:
            writer.add_tensor(tensor, array, raw_dtype=GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_file


def sample(name, rows=8, columns=512):
    """An array in ggml's storage of a type, and the numbers that the package makes of it."""
    if name in FORMATS:
        raw = random_blocks(name, rows, columns // FORMATS[name].size).numpy()
        return raw, quants.dequantize(raw, GGMLQuantizationType[name])
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(PLAIN[name])
    stored = values.view(torch.uint8).numpy() if name == "BF16" else values.numpy()
    return stored, values.float().numpy()


@pytest.mark.parametrize("name", [*PLAIN, *FORMATS])
def test_every_type_is_read_as_by_the_gguf_package(name, write):
    """Promise: shape and numbers are those of the gguf package, bit for bit, and rows can be had one by one."""
    array, numbers = sample(name)
    file = open_weights(write([("blocks.0.weight", array, name), ("other", np.zeros(3, np.float32), "F32")]))
    weight = file["blocks.0.weight"]
    assert file.format == "gguf" and file.metadata["general.architecture"] == "wan"
    assert file.shapes() == {"blocks.0.weight": (8, 512), "other": (3,)}
    if name in FORMATS:
        assert isinstance(weight, Quantised) and file.quantised == {"blocks.0.weight": name}
        assert weight.nbytes == array.nbytes
        index = torch.tensor([[5, 0], [5, 7]])
        assert torch.equal(weight.rows(index, torch.float32), torch.from_numpy(numbers)[index])
        weight = weight.dequantise()
    else:
        assert weight.dtype == PLAIN[name] and not file.quantised
    assert np.array_equal(weight.float().numpy(), numbers)


def test_shapes_of_more_than_four_dimensions_come_back(write):
    """Promise: a patch embedding that was stored flat has its own shape again."""
    file = open_weights(write([("patch_embedding.weight", np.zeros((64, 64), np.float16), "F16")],
                              [("comfy.gguf.orig_shape.patch_embedding.weight", [64, 16, 1, 2, 2])]))
    assert file["patch_embedding.weight"].shape == file.shapes()["patch_embedding.weight"] == (64, 16, 1, 2, 2)


def test_a_shape_of_another_size_is_refused(write):
    """Promise: a stored shape that does not hold the tensor's numbers is damage, not a reshaping error."""
    path = write([("w", np.zeros((64, 64), np.float16), "F16")], [("comfy.gguf.orig_shape.w", [64, 63])])
    with pytest.raises(LoadError, match=r"gives the tensor 'w' of \[64, 64\] the shape \[64, 63\]"):
        open_weights(path)


def test_the_values_of_the_header_go_with_the_file(write):
    """Promise: lists and numbers of the header are there, read-only, under other names of the tensors, too."""
    file = open_weights(write([("w", np.zeros(4, np.float32), "F32")], [("some.list", ["a", "b"]), ("more", [1, 2])]))
    other = file.renamed({"v": "w"})
    for each in (file, other, other.extended(file)):
        assert each.header_values["some.list"] == ["a", "b"] and each.header_values["more"] == [1, 2]
        assert each.header_values["general.architecture"] == "wan" and "some.list" not in each.metadata
    with pytest.raises(TypeError):
        file.header_values["more"] = 1


def test_types_without_a_reader_are_refused_by_name(write):
    """Promise: an IQ2_XS file is named as such, with another way to go than downloading it again."""
    path = write([("w", np.zeros((4, 74), np.uint8), "IQ2_XS")])
    with pytest.raises(LoadError, match="model.gguf holds the tensor 'w' of type IQ2_XS, which this version cannot "
                                        "read. Use a file of the model in another format."):
        open_weights(path)


def header(*parts, tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(("content", "message"), [
    (b"GGUF", "truncated"),
    (header(version=1), "of version 1"),
    (header(version=3 << 24), "big-endian"),
    (header(tensors=1 << 40), "promises 1099511627776 tensors"),
    (header(values=1), "truncated"),
    (header(struct.pack("<Q", 1 << 60), values=1), "truncated"),
    (header(text(b"key"), struct.pack("<I", 99), values=1), "unknown type 99"),
    (header(text(b"\xff\xfe"), values=1), "not UTF-8"),
    (header(text(b"key"), struct.pack("<IIQ", 9, 4, 1 << 50), values=1), "list of 1125899906842624 values"),
    (header(text(b"key"), struct.pack("<IIQ", 9, 9, 1), values=1), "unsupported type 9"),
    (header(*2 * (text(b"key") + struct.pack("<II", 4, 7),), values=2), "gives the value 'key' twice"),
    (header(text(b"general.alignment"), struct.pack("<II", 4, 3), values=1), "impossible alignment 3"),
    (header(entry(b"w", (4,)), tensors=1), "truncated: its tensor 'w' ends at byte"),
    (header(entry(b"w", (1 << 40, 1 << 40)), tensors=1), "impossible shape"),
    (header(entry(b"w", (1,) * 9), tensors=1), "9 dimensions"),
    (header(entry(b"w", (4,), offset=5), tensors=1), "no multiple of 32"),
    (header(entry(b"w", (31,), kind=8), tensors=1), "rows of 31 numbers are no whole number of Q8_0 blocks"),
    (header(entry(b"w", (32, 0), kind=8), tensors=1), "without any numbers"),
    (header(*2 * (entry(b"w", (4,)),), tensors=2), "names the tensor 'w' twice"),
    (header(entry(b"a", (64,)), entry(b"b", (64,), offset=32), b"\0" * 4096, tensors=2), "inside the one before it"),
])
def test_damaged_headers_are_refused(content, message, tmp_path):
    """Promise: every way in which a header can lie ends in an error that says what is wrong."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        open_weights(path)


def test_a_vocabulary_of_full_size_is_read_in_a_moment(tmp_path):
    """Promise: the 256,384 pieces, scores and types of UMT5-XXL take less than a second of computing."""
    count = 256384
    lists = ((b"tokens", 8, b"".join(text(b"piece %d" % i) for i in range(count))),
             (b"scores", 6, struct.pack(f"<{count}f", *range(count))), (b"token_type", 5, struct.pack("<i", 1) * count))
    path = tmp_path / "x.gguf"
    path.write_bytes(header(*(text(name) + struct.pack("<IIQ", 9, kind, count) + content
                              for name, kind, content in lists), values=len(lists)).ljust(12_000_000, b"\0"))
    began = time.process_time()  # not the clock: a busy machine must not fail this
    values = open_weights(path).header_values
    assert time.process_time() - began < 1
    assert [len(values[name]) for name in ("tokens", "scores", "token_type")] == [count] * 3
    assert (values["tokens"][-1], values["scores"][-1]) == ("piece 256383", 256383.0)


def test_truncation_at_every_point_is_noticed(write, tmp_path):
    """Promise: a file cut off anywhere is refused, with its name, and never crashes."""
    whole = write([("w", np.arange(640, dtype=np.float32).reshape(2, 320), "F32")]).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(4, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="^cut.gguf "):
            open_weights(path)
