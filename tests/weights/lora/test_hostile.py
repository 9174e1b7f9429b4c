"""Files that contradict themselves: a LoadError that names key and problem, before anything is allocated."""
import json

import pytest
import torch

from tests.small_models import write_hollow
from tests.weights.lora.lora_files import random, write
from wan_core.weights import LoadError
from wan_core.weights.lora import open_lora

L = "diffusion_model.blocks.0.self_attn.q"
GOOD = {f"{L}.lora_A.weight": (4, 128), f"{L}.lora_B.weight": (128, 4)}

CASES = {
    "no up": ({f"{L}.lora_A.weight": (4, 128)}, "lora_A.weight.*counterpart .up. is missing"),
    "no down": ({f"{L}.lora_up.weight": (128, 4)}, "lora_up.weight.*counterpart .down. is missing"),
    "no factors": ({f"{L}.lora_B.bias": (128,)}, "lora_B.bias.*factors are missing"),
    "mid alone": ({f"{L}.lora_mid.weight": (2, 2, 1)}, "lora_mid.*down, up. is missing"),
    "rank 0": ({f"{L}.lora_A.weight": (0, 128), f"{L}.lora_B.weight": (128, 0)}, "lora_A.*rank 0"),
    "ranks differ": ({f"{L}.lora_A.weight": (4, 128), f"{L}.lora_B.weight": (128, 5)}, r"rank 4 .*5 of .*lora_B"),
    "up no matrix": ({f"{L}.lora_A.weight": (4, 128), f"{L}.lora_B.weight": (128, 4, 3)}, r"should be \[out, rank\]"),
    "one axis": ({f"{L}.lora_A.weight": (4,), f"{L}.lora_B.weight": (128, 4)}, r"lora_A.*\[4\] has fewer axes than 2"),
    "mid": (GOOD | {f"{L}.lora_mid.weight": (4, 5, 1, 1)}, "lora_mid.*rank 5"),
    "alpha of many": (GOOD | {f"{L}.alpha": (3,)}, r"alpha.*\[3\], where one number"),
    "lokr no w2": ({f"{L}.lokr_w1": (4, 4)}, "lokr_w1.*lokr_w2_a, lokr_w2_b. is missing"),
    "lokr half": ({f"{L}.lokr_w1": (4, 4), f"{L}.lokr_w2_a": (4, 4)}, "lokr_w2_b. is missing"),
    "lokr ranks": ({f"{L}.lokr_w1": (4, 4), f"{L}.lokr_w2_a": (32, 3), f"{L}.lokr_w2_b": (2, 32)}, "rank 3.*from 2"),
    "lokr twice": ({f"{L}.lokr_w1": (4, 4), f"{L}.lokr_w1_a": (4, 4), f"{L}.lokr_w2": (4, 4)}, "whole and as a"),
    "lokr core": ({f"{L}.lokr_w1": (4, 4), f"{L}.lokr_w2": (4, 4), f"{L}.lokr_t2": (2, 2, 1)}, "lokr_t2.*core needs"),
    "lokr left": ({f"{L}.lokr_w1": (4, 4, 2), f"{L}.lokr_w2": (4, 4)}, "is a matrix"),
    "loha half": ({f"{L}.hada_w1_a": (8, 2), f"{L}.hada_w1_b": (2, 8)}, "hada_w2_a, hada_w2_b. is missing"),
    "loha sizes": ({f"{L}.hada_w1_a": (8, 2), f"{L}.hada_w1_b": (2, 8), f"{L}.hada_w2_a": (9, 2),
                    f"{L}.hada_w2_b": (2, 8)}, "size 8.*from 9"),
    "loha cores": ({f"{L}.hada_w1_a": (2, 8), f"{L}.hada_w1_b": (2, 8), f"{L}.hada_w2_a": (2, 8),
                    f"{L}.hada_w2_b": (2, 8), f"{L}.hada_t1": (2, 2, 1)}, "hada_t2. is missing"),
    "two kinds": (GOOD | {f"{L}.diff": (128, 128)}, "has both LoRA and a full difference"),
    "two spellings": (GOOD | {"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 128)}, "two spellings"),
    "two biases": (GOOD | {f"{L}.lora_B.bias": (128,), f"{L}.diff_b": (128,)}, "second change of its bias"),
    "two modulations": ({"blocks.0.diff_m": (1, 6, 8), "blocks.0.modulation.diff": (1, 6, 8)}, "both change"),
    "huge product": ({f"{L}.lora_A.weight": (1, 2**20), f"{L}.lora_B.weight": (2**20, 1)}, "larger than any of Wan"),
    "huge rank": ({f"{L}.lora_A.weight": (2**16, 8), f"{L}.lora_B.weight": (8, 2**16)}, "rank 65536"),
    "huge tensor": ({f"{L}.diff": (2**16, 2**15)}, "larger than any of Wan"),
    "huge kernel": ({f"{L}.lora_A.weight": (4, 128), f"{L}.lora_B.weight": (128, 4),
                     f"{L}.lora_mid.weight": (4, 4, 2**24)}, "larger than any layer"),
    "huge lokr": ({f"{L}.lokr_w1": (2**10, 2**10), f"{L}.lokr_w2": (2**10, 2**10)}, "larger than any of Wan"),
}


@pytest.mark.parametrize("name", CASES)
def test_contradictions(tmp_path, name):
    """Missing halves, ranks that differ, empty and huge shapes; files whose data are holes, so that reading costs."""
    shapes, message = CASES[name]
    path = write_hollow(tmp_path / "bad.safetensors", shapes)
    with pytest.raises(LoadError, match=message) as error:
        open_lora(path)
    assert str(error.value).startswith("bad.safetensors")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), float("-inf")])
