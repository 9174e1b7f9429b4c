"""300 damaged and hostile files: each is refused with its name, quickly, in little memory, and nothing in it is run."""

import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_core import nano
from wan_core.models import Part
from wan_core.weights import LoadError, open_weights
from wan_core.weights.write import write_quantised

SECONDS, MEGABYTES = 2.0, 500.0
COUNT = 300


class Code:
    """Unpickled, it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]), content[8 + length:]


def with_header(table: object, data: bytes) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def safetensors_damage(content: bytes, draw: random.Random) -> Iterator[bytes]:
    table, data = header_of(content)
    names = [name for name in table if name != "__metadata__"]

    def entry(**changes: object) -> bytes:
        name = draw.choice(names)
        return with_header({**table, name: {**table[name], **changes}}, data)

    for _ in range(45):
        yield content[:draw.randrange(9, len(content))]
    for _ in range(20):
        yield draw.randrange(2, 1 << draw.choice((16, 24, 40, 63))).to_bytes(8, "little") + content[8:]
    for _ in range(20):
        start = draw.randrange(0, len(data))
        yield entry(data_offsets=[start, start + draw.randrange(1, 4000)])
    for code in ("F4", "F64", "U8", "BOOL", "", None, 7, ["F32"], "F8_E8M0", "I64"):
        yield entry(dtype=code)
    for shape in ([1 << 62], [-1, 4], [1 << 40, 1 << 40], "3", [3.5], [[2]], None, [True], [0], [1, 2, 3]):
        yield entry(shape=shape)
    for nonsense in (b"[]", b"{", b'{"a": 1}', b"\xff\xfe{}", b'{"a":' * 5000, b'{"a": {}}', b"null",
                     b'{"__metadata__": {"a": 1}}', b'{"a": NaN}', b'{"a": {"dtype": "F32"}}'):
        yield with_header(nonsense, data)
    for _ in range(10):
        yield content + bytes(draw.randrange(1, 5000))


def gguf_damage(content: bytes, draw: random.Random) -> Iterator[bytes]:
    for _ in range(40):
        yield content[:draw.randrange(5, len(content) - 64)]
    for position in (4, 8, 16):
        for value in (1 << 31, (1 << 63) - 1, 1 << 20, 77777, 1 << 40):
            size = 4 if position == 4 else 8
            count = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            yield content[:position] + count + content[position + size:]
    # What follows a tensor's name: number of dimensions, their sizes, type, offset.
    name = b"blocks.0.self_attn.q.weight"
    place = content.index(name) + len(name)
    for dims in (9, 255, 1 << 31, 5, 3):
        yield content[:place] + struct.pack("<I", dims) + content[place + 4:]
    for sizes in ((1 << 40, 1 << 40), (1 << 63, 2), (31, 128), (129, 1 << 50), (0, 128)):
        yield content[:place + 4] + struct.pack("<QQ", *sizes) + content[place + 20:]
    for kind in (4, 5, 31, 99, 1 << 31, 16, 19, 40, 39, 9):
        yield content[:place + 20] + struct.pack("<I", kind) + content[place + 24:]
    for offset in (1, 31, 64, 1 << 40, 1 << 62, 4096, 3, 33, 96, 128):
        yield content[:place + 24] + struct.pack("<Q", offset) + content[place + 32:]
    for _ in range(10):
        # Text where a number belongs, from the table of values on.
        start = draw.randrange(24, 60)
        yield content[:start] + b"\xff" * 40 + content[start + 40:]


def torch_damage(content: bytes, draw: random.Random, folder: Path, trace: Path) -> Iterator[bytes]:
    for _ in range(30):
        yield content[:draw.randrange(5, len(content))]
    for protocol in (2, 2, 2, 2, 2):
        yield pickle.dumps({"a": Code(trace)}, protocol=protocol)
    for value in (Code(trace), [Code(trace)], {"w": torch.zeros(2), "x": Code(trace)}):
        path = folder / "code.pt"
        torch.save(value, path)
        yield path.read_bytes()
    for payload in (b"", b"\x80\x02", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x02}q\x00.", b"garbage" * 100):
        path = folder / "other.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
        yield path.read_bytes()
    for _ in range(30):
        # The directory at the end says where everything lies.
        start = draw.randrange(len(content) - 200, len(content) - 30)
        yield content[:start] + bytes(draw.randrange(256) for _ in range(30)) + content[start + 30:]


def scale_damage(folder: Path) -> Iterator[bytes]:
    part = Part.open(nano.T2V, "transformer")
    good = folder / "good.safetensors"
    write_quantised(part.file, "fp8_scaled", good, lambda done, of: None)
    tensors = {name: tensor.clone() for name, tensor in open_weights(good).items()}
    name = "blocks.2.ffn.0.scale_weight"
    for scale in (torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(-float("inf")),
                  torch.zeros(7), torch.zeros(3, 5), torch.zeros(0)):
        save_file({**tensors, name: scale}, folder / "bad.safetensors")
        yield (folder / "bad.safetensors").read_bytes()
    for text in (b"{", b"[]", b'{"format": "nvfp4"}', b'{"format": "awq"}',
                 b'{"format": "int8_tensorwise", "convrot": 1}'):
        marker = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file({**rest, "blocks.2.ffn.0.comfy_quant": marker}, folder / "bad.safetensors")
        yield (folder / "bad.safetensors").read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> list[tuple[str, bytes]]:
    """Content and name of every bad file; fixed by a seed."""
    folder, draw = tmp_path_factory.mktemp("good"), random.Random(0)
    content = nano.T2V.read_bytes()
    files = [("x.safetensors", bad) for bad in safetensors_damage(content, draw)]
    write_quantised(Part.open(nano.T2V, "transformer").file, "q8_0", folder / "good.gguf", lambda done, of: None)
    files += [("x.gguf", bad) for bad in gguf_damage((folder / "good.gguf").read_bytes(), draw)]
    torch.save({"w": torch.randn(64, 64)}, folder / "good.pt")
    files += [("x.pt", bad) for bad in
              torch_damage((folder / "good.pt").read_bytes(), draw, folder, folder / "trace")]
    files += [("x.safetensors", bad) for bad in scale_damage(folder)]
    assert not (folder / "trace").exists()
    return [*files, ("trace", str(folder / "trace").encode())]


def test_every_damaged_file_is_refused(damaged, tmp_path):
    """Promise: a LoadError that names the file for each, within 2 s and 500 MB, and no code of a file has run."""
    *files, (_, trace) = damaged
    assert len(files) >= COUNT
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index, (name, content) in enumerate(files):
        path = tmp_path / name
        path.write_bytes(content)
        started = time.process_time()
        with pytest.raises(LoadError, match="^x[.]") as refused:
            Part.open(path, "transformer").build(torch.device("cpu"), torch.bfloat16)
        assert time.process_time() - started < SECONDS, (index, str(refused.value))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3 < MEGABYTES
    assert not Path(trace.decode()).exists()
