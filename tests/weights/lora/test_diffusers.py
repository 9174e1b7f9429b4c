"""Agreement with diffusers: its converters of native and musubi files, and PEFT's way to fuse what they give."""
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tests.weights.lora.lora_files import LINEAR, SHAPES, low_rank, random, write
from wan_core.weights.lora import open_lora

SHAPE = SHAPES["clip"]
BLOCKS = {module: shape for module, shape in LINEAR["clip"].items() if module.startswith("blocks.")}


def theirs(name):
    """What diffusers calls an official tensor, by its converter of whole models."""
    return "transformer." + next(iter(convert_wan_transformer_to_diffusers({name: None})))


def native(pair, alpha):
    """A native file of a 2.1-I2V LoRA with alphas and changed biases."""
    torch.manual_seed(0)
    tensors = {}
    for module, shape in LINEAR["clip"].items():
        name = f"diffusion_model.{module}"
        tensors[f"{name}.{pair[0]}.weight"], tensors[f"{name}.{pair[1]}.weight"] = low_rank(shape)
        tensors[f"{name}.diff_b"] = random(shape[0])
        # diffusers reads alphas in blocks only.
        if alpha and module in BLOCKS:
            tensors[f"{name}.alpha"] = torch.tensor(1.0 + 0.5 * (len(tensors) % 5))
    return tensors


def musubi():
    torch.manual_seed(1)
    tensors = {}
    for module, shape in BLOCKS.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = low_rank(shape)
        tensors[f"{name}.alpha"] = torch.tensor(0.5 + len(tensors) % 4)
    return tensors


def agree(matched, converted):
    """Every adapter of ours, fused with a weight, is PEFT's with scaling 1: W + B A, bias + B's bias."""
    weights = 0
    for target, adapter in matched.adapters.items():
        shape = SHAPE[target.name]
        base = torch.randn(shape)
        name = theirs(target.name)
        if target.parameter == "weight":
            layer = name.removesuffix(".weight")
            change = converted.pop(f"{layer}.lora_B.weight") @ converted.pop(f"{layer}.lora_A.weight")
            weights += 1
        else:
            change = converted.pop(f"{name.removesuffix('.bias')}.lora_B.bias")
        assert change.abs().max() > 1e-3
        assert torch.allclose(adapter.merged(base, 1.0), base + change, atol=1e-5, rtol=0), target
    assert not converted and matched.skipped == matched.unknown == ()
    return weights


@pytest.mark.parametrize("pair", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("alpha", [False, True])
def test_native_files(tmp_path, pair, alpha):
    """Native keys: the same weights and biases as by diffusers' converter, in all layers."""
    tensors = native(pair, alpha)
    matched = open_lora(write(tmp_path / "x.safetensors", tensors)).match(SHAPE)
    assert agree(matched, _convert_non_diffusers_wan_lora_to_diffusers(tensors)) == len(LINEAR["clip"])


def test_musubi_files(tmp_path):
    """Flat keys with alphas: the same weights as by diffusers' converter."""
    tensors = musubi()
    matched = open_lora(write(tmp_path / "x.safetensors", tensors)).match(SHAPE)
    assert agree(matched, _convert_musubi_wan_lora_to_diffusers(tensors)) == len(BLOCKS)


@pytest.mark.parametrize("make", [lambda: native(("lora_A", "lora_B"), True), musubi])
def test_converted_files(tmp_path, make):
    """A file as diffusers saves it after conversion gives the same adapters as the original."""
    tensors = make()
    original = open_lora(write(tmp_path / "a.safetensors", tensors)).match(SHAPE).adapters
    convert = (_convert_musubi_wan_lora_to_diffusers if any(key.startswith("lora_unet_") for key in tensors)
               else _convert_non_diffusers_wan_lora_to_diffusers)
    matched = open_lora(write(tmp_path / "b.safetensors", convert(tensors))).match(SHAPE)
    assert set(matched.adapters) == set(original) and matched.unknown == ()
    for target, adapter in matched.adapters.items():
        shape = SHAPE[target.name]
        assert torch.allclose(adapter.delta(shape), original[target].delta(shape), atol=1e-6)
