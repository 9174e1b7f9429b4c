"""Models in several files and folders: opened as one, and trusted in nothing."""
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.small_models import SMALL, write_transformer, write_vae
from wan_core.weights import LoadError, describe, open_model, open_weights

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_index(folder, weight_map, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / name


def split(folder, tensors, count=3):
    """Writes `tensors` into `count` files and their index, and returns its path."""
    folder.mkdir(exist_ok=True, parents=True)
    weight_map = {}
    for index in range(count):
        shard = f"diffusion_pytorch_model-{index + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[index::count])
        save_file({name: tensor.clone() for name, tensor in part.items()}, folder / shard, {f"note {index}": "kept"})
        weight_map |= dict.fromkeys(part, shard)
    return write_index(folder, weight_map)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A transformer in one file."""
    return write_transformer(tmp_path_factory.mktemp("whole") / "x.safetensors", spec=SMALL["t2v"])


def small(tmp_path):
    """An index of three tensors in as many files."""
    return split(tmp_path / "model", {name: torch.full((2,), float(i)) for i, name in enumerate("abc")})


def shard(index, number):
    return index.parent / f"diffusion_pytorch_model-{number:05}-of-00003.safetensors"


def same(file, tensors):
    return set(file) == set(tensors) and all(torch.equal(file[name], tensors[name]) for name in tensors)


def test_three_files_are_one_model(tmp_path, whole):
    """Split in three, a model has the tensors, types and recognition of the single file, and all files' size."""
    with open_weights(whole) as one:
        index = split(tmp_path, one)
        with open_weights(index) as three:
            assert same(three, one) and three.shapes() == one.shapes() and three.dtypes() == one.dtypes()
            assert set(three.metadata) == {"note 0", "note 1", "note 2"} and three.format == "safetensors"
            assert three.nbytes == sum(shard(index, number).stat().st_size for number in (1, 2, 3))
            assert three.renamed({"a": "head.modulation"}).nbytes == three.nbytes
    assert open_model(index, "transformer")[1] == open_model(whole, "transformer")[1]
    assert describe(index).checked and not describe(index).missing


def test_a_shard_is_mapped_once(tmp_path):
    """Tensors of shards are views of mapped files: nothing is copied, and a shard is opened a single time."""
    file = open_weights(small(tmp_path))
    assert file["b"].data_ptr() == file["b"].data_ptr()
    tensor = file["a"]
    file.close()
    assert tensor.tolist() == [0, 0]
    with pytest.raises(ValueError, match="closed"):
        file["a"]


def test_shards_may_be_links(tmp_path):
    """The download cache of Hugging Face has links into another folder in the place of files."""
    index = small(tmp_path)
    (tmp_path / "blobs").mkdir()
    shard(index, 2).rename(tmp_path / "blobs" / "0123abc")
    shard(index, 2).symlink_to("../blobs/0123abc")
    assert open_weights(index)["b"].tolist() == [1, 1]


def test_folders_lead_to_their_model(tmp_path, whole):
    """A folder of shards, of one file, and of a whole pipeline are opened; each kind takes its own subfolder."""
    with open_weights(whole) as one:
        assert same(open_weights(split(tmp_path / "repository/transformer", one).parent), one)
        assert same(open_weights(whole.parent), one)
        assert same(open_weights(tmp_path / "repository"), one)
        assert same(open_model(tmp_path / "repository", "transformer")[0], one)
    (tmp_path / "repository/vae").mkdir()
    write_vae(tmp_path / "repository/vae/diffusion_pytorch_model.safetensors")
    assert open_model(tmp_path / "repository", "vae")[1].names == ("nano_vae",)
    assert open_model(tmp_path / "repository/vae", "vae")[1].names == ("nano_vae",)
    with pytest.raises(LoadError, match="Choose a file that holds a transformer"):
        open_model(tmp_path / "repository/vae", "transformer")


def test_folders_without_one_model_are_explained(tmp_path):
    """An empty folder, and one of several models, say what to choose; hidden files do not count."""
    with pytest.raises(LoadError, match="is a folder without safetensors files and has no folder 'transformer'"):
        open_weights(tmp_path)
    (tmp_path / "vae").mkdir()
    with pytest.raises(LoadError, match="vae is a folder without safetensors files"):
        open_weights(tmp_path / "vae")
    (tmp_path / "._a.safetensors").touch()
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(LoadError, match="a folder with 2 models: a.safetensors, b.safetensors. Choose one"):
        open_weights(tmp_path)
    write_index(tmp_path, {"a": "a.safetensors"})
    assert open_weights(tmp_path).names == ("a",)
    write_index(tmp_path, {"a": "a.safetensors"}, "diffusion_pytorch_model.fp16.safetensors.index.json")
    with pytest.raises(LoadError, match="a folder with 2 models: .*fp16.*Choose one"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
    "..", "", "x.bin", "x.safetensors\0.safetensors", ".x.safetensors", "x" * 300 + ".safetensors",
    "\ud800.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    """Only a bare name of a safetensors file is followed, even where the other file is there and sound."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/sub").mkdir()
    for place in ("secret.safetensors", "model/sub/x.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / place)
    with pytest.raises(LoadError, match="no safetensors file in its own folder; it is refused"):
        open_weights(write_index(tmp_path / "model", {"a": name}))


def test_missing_files_are_named(tmp_path):
    """Files that were not downloaded are named before any is opened."""
    index = small(tmp_path)
    shard(index, 2).unlink()
    shard(index, 3).unlink()
    shard(index, 3).mkdir()
    with pytest.raises(LoadError, match="names 3 files, and 2 of them are not beside it: .*00002-of.*00003-of"):
        open_weights(index)


def test_damaged_files_are_named(tmp_path):
    """A file that is cut off, or holds something else, is named as it would be by itself."""
    index = small(tmp_path)
    content = shard(index, 2).read_bytes()
    shard(index, 2).write_bytes(content[:-3])
    with pytest.raises(LoadError, match="00002-of-00003.safetensors is truncated"):
        open_weights(index)
    torch.save({"b": torch.ones(1)}, shard(index, 2))
    with pytest.raises(LoadError, match="00002-of-00003.safetensors is no safetensors file, as diffusion"):
        open_weights(index)


def test_files_of_other_models_are_refused(tmp_path):
    """A file without a promised tensor, with one more, and with one of another file, are three different errors."""
    index = small(tmp_path)
    save_file({"x": torch.ones(1)}, shard(index, 2))
    with pytest.raises(LoadError, match="says that .*00002-of.* holds b, and it does not"):
        open_weights(index)
    save_file({"b": torch.ones(1), "x": torch.ones(1)}, shard(index, 2))
    with pytest.raises(LoadError, match="00002-of.* holds x, of which diffusion.* says nothing"):
        open_weights(index)
    save_file({"b": torch.ones(1), "a": torch.ones(1)}, shard(index, 2))
    with pytest.raises(LoadError, match="00002-of.* holds a second 'a', which is also in .*00001-of"):
        open_weights(index)


BAD = {
    "not JSON": (b"{oops", "no JSON"), "not UTF-8": (b'{"\xff": 1}', "no JSON"), "empty": (b"", "no JSON"),
    "deep nesting": (b'{"weight_map":' + b"[" * 200_000, "no JSON"), "a list": (b"[]", "no table 'weight_map'"),
    "no table": (b"{}", "no table 'weight_map'"), "empty table": (b'{"weight_map": {}}', "no table 'weight_map'"),
    "numbers": (b'{"weight_map": {"a": 1}}', "no table 'weight_map'"),
    "a table of lists": (b'{"weight_map": ["a"]}', "no table 'weight_map'"),
    "a name twice": (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "names 'a' twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_indices_are_refused(tmp_path, case):
    """Whatever the index holds, the error names it and what is wrong with it."""
    content, text = BAD[case]
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(LoadError, match=f"{INDEX} .*{text}"):
        open_weights(tmp_path / INDEX)


def test_absurd_sizes_are_refused(tmp_path):
    """An index that is too large is not read, and one of too many files opens none of them."""
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LoadError, match=r"1099\.51 GB, too much for the index"):
        open_weights(tmp_path)
    with pytest.raises(LoadError, match="names 1001 files, where 1000 are the most"):
        open_weights(write_index(tmp_path, {str(i): f"{i}.safetensors" for i in range(1001)}))
