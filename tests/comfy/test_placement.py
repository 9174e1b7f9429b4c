"""Our placement and ComfyUI's memory manager."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.comfy.server import LAUNCHER

PROBE = Path(__file__).resolve().parent / "probe_placement.py"


@pytest.fixture(scope="module")
def found(comfyui, pack_folder) -> dict[str, bool]:
    probe = subprocess.run([comfyui.python, LAUNCHER, PROBE, comfyui.checkout, pack_folder], capture_output=True,
                           text=True, check=False)
    assert probe.returncode == 0, probe.stderr[-4000:]
    return json.loads(probe.stdout.splitlines()[-1])


@pytest.mark.parametrize(("fact", "promise"), [
    ("is_managed", "in ComfyUI models are placed by its memory manager"),
    ("size_listed", "the manager knows how much memory a model takes"),
    ("same_again", "a model that is there is not built again"),
    ("same_with_room", "asking for another amount of working memory changes nothing about that"),
    ("one_at_a_time", "placing one expert frees the other"),
    ("evicted", "unloading frees the weights at once"),
    ("comes_back", "an unloaded model comes back by itself"),
    ("gone_with_its_handle", "nothing outlives the handle, neither weights nor the manager's entry"),
])
def test_placement(found, fact, promise):
    """Promise: the one that stands beside each fact above."""
    assert found[fact], promise
