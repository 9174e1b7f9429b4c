"""Opening checkpoints: lazily, without trusting a byte, and with an error a user can act on."""
import json
import mmap
import os
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_core import nano
from wan_core.weights import LoadError, open_model, open_weights, write_quantised
from wan_core.weights.mapping import mapped_tensor
from wan_core.weights.tensor_file import Joined

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write_raw(path, header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_names_shapes_types_values_and_metadata(tmp_path):
    """What was saved is what is found, in every type that weights come in."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(2, 2, 2).half(),
               "d": torch.arange(7, dtype=torch.uint8), "e": torch.tensor(3.0), "f": torch.empty(0, 4),
               "g": torch.randn(4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "x.safetensors", {"note": "kept"})
    with open_weights(tmp_path / "x.safetensors") as file:
        assert set(file.names) == set(tensors) and file.metadata == {"note": "kept"} and file.format == "safetensors"
        assert file.shapes() == {name: tuple(t.shape) for name, t in tensors.items()}
        assert file.dtypes() == {name: t.dtype for name, t in tensors.items()}
        for name, tensor in tensors.items():
            assert file[name].shape == tensor.shape
            assert file[name].double().tolist() == tensor.double().tolist()
        assert file.get("spiece_model") is None and "a" in file
        with pytest.raises(KeyError):
            file["absent"]


@pytest.mark.skipif(sys.platform == "win32", reason="sparse files")
def test_a_file_larger_than_memory_opens_at_once(tmp_path):
    """Opening maps and reads nothing: 200 GB of tensors in under a second, with no memory."""
    half = 100 << 30
    path = write_raw(tmp_path / "big.safetensors", {
        "a": {"dtype": "F32", "shape": [half // 4], "data_offsets": [0, half]},
        "b": {"dtype": "BF16", "shape": [half // 2], "data_offsets": [half, 2 * half]}})
    os.truncate(path, path.stat().st_size + 2 * half)
    started = time.process_time()  # not the clock: a busy machine must not fail this
    with open_weights(path) as file:
        tail = file["b"][-8:]
        assert file["a"].shape == (half // 4,) and torch.count_nonzero(tail) == 0
    assert time.process_time() - started < 1


def test_tensors_are_views_of_one_mapping(tmp_path):
    """Taking a tensor twice copies nothing; writing into it leaves the file as it was."""
    save_file({"a": torch.ones(1024)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    file = open_weights(tmp_path / "x.safetensors")
    assert file["a"].data_ptr() == file["a"].data_ptr()
    file["a"].zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_tensors_outlive_the_file(tmp_path):
    """A tensor stays valid after close; the file gives no more."""
    save_file({"a": torch.ones(1024)}, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as file:
        tensor = file["a"]
    assert tensor.sum() == 1024
    with pytest.raises(ValueError, match="closed"):
        file["a"]


def test_unaligned_tensors_are_read_right(tmp_path):
    """A tensor at an odd offset, as other writers leave them, comes out right and aligned."""
    value = torch.tensor([1.5, -2.0])
    path = write_raw(tmp_path / "x.safetensors", {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]}}, b"abc" + value.numpy().tobytes())
    tensor = open_weights(path)["b"]
    assert torch.equal(tensor, value) and tensor.data_ptr() % 4 == 0


def test_renamed_view(tmp_path):
    """Other names lead to the same tensors, and names left out are gone."""
    save_file({"p.a": torch.ones(2), "p.b": torch.zeros(2)}, tmp_path / "x.safetensors")
    file = open_weights(tmp_path / "x.safetensors").renamed({"a": "p.a"})
    assert file.names == ("a",) and torch.equal(file["a"], torch.ones(2)) and file.shapes() == {"a": (2,)}


def test_joined_tensors(tmp_path):
    """Tensors are joined when they are asked for, in their order; shape and type are known before, in every type."""
    stored = {"q": torch.ones(2, 3), "k": torch.zeros(2, 3), "eighth": torch.ones(4).to(torch.float8_e4m3fn)}
    save_file(stored, tmp_path / "x.safetensors")
    file = open_weights(tmp_path / "x.safetensors")
    joined = file.renamed({"qk": Joined(("q", "k"), torch.t), "all": Joined(("eighth", "eighth")),
                           "same": Joined(("q",))})
    assert joined.shapes() == {"qk": (3, 4), "all": (8,), "same": (2, 3)}
    assert joined.dtypes() == {"qk": torch.float32, "all": torch.float8_e4m3fn, "same": torch.float32}
    assert torch.equal(joined["qk"], torch.cat([stored["q"], stored["k"]]).T)
    assert joined["same"].data_ptr() == file["q"].data_ptr()
    assert joined.renamed({"again": "qk"})["again"].shape == (3, 4)
    with pytest.raises(LoadError, match=r"x.safetensors holds tensors that do not fit each other: q \[2, 3\], eighth"):
        file.renamed({"qk": Joined(("q", "eighth"))})


HEADERS = {
    "overlap": ({"a": ONE, "b": ONE}, b"0000", "where 4 is due"),
    "gap": ({"a": ONE | {"data_offsets": [4, 8]}}, b"00000000", "where 0 is due"),
    "beyond the file": ({"a": ONE | {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"0000", "truncated"),
    "truncated data": ({"a": ONE}, b"00", "truncated"),
    "trailing data": ({"a": ONE}, b"00000000", "after its last tensor"),
    "negative offset": ({"a": ONE | {"data_offsets": [-4, 0]}}, b"0000", "impossible"),
    "reversed offsets": ({"a": ONE | {"data_offsets": [4, 0]}}, b"0000", "impossible"),
    "negative shape": ({"a": ONE | {"shape": [-1]}}, b"0000", "impossible"),
    "two negative sizes": ({"a": ONE | {"shape": [-1, -1]}}, b"0000", "impossible"),
    "bool shape": ({"a": ONE | {"shape": [True]}}, b"0000", "impossible"),
    "float shape": ({"a": ONE | {"shape": [1.0]}}, b"0000", "impossible"),
    "overflowing shape": ({"a": ONE | {"shape": [1 << 62, 1 << 62]}}, b"0000", "takes"),
    "shape against bytes": ({"a": ONE | {"shape": [2]}}, b"0000", "takes 8"),
    "unknown type": ({"a": ONE | {"dtype": "F4"}}, b"0000", "'F4'"),
    "type of wrong kind": ({"a": ONE | {"dtype": ["F32"]}}, b"0000", "cannot read"),
    "type by torch's name": ({"a": ONE | {"dtype": "float32"}}, b"0000", "'float32'"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"0000", "without dtype"),
    "entry is a list": ({"a": [1]}, b"0000", "without dtype"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "table of strings"),
    "metadata is a list": ({"__metadata__": []}, b"", "table of strings"),
    "name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), b"0000", "twice"),
    "field twice": (b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', b"0000", "twice"),
    "not JSON": (b'{"a": oops}', b"0000", "not JSON"),
    "not UTF-8": (b'{"\xff\xfe":1}', b"", "not JSON"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b"", "not JSON"),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", "has a header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused(tmp_path, case):
    """No header makes the loader map, allocate or return anything outside the file."""
    header, data, text = HEADERS[case]
    path = write_raw(tmp_path / "evil.safetensors", header, data)
    with pytest.raises(LoadError, match="evil.safetensors") as caught:
        open_weights(path)
    assert text in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("length", [5_000, 99_999_999])
def test_a_header_longer_than_the_file_is_a_truncation(tmp_path, length):
    """A download that stopped within the header says so."""
    with pytest.raises(LoadError, match="truncated: its header"):
        open_weights(write_raw(tmp_path / "x.safetensors", b'{"a":', length=length))


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_impossible_header_lengths(tmp_path, length):
    """A length that no file has is not followed."""
    with pytest.raises(LoadError, match="neither a safetensors"):
        open_weights(write_raw(tmp_path / "x.safetensors", b'{"a":1}', length=length))


@pytest.mark.parametrize("keep", [1, 7, 8, 40, 100, -1])
def test_truncation_anywhere_is_an_error(tmp_path, keep):
    """Wherever a download stops, the file is refused and the advice is to load it again."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(10), "b": torch.randn(10)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match="ownload it again"):
        open_weights(path)


FOREIGN = {
    "empty": (b"", "is empty"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "html with space": (b"\n  <html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "json": (b'{"architectures": ["X"]}', "JSON"),
    "text": (b"hello, this is no model at all", "neither a safetensors"),
    "short": (b"abc", "neither a safetensors"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_named(tmp_path, case):
    """The usual wrong files are named for what they are, whatever their ending."""
    content, text = FOREIGN[case]
    for ending in (".safetensors", ".pth"):
        path = tmp_path / f"x{ending}"
        path.write_bytes(content)
        with pytest.raises(LoadError, match=text):
            open_weights(path)


def test_paths_that_are_no_files(tmp_path):
    """Missing files and folders without one are errors that say what to do."""
    with pytest.raises(LoadError, match="absent.safetensors does not exist. Check"):
        open_weights(tmp_path / "absent.safetensors")
    with pytest.raises(LoadError, match="is a folder without safetensors files.*Choose"):
        open_weights(tmp_path)
    with pytest.raises(LoadError, match="m.safetensors.index.json does not exist. Check"):
        open_weights(tmp_path / "m.safetensors.index.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    """Something that is no regular file cannot hang the loader."""
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match="no regular file"):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_both_ages(tmp_path, zipped):
    """The official .pth files open with their values, in today's format and in the one before."""
    tensors = {"a": torch.randn(3), "b": torch.nn.Parameter(torch.ones(2, 2).bfloat16())}
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with open_weights(tmp_path / "x.pth") as file:
        assert file.format == "torch" and file.shapes() == {"a": (3,), "b": (2, 2)}
        assert file.dtypes()["b"] == torch.bfloat16
        assert torch.equal(file["a"], tensors["a"]) and not file["b"].requires_grad


def test_format_is_told_by_content(tmp_path):
    """A wrong ending does no harm, and a safetensors header of 640 bytes is not taken for a pickle."""
    torch.save({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert open_weights(tmp_path / "x.safetensors").format == "torch"
    header = json.dumps({"a": ONE}).encode().ljust(640)
    assert open_weights(write_raw(tmp_path / "y.pth", header, b"0000")).format == "safetensors"


def test_nested_state_dict(tmp_path):
    """A training checkpoint's `state_dict` is found."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "step": 3}, tmp_path / "x.ckpt")
    assert open_weights(tmp_path / "x.ckpt").names == ("a",)


def tables(**values):
    """Tables whose only tensor says where it comes from."""
    return {name: {"a": torch.tensor([value])} for name, value in values.items()}


@pytest.mark.parametrize(("content", "expected"), [
    (tables(module=1.0), 1), (tables(model=1.0), 1), (tables(generator=1.0), 1), (tables(generator_ema=1.0), 1),
    # CausVid: the generator and not its critic. Self-Forcing: the average, wherever it stands.
    (tables(critic=2.0, generator=1.0), 1), (tables(generator=2.0, critic=3.0, generator_ema=1.0), 1),
    (tables(model=2.0, ema=1.0), 1), (tables(module=2.0, state_dict=1.0), 1),
    ({"module": {"state_dict": tables(model=1.0), "step": 3}, "epoch": 1}, 1),
    (tables(generator=1.0) | {"generator_ema": None, "ema": {"decay": 0.99}, "step": torch.tensor(7)}, 1),
    (tables(model=1.0) | {"rng_state": torch.zeros(16, dtype=torch.uint8), "loss": torch.tensor(0.5)}, 1),
    # Beside weights, a table is something else; only 'state_dict' always means the model.
    (tables(model=2.0) | {"a": torch.ones(1)}, 1), (tables(state_dict=1.0) | {"a": torch.zeros(1)}, 1),
])
def test_weights_in_training_checkpoints(tmp_path, content, expected):
    """The table of weights is found under the names that trainers use, and averages come first."""
    torch.save(content, tmp_path / "x.pt")
    file = open_weights(tmp_path / "x.pt")
    assert file.names == ("a",) and file["a"].item() == expected


def test_the_choice_among_tables_is_said(tmp_path, caplog):
    """Where there are several tables, one line names them and the one that is taken; with one there is no word."""
    with caplog.at_level("INFO"):
        torch.save(tables(generator=2.0), tmp_path / "x.pt")
        open_weights(tmp_path / "x.pt")
        assert not caplog.records
        torch.save(tables(generator=2.0, generator_ema=1.0), tmp_path / "x.pt")
        open_weights(tmp_path / "x.pt")
    assert [record.getMessage() for record in caplog.records] == [
        "x.pt holds the tables generator_ema, generator; generator_ema is used"]


def test_training_checkpoints_nest_so_far_and_no_further(tmp_path):
    """Three tables around the weights are opened; a fourth is refused by the name of the outermost."""
    content = {"a": torch.ones(1)}
    for _ in range(3):
        content = {"model": content}
    torch.save(content, tmp_path / "x.pt")
    assert open_weights(tmp_path / "x.pt").names == ("a",)
    torch.save({"module": content}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="holds no table of tensors but: module"):
        open_weights(tmp_path / "x.pt")


def test_names_without_the_wrappers_of_training(tmp_path):
    """What FSDP, checkpointing and torch.compile put into names is left out; two copies of a model are refused."""
    torch.save({"generator_ema": {"model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.q": torch.ones(1),
                                  "_orig_mod.model.head": torch.zeros(1)}}, tmp_path / "x.pt")
    file = open_weights(tmp_path / "x.pt")
    assert file.names == ("model.blocks.0.q", "model.head") and file["model.blocks.0.q"].item() == 1
    torch.save({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="holds 2 tensors, and only 1 have different names when .* two copies"):
        open_weights(tmp_path / "x.pt")


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_never_runs(tmp_path, zipped):
    """A pickle that would run code is refused, and the code does not run."""
    target = str(tmp_path / "ran")
    torch.save({"a": torch.ones(1), "b": Bomb(target)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoadError, match="can run code"):
        open_weights(tmp_path / "x.pth")
    assert not os.path.exists(target)


def test_torch_files_without_tensors(tmp_path):
    """A .pth that holds something else says what it holds."""
    torch.save({"optimizer": {"lr": 1}, "epoch": 2}, tmp_path / "x.pth")
    with pytest.raises(LoadError, match="optimizer, epoch"):
        open_weights(tmp_path / "x.pth")
    torch.save([1, 2], tmp_path / "y.pth")
    with pytest.raises(LoadError, match="but: list"):
        open_weights(tmp_path / "y.pth")


def test_damaged_torch_files(tmp_path):
    """A truncated .pth and a zip archive of something else are refused."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(LoadError, match="damaged, truncated"):
        open_weights(path)
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(LoadError, match="damaged, truncated or no PyTorch file"):
        open_weights(tmp_path / "y.pth")


def test_files_are_never_opened_for_writing(tmp_path):
    """Promise: read-only disks will do: from opening a file to the module that is filled, no file is opened for
    writing, none is made, and the file's bytes, time and folder stay as they were."""
    for name in ("model.safetensors", "model.gguf", "model.pth"):
        file, _ = open_model(nano.T2V, "transformer")
        path = tmp_path / name
        if name.endswith(".gguf"):
            write_quantised(file, "q8_0", path, lambda done, of: None)
        elif name.endswith(".pth"):
            torch.save(dict(file), path)
        else:
            path.write_bytes(nano.T2V.read_bytes())
    script = (
        "import os, sys\n"
        "written = []\n"
        "def watch(event, details):\n"
        "    if event == 'open' and details[2] is not None and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):\n"
        "        written.append(str(details[0]))\n"
        "    elif event in ('os.mkdir', 'os.rename', 'os.remove', 'os.truncate', 'os.utime'):\n"
        "        written.append(event)\n"
        "import torch\n"
        "from wan_core.models import Part\n"
        "sys.dont_write_bytecode = True\n"
        "sys.addaudithook(watch)\n"
        "for path in sys.argv[1:]:\n"
        "    module = Part.open(path, 'transformer').build(torch.device('cpu'), torch.float32)\n"
        "    sum(parameter.sum() for parameter in module.parameters())\n"
        "assert not written, written\n"
        "print('done')\n")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    run = subprocess.run([sys.executable, "-B", "-c", script, *map(str, before)], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2], check=False)
    assert run.stdout.strip() == "done", run.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_read_only_mapping_will_do(tmp_path):
    """Promise: tensors of a mapping that cannot be written to, as Windows gets it, are views without a warning."""
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(64)))
    with path.open("rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("error")
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        tensor = mapped_tensor(mapping, torch.uint8, 8, 16)
    assert tensor.tolist() == list(range(16, 24))
