"""Writing checkpoints: whole or not at all."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wan_core.weights import open_weights, save_weights

ROOT = Path(__file__).parents[2]


def test_round_trip(tmp_path):
    """Values, types and metadata come back, from transposed and grad-carrying tensors too."""
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.nn.Parameter(torch.ones(2).bfloat16()), "c": torch.tensor(2.0)}
    save_weights(tmp_path / "x.safetensors", tensors, {"seed": "7"})
    with open_weights(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"seed": "7"}
        assert all(torch.equal(file[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_replacing_a_file_that_is_open(tmp_path):
    """Tensors of the old file stay valid when it is replaced by a file made from them."""
    path = tmp_path / "x.safetensors"
    save_weights(path, {"a": torch.ones(5000)})
    with open_weights(path) as file:
        save_weights(path, {"a": file["a"] * 2})
        assert file["a"].sum() == 5000
    assert open_weights(path)["a"].sum() == 10000


def test_bad_arguments(tmp_path):
    """Nothing to write and metadata that is not text are refused before a file is made."""
    with pytest.raises(ValueError, match="no tensors"):
        save_weights(tmp_path / "x.safetensors", {})
    with pytest.raises(ValueError, match="'steps' is a int.*json.dumps"):
        save_weights(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"steps": 3})
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    """A folder that is not there is an error that names the file."""
    with pytest.raises(OSError, match="x.safetensors .* could not be written"):
        save_weights(tmp_path / "absent" / "x.safetensors", {"a": torch.ones(1)})


LIMITED = """
import resource, sys
import torch
from wan_core.weights import save_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_weights(sys.argv[1], {"a": torch.ones(100_000)})
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits")
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_nothing_and_harms_nothing(tmp_path, old):
    """When the disk refuses bytes midway, the old file is untouched and no part of the new one remains."""
    path = tmp_path / "x.safetensors"
    if old:
        save_weights(path, {"a": torch.zeros(3)})
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "x.safetensors (400.00 kB) could not be written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == (["x.safetensors"] if old else [])
    if old:
        assert torch.equal(open_weights(path)["a"], torch.zeros(3))
