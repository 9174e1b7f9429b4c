"""Our reading of LoRA files beside ComfyUI's: the same file merged into the same weights by both."""
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.comfy.server import LAUNCHER
from tests.weights.lora.lora_files import LINEAR, SHAPES, low_rank, random, write
from wan_core.weights.lora import open_lora

PROBE = LAUNCHER.parent / "probe_lora.py"
SHAPE = SHAPES["t2v"]
STRENGTH = 0.8
FAMILIES = ("native", "kohya", "fun", "linear", "every_kind")


def every_kind() -> dict[str, torch.Tensor]:
    """A file in which the layers have all kinds of adapters, with alpha and without."""
    torch.manual_seed(2)
    tensors = {}
    for index, (module, (out, width)) in enumerate(LINEAR["t2v"].items()):
        name, kind = f"diffusion_model.{module}", index % 6
        if kind == 0:
            tensors |= {f"{name}.lokr_w1": random(4, 8), f"{name}.lokr_w2_a": random(out // 4, 2),
                        f"{name}.lokr_w2_b": random(2, width // 8)}
        elif kind == 1:
            tensors |= {f"{name}.lokr_w1_a": random(8, 2), f"{name}.lokr_w1_b": random(2, 4),
                        f"{name}.lokr_w2": random(out // 8, width // 4)}
        elif kind == 2:
            tensors |= {f"{name}.lokr_w1": random(4, 4), f"{name}.lokr_w2": random(out // 4, width // 4)}
        elif kind == 3:
            tensors |= {f"{name}.hada_w1_a": random(out, 3), f"{name}.hada_w1_b": random(3, width),
                        f"{name}.hada_w2_a": random(out, 3), f"{name}.hada_w2_b": random(3, width)}
        else:
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = low_rank((out, width))
        # Magnitudes of columns; for those of rows ComfyUI divides by the length of W and not of W + ΔW, see arXiv
        # 2402.09353, eq. 5.
        if kind == 5:
            tensors[f"{name}.dora_scale"] = random(1, width).abs() + 1
        if index % 2:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        if kind == 4:
            tensors[f"{name}.diff_b"] = random(out)
    block = "diffusion_model.blocks.1"
    return tensors | {
        f"{block}.self_attn.norm_q.diff": random(128), f"{block}.norm3.diff": random(128),
        f"{block}.norm3.diff_b": random(128), f"{block}.modulation.diff": random(1, 6, 128),
        "diffusion_model.patch_embedding.diff": random(*SHAPE["patch_embedding.weight"])}


def plain(family: str) -> dict[str, torch.Tensor]:
    """A LoRA on every linear layer, in a spelling that ComfyUI reads for Wan."""
    torch.manual_seed(3)
    tensors = {}
    for module, shape in LINEAR["t2v"].items():
        name = {"native": f"diffusion_model.{module}", "linear": f"diffusion_model.{module}"}.get(
            family, f"lora_unet{'__' if family == 'fun' else '_'}{module.replace('.', '_')}")
        down, up = {"native": ("lora_A", "lora_B"), "linear": ("lora_linear_layer.down", "lora_linear_layer.up"),
                    }.get(family, ("lora_down", "lora_up"))
        tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"] = low_rank(shape)
        if family != "linear":
            tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


@pytest.fixture(scope="module")
def folder(comfyui, tmp_path_factory) -> Path:
    """A folder with a model, LoRA files, and what ComfyUI makes of them."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(4)
    write(folder / "model.safetensors", {name: torch.randn(shape) for name, shape in SHAPE.items()})
    for family in FAMILIES:
        write(folder / f"{family}.safetensors", every_kind() if family == "every_kind" else plain(family))
    command = [comfyui.python, LAUNCHER, PROBE, comfyui.checkout, str(STRENGTH), folder]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    assert probe.returncode == 0 and "lora key not loaded" not in probe.stderr, probe.stderr[-4000:]
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_agree(folder, family):
    """A file that both can read changes the same tensors, to the same numbers."""
    weights, theirs = (load_file(folder / name) for name in ("model.safetensors", f"merged/{family}.safetensors"))
    matched = open_lora(folder / f"{family}.safetensors").match(SHAPE)
    assert {target.name for target in matched.adapters} == set(theirs) and matched.unknown == ()
    for target, adapter in matched.adapters.items():
        ours = adapter.merged(weights[target.name], STRENGTH)
        assert not torch.equal(ours, weights[target.name])
        assert torch.allclose(ours, theirs[target.name], atol=1e-5, rtol=1e-5), target
