"""Adapters on a running transformer: as merged weights for every family and weight format, and no trace after."""

from dataclasses import replace

import pytest
import torch

from wan_core import load_model, nano
from wan_core.dit import ModelInputs
from wan_core.memory import OneAtATime
from wan_core.weights import build_module, load_module
from wan_core.weights.lora import Delta, DoRA, LoHa, LoKr, LowRank, Replacement, Target
from wan_core.weights.lora.attach import Attachment
from wan_core.weights.quantised import dense

LINEAR = "blocks.1.self_attn.q"
FORMATS = (None, "fp8_scaled", "q8_0", "q4_0")


def numbers(*shape, seed=0, scale=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def families():
    low_rank = LowRank(numbers(4, 128, scale=0.3), numbers(128, 4, seed=1, scale=0.3))
    return {
        "lora": {Target(LINEAR, "weight"): low_rank},
        "lora with gelu": {Target("blocks.2.ffn.0", "weight"): LowRank(numbers(4, 128), numbers(384, 4, seed=1))},
        "float32 layers": {Target("head.head", "weight"): LowRank(numbers(4, 128), numbers(64, 4, seed=1)),
                           Target("time_projection.1", "weight"): LowRank(numbers(2, 128), numbers(768, 2, seed=1))},
        "text": {Target("text_embedding.0", "weight"): LowRank(numbers(4, 96), numbers(128, 4, seed=1))},
        "lokr": {Target(LINEAR, "weight"): LoKr((numbers(8, 8, scale=0.3),), (numbers(16, 2, scale=0.3),
                                                                             numbers(2, 16, scale=0.3)))},
        "loha": {Target(LINEAR, "weight"): LoHa((numbers(128, 2, scale=0.3), numbers(2, 128, scale=0.3)),
                                                (numbers(128, 2, seed=1, scale=0.3),
                                                 numbers(2, 128, seed=2, scale=0.3)))},
        "dora, rows": {Target(LINEAR, "weight"): DoRA(low_rank, numbers(128, 1).abs() * 10 + 0.5)},
        "dora, columns": {Target(LINEAR, "weight"): DoRA(low_rank, numbers(1, 128).abs() * 10 + 0.5)},
        "weight difference": {Target(LINEAR, "weight"): Delta(numbers(128, 128))},
        "replacement": {Target(LINEAR, "weight"): Replacement(numbers(128, 128))},
        "small tensors": {Target(LINEAR, "bias"): Delta(numbers(128)),
                          Target("blocks.1.norm3", "weight"): Delta(numbers(128)),
                          Target("blocks.1.self_attn.norm_q", "weight"): Delta(numbers(128)),
                          Target("blocks.0", "modulation"): Delta(numbers(1, 6, 128)),
                          Target("head", "modulation"): Delta(numbers(1, 2, 128)),
                          Target("patch_embedding", "weight"): LowRank(numbers(4, 64), numbers(128, 4, seed=1))},
        "weight and bias": {Target(LINEAR, "weight"): DoRA(low_rank, numbers(128, 1).abs() * 10 + 0.5),
                            Target(LINEAR, "bias"): Delta(numbers(128, scale=0.5))},
    }


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def part(request):
    part = load_model(nano.T2V, placement=OneAtATime("cpu")).low
    return part if request.param is None else part.quantised(request.param)


@torch.no_grad()
def answer(model):
    text = model.prepare_text(numbers(1, 12, 96, seed=5, scale=1.0))
    return model(ModelInputs(numbers(1, 16, 3, 8, 8, seed=6, scale=1.0), torch.tensor([600.0]), text))


def merged(part, stack, strengths):
    """The module with every adapter added to its dense weights."""
    tensors = {name: dense(part.file[name], torch.float32) for name in part.file}
    for adapters, strength in zip(stack, strengths, strict=True):
        for target, adapter in adapters.items():
            tensors[target.name] = adapter.merged(tensors[target.name], strength)
    return load_module(build_module(part.spec), tensors)


@pytest.mark.parametrize("family", families())
def test_on_activations_as_in_merged_weights(family, part):
    """Promise: at most 1e-4 apart for every family on every weight format, at strength 0.7 and -0.5."""
    adapters = families()[family]
    model = part.build(torch.device("cpu"), torch.float32)
    plain = answer(model)
    attachment = Attachment(model, [adapters])
    for strength in (0.7, -0.5):
        attachment.set([strength])
        changed = answer(model)
        assert (changed - answer(merged(part, [adapters], [strength]))).abs().max() <= 1e-4
        assert (changed - plain).abs().max() > 1e-3, "the adapter changes nothing, so the comparison says nothing"


def test_strength_zero_and_detaching_leave_no_trace(part):
    """Promise: at strength 0, and after adapters are taken off, the result is bit-equal to that without any."""
    model = part.build(torch.device("cpu"), torch.float32)
    plain, names = answer(model), [name for name, _ in model.named_parameters()]
    attachment = Attachment(model, list(families().values()))
    assert torch.equal(answer(model), plain)
    attachment.set([0.3] * len(families()))
    assert not torch.equal(answer(model), plain)
    attachment.set([0.0] * len(families()))
    assert torch.equal(answer(model), plain)
    attachment.set([0.3] * len(families()))
    attachment.detach()
    assert torch.equal(answer(model), plain) and [name for name, _ in model.named_parameters()] == names


def test_any_number_at_once(part):
    """Promise: several files on the same tensors add up, each with its own strength."""
    stack = [families()[name] for name in ("lora", "lokr", "loha", "weight difference", "small tensors")]
    strengths = [0.5, -0.3, 0.8, 0.2, 0.6]
    model = part.build(torch.device("cpu"), torch.float32)
    attachment = Attachment(model, stack)
    attachment.set(strengths)
    assert (answer(model) - answer(merged(part, stack, strengths))).abs().max() <= 1e-4


def test_a_new_strength_copies_no_factor(part):
    """Promise: setting strengths leaves the tensors of the adapters where they are."""
    model = part.build(torch.device("cpu"), torch.float32)
    attachment = Attachment(model, [families()["lora"]])
    attachment.set([0.5])
    layer = model.get_submodule(LINEAR)
    factors = [held.adapter.down.data_ptr() for held in layer._adapters]
    attachment.set([0.9])
    assert model.get_submodule(LINEAR) is layer
    assert [held.adapter.down.data_ptr() for held in layer._adapters] == factors


def test_half_precision(part):
    """Promise: in bfloat16 the result is that of merged weights within the precision."""
    adapters = families()["lora"]
    adapters = {target: replace(adapter, scale=30.0) for target, adapter in adapters.items()}
    model = part.build(torch.device("cpu"), torch.bfloat16)
    plain = answer(model)
    attachment = Attachment(model, [adapters])
    attachment.set([1.0])
    exact = answer(merged(part, [adapters], [1.0]))
    assert (answer(model) - exact).norm() < 0.2 * (plain - exact).norm()