def test_alphas_that_are_no_numbers(tmp_path, alpha):
    """An alpha that is not finite would turn the model into NaN; the error names its key."""
    tensors = {key: random(*shape) for key, shape in GOOD.items()} | {f"{L}.alpha": torch.tensor(alpha)}
    with pytest.raises(LoadError, match=rf"q\.alpha'.*alpha is {alpha}"):
        open_lora(write(tmp_path / "x.safetensors", tensors))


def test_factors_that_are_no_floats(tmp_path):
    """Integer factors are a quantised file of an unknown kind."""
    tensors = {key: random(*shape).to(torch.int8) for key, shape in GOOD.items()}
    with pytest.raises(LoadError, match="lora_A.weight.*int8"):
        open_lora(write(tmp_path / "x.safetensors", tensors))


def test_shapes_without_numbers(tmp_path):
    """PyTorch files can hold tensors that repeat one number a million times, or none."""
    torch.save({f"{L}.diff": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "a.pt")
    with pytest.raises(LoadError, match="larger than any of Wan"):
        open_lora(tmp_path / "a.pt")
    torch.save({f"{L}.diff": torch.zeros(4, 4, device="meta")}, tmp_path / "b.pt")
    with pytest.raises(LoadError, match="no numbers"):
        open_lora(tmp_path / "b.pt")


@pytest.mark.parametrize("declared, message", [
    ([128, 129], "not that of the adapter"), ([-128, -128], "not that of the adapter"), ([1] * 9, "at most 8 axes"),
])
def test_declared_shapes(tmp_path, declared, message):
    """A declared shape that is not the adapter's own is refused."""
    tensors = {key: random(*shape) for key, shape in GOOD.items()}
    with pytest.raises(LoadError, match=f"reshape_weight.*{message}"):
        open_lora(write(tmp_path / "x.safetensors", tensors | {f"{L}.reshape_weight": torch.tensor(declared)}))


@pytest.mark.parametrize("metadata", [
    {"lora_adapter_metadata": "{"},
    {"lora_adapter_metadata": "[1]"},
    {"lora_adapter_metadata": "[" * 100_000},
    {"lora_adapter_metadata": json.dumps({"lora_alpha": float("nan")})},
    {"lora_adapter_metadata": '{"lora_alpha": 1e999}'},
    {"lora_adapter_metadata": json.dumps({"lora_alpha": "8"})},
    {"lora_adapter_metadata": '{"lora_alpha": ' + "9" * 5000 + "}"},
    {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "alpha_pattern": {"to_q": None}})},
    {"lora_adapter_metadata": json.dumps({"lora_alpha": 8, "alpha_pattern": [1]})},
    {"ss_network_args": "rs_lora=True"},
])
def test_metadata(tmp_path, metadata):
    """Metadata that would be misread are an error that names them: a wrong scale is seen in no log."""
    tensors = {key: random(*shape) for key, shape in GOOD.items()}
    with pytest.raises(LoadError, match=next(iter(metadata))):
        open_lora(write(tmp_path / "x.safetensors", tensors, **metadata))
