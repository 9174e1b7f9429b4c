"""Files that we write, opened by ComfyUI's own loader."""
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.comfy.server import LAUNCHER
from tests.small_models import SMALL, write_transformer
from wan_core.weights import open_weights, recognise_file, write_quantised
from wan_core.weights.convert import converted
from wan_core.weights.quantised import dense

PROBE = LAUNCHER.parent / "probe_quantised.py"
FORMS = ("fp8_scaled", "fp8_e4m3", "fp8_e5m2")


@pytest.fixture(scope="module")
def folder(comfyui, tmp_path_factory) -> Path:
    """A folder with a model as float32 and in each FP8 format, and what ComfyUI makes of them."""
    folder = tmp_path_factory.mktemp("quantised")
    # The core takes the width of the text and one head for each 128 channels for granted.
    write_transformer(folder / "plain.safetensors", seed=3, spec=replace(SMALL["t2v"], text_dim=4096))
    file, _ = recognise_file(open_weights(folder / "plain.safetensors"))
    for form in FORMS:
        write_quantised(file, form, folder / f"{form}.safetensors", lambda done, of: None)
    generator = torch.Generator().manual_seed(5)
    save_file({"x": torch.randn((1, 16, 2, 4, 4), generator=generator), "timestep": torch.tensor([600.0]),
               "context": torch.randn((1, 7, 4096), generator=generator)}, folder / "inputs.safetensors")
    command = [comfyui.python, LAUNCHER, PROBE, comfyui.checkout, folder]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    assert probe.returncode == 0, probe.stderr[-4000:]
    assert "left over keys" not in probe.stderr and "unet unexpected" not in probe.stderr, probe.stderr[-4000:]
    for missing in re.findall(r"unet missing: \[(.*)\]", probe.stderr):
        # Layers that are not quantised have no scale, for which ComfyUI takes 1.
        assert all(name.strip("' ").endswith(".scale_weight") for name in missing.split(",")), missing
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_the_core_reads_what_we_wrote(folder, form):
    """Promise: ComfyUI detects the model and its format, takes every weight of the blocks for the same numbers as we
    do, and computes nearly what it does with the unquantised file."""
    with safe_open(folder / "read" / f"{form}.safetensors", "pt") as read:
        detected, tensors = read.metadata(), {name: read.get_tensor(name) for name in read.keys()}
    assert detected["class"] == "WAN21_T2V" and detected["multiplies_in_fp8"] == "False"
    assert detected["scaled_fp8"] == ("torch.float8_e4m3fn" if form == "fp8_scaled" else "None")
    ours = converted(recognise_file(open_weights(folder / "plain.safetensors"))[0], form)
    assert {f"weight:{name}" for name in ours.quantised} == {f"{name}.weight" for name in tensors if ":" in name}
    for name in ours.quantised:
        assert torch.equal(tensors[f"weight:{name.removesuffix('.weight')}"], dense(ours[name])), name
    plain = load_file(folder / "read" / "plain.safetensors")["velocity"]
    assert 0 < (tensors["velocity"] - plain).norm() < 0.1 * plain.norm()
