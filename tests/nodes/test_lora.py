"""Wan LoRA: what it does to a model and to no other, its report, stacks of other packs; the loaders' weights."""

import logging
import os
from pathlib import Path

import pytest
import torch

from tests.weights.lora.lora_files import low_rank, low_rank_file, random, write
from wan_core.presets import TRANSFORMERS
from wan_core.weights import expected_shapes

NANO = {name.removesuffix(".weight"): shape for name, shape in expected_shapes(TRANSFORMERS["nano_t2v"]).items()
        if name.endswith(".weight") and len(shape) == 2}
ATTENTION = {name: shape for name, shape in NANO.items() if ".self_attn." in name}
COUNT = len(ATTENTION)


@pytest.fixture
def loras(workspace) -> Path:
    """models/loras with two files for the nano models: "a.safetensors" and "sub/b.safetensors"."""
    folder = workspace / "models" / "loras"
    (folder / "sub").mkdir(parents=True)
    torch.manual_seed(3)
    low_rank_file(folder / "a.safetensors", ATTENTION)
    low_rank_file(folder / "sub" / "b.safetensors", ATTENTION)
    return folder


@pytest.fixture
def sample(call, nano):
    """One step of a nano model on a small latent."""
    def run(model, steps=1, **changes) -> torch.Tensor:
        return call("WanCoreSampler", model=model, positive=nano["positive"], negative=nano["negative"], steps=steps,
                    guidance=1.0, seed=4, latent={"samples": torch.zeros(1, 16, 1, 4, 4)}, **changes)[0]["samples"]

    return run


def test_two_samplers_on_one_loader(call, loras, sample):
    """Promise: models with a LoRA, with another one, and with none share one loader, and each gives bit for bit what
    it gives alone, in whatever order they run."""
    model, = call("WanCoreModelLoader")
    adapted = [call("WanCoreLora", model=model, lora=name)[0] for name in ("a.safetensors", "sub/b.safetensors")]
    results = [sample(one) for one in (adapted[0], model, adapted[1], adapted[0], model)]
    alone = [sample(call("WanCoreModelLoader")[0])] + [
        sample(call("WanCoreLora", model=call("WanCoreModelLoader")[0], lora=name)[0])
        for name in ("a.safetensors", "sub/b.safetensors")]
    for result, expected in zip(results, (alone[1], alone[0], alone[2], alone[1], alone[0]), strict=True):
        assert torch.equal(result, expected)
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[1], alone[2])


def test_every_widget_acts(call, loras, sample):
    """Promise: strength, noise levels and blocks change what the LoRA does; strength 0 and no LoRA are the model."""
    model, = call("WanCoreModelLoader")

    def with_lora(**changes):
        return sample(call("WanCoreLora", model=model, **{"lora": "a.safetensors", **changes})[0])

    plain, full = sample(model), with_lora()
    assert torch.equal(with_lora(lora="none"), plain) and torch.equal(with_lora(strength=0.0), plain)
    # One step from pure noise: a range below it is never entered.
    assert torch.equal(with_lora(start_sigma=0.5), plain) and torch.equal(with_lora(end_sigma=0.5), full)
    assert torch.equal(with_lora(blocks="self_attn"), full)
    different = [full, with_lora(strength=0.5), with_lora(blocks="0-2"), with_lora(strength=-1.0)]
    assert not any(torch.equal(one, other) for i, one in enumerate(different) for other in different[:i])


def test_an_expert_pair(call, loras):
    """Promise: both experts take one strength, or the low-noise expert its own; a single model refuses the latter."""
    pair, = call("WanCoreExpertPairLoader")
    same, = call("WanCoreLora", model=pair, lora="a.safetensors", strength=0.5, strength_low=0.1)[0].loras
    own, = call("WanCoreLora", model=pair, lora="a.safetensors", strength=0.5, strength_low=0.1,
                low_noise="own strength")[0].loras
    assert same.strengths == {"high": 0.5, "low": 0.5} and own.strengths == {"high": 0.5, "low": 0.1}
    with pytest.raises(ValueError, match="a strength of its own for low noise, and Nano T2V is a single model"):
        call("WanCoreLora", model=call("WanCoreModelLoader")[0], lora="a.safetensors", low_noise="own strength")


def test_the_report(call, loras, caplog):
    """Promise: the report, which the log repeats, says for each file what matched, what was skipped and why, and which
    keys nobody knows; chained nodes report what they add."""
    write(loras / "c.safetensors", {
        f"diffusion_model.{module}.lora_{kind}.weight": factor
        for module, shape in {**ATTENTION, "blocks.0.cross_attn.k_img": (128, 128), "blocks.0.ffn.0": (7, 7)}.items()
        for kind, factor in zip("AB", low_rank(shape), strict=True)} | {"strange.key": random(2)})
    caplog.set_level(logging.INFO)
    model, report = call("WanCoreLora", model=call("WanCoreModelLoader")[0], lora="c.safetensors", strength=0.8,
                         start_sigma=0.9, blocks="0-1")
    used = sum(name.startswith(("blocks.0.", "blocks.1.")) for name in ATTENTION)
    lines = report.splitlines()
    assert lines[0] == (f"c.safetensors: {COUNT} of {COUNT + 2} adapters matched, {used} of them in '0-1', "
                        "strength 0.8; from sigma 0.9 to 0")
    assert lines[1:] == [
        "  skipped 2 keys: for a tensor blocks.0.ffn.0.weight of shape [7, 7], which in this model has [384, 128]",
        "  skipped 2 keys: for the CLIP image branch of Wan 2.1 image-to-video, which this model does not have",
        "  unknown 1 keys: strange.key"]
    assert f"Wan: {report}" in caplog.text
    chained, report = call("WanCoreLora", model=model, lora="sub/b.safetensors")
    assert len(chained.loras) == 2 and report == f"b.safetensors: {COUNT} of {COUNT} adapters matched, strength 1"
    assert call("WanCoreLora", model=model)[1] == "no LoRA"


def test_merge(call, loras, sample):
    """Promise: with merge the LoRAs are in the weights, with the same result but for rounding to the file's bfloat16,
    and the model that went in is as it was; on quantised weights they stay beside them."""
    model, = call("WanCoreModelLoader", precision="float32")
    plain = sample(model)
    beside, _ = call("WanCoreLora", model=model, lora="a.safetensors")
    merged, _ = call("WanCoreLora", model=model, lora="a.safetensors", merge=True)
    assert len(beside.loras) == 1 and not merged.loras and merged.record() == beside.record()
    expected = sample(beside)
    assert 0 < (sample(merged) - expected).norm() < 0.05 * (expected - plain).norm()
    assert torch.equal(sample(model), plain)
    quantised, = call("WanCoreModelLoader", precision="float32", weights="q8_0")
    kept, _ = call("WanCoreLora", model=quantised, lora="a.safetensors", merge=True)
    assert len(kept.loras) == 1 and kept.record() == beside.record()


def test_the_report_on_a_pair(call, loras):
    """Promise: for a pair the report tells the experts apart, and says once what both leave out."""
    pair, = call("WanCoreExpertPairLoader")
    low_rank_file(loras / "d.safetensors", {**ATTENTION, "blocks.0.strange": (128, 128)})
    report = call("WanCoreLora", model=pair, lora="d.safetensors", low_noise="own strength", strength_low=0.25)[1]
    matched = f"{COUNT} of {COUNT + 1} adapters matched"
    assert report.splitlines()[0] == (f"d.safetensors: high noise {matched}, strength 1; low noise {matched}, "
                                      "strength 0.25")
    assert report.count("unknown 2 keys") == 1


def test_a_stack_comes_first(call, loras, sample):
    """Promise: a stack of another pack is applied before the node's own file, its empty rows left out; alone it is as
    good as chained nodes."""
    model, = call("WanCoreModelLoader")
    stack = [("a.safetensors", 0.5, 1.0), ("None", 1.0, 1.0), ["sub/b.safetensors", 1, 1]]
    stacked, report = call("WanCoreLora", model=model, lora_stack=stack)
    chained = model
    for name, strength in (("a.safetensors", 0.5), ("sub/b.safetensors", 1.0)):
        chained, _ = call("WanCoreLora", model=chained, lora=name, strength=strength)
    assert torch.equal(sample(stacked), sample(chained)) and len(report.splitlines()) == 2
    both, _ = call("WanCoreLora", model=model, lora="a.safetensors", strength=2.0, lora_stack=stack)
    assert [lora.strengths["low"] for lora in both.loras] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(("stack", "message"), [
    ([("absent.safetensors", 1.0, 1.0)], "there is no 'absent.safetensors' among the model files in 'loras'"),
    ([("../secret.safetensors", 1.0, 1.0)], "there is no '../secret.safetensors'"),
    ([("a.safetensors",)], "the LoRA stack holds .*expected .file name"),
    (["a.safetensors"], "the LoRA stack holds 'a.safetensors'"),
    ([("a.safetensors", float("nan"), 1.0)], "the LoRA stack holds"),
    ([(3, 1.0, 1.0)], "the LoRA stack holds"),
])
def test_bad_stacks(call, loras, nano, stack, message):
    """Promise: a stack that is none, or names a file that is not in the folder, is refused with what is wrong."""
    low_rank_file(loras.parent / "secret.safetensors", ATTENTION)
    with pytest.raises(ValueError, match=message):
        call("WanCoreLora", model=nano["model"], lora_stack=stack)


def test_files_that_do_not_fit(call, loras, nano):
    """Promise: a LoRA for another model, one for a pair on a single model, no LoRA at all, a filter that leaves
    nothing and a range that is none are refused with what is wrong."""
    low_rank_file(loras / "wide.safetensors", {"blocks.0.ffn.2": (256, 64)})
    write(loras / "both.safetensors", {
        f"{prefix}.blocks.0.ffn.2.lora_{kind}.weight": factor for prefix in ("transformer", "transformer_2")
        for kind, factor in zip("AB", low_rank(NANO["blocks.0.ffn.2"]), strict=True)})
    write(loras / "model.safetensors", {"blocks.0.ffn.2.weight": random(4, 4)})
    for changes, message in (
            ({"lora": "wide.safetensors"}, "seems to be made for a model of width 256"),
            ({"lora": "both.safetensors"}, "both.safetensors holds adapters for a high- and a low-noise expert"),
            ({"lora": "model.safetensors"}, "model.safetensors holds no LoRA"),
            ({"blocks": "90"}, "the block filter '90' leaves nothing of a.safetensors"),
            ({"blocks": "all"}, "has the term 'all'"),
            ({"start_sigma": 0.2, "end_sigma": 0.6}, "expected 1 >= start >= end >= 0")):
        with pytest.raises(ValueError, match=message):
            call("WanCoreLora", model=nano["model"], **{"lora": "a.safetensors", **changes})


def test_the_list(pack, workspace):
    """Promise: the list begins with "none", which is all there is without files, and holds those of models/loras."""
    def names():
        return pack.NODE_CLASS_MAPPINGS["WanCoreLora"].INPUT_TYPES()["required"]["lora"][0]

    assert names() == ["none"]
    (workspace / "models" / "loras").mkdir(parents=True)
    (workspace / "models" / "loras" / "a.safetensors").touch()
    assert names() == ["none", "a.safetensors"]


def test_a_replaced_file_is_opened_again(pack, loras):
    """Promise: IS_CHANGED changes when the file does, and asks for no file where none is chosen."""
    node = pack.NODE_CLASS_MAPPINGS["WanCoreLora"]
    before = node.IS_CHANGED(lora="a.safetensors", strength=1.0)
    assert node.IS_CHANGED(lora="a.safetensors", strength=0.5) == before
    os.utime(loras / "a.safetensors", ns=(1, 1))
    assert node.IS_CHANGED(lora="a.safetensors") != before and node.IS_CHANGED(lora="none") == ""


def test_weights_are_quantised_on_load(call, nano, loras, sample):
    """Promise: the loaders' `weights` makes matrices smaller on load and changes little; with a LoRA on them the result
    is another."""
    small, = call("WanCoreModelLoader", weights="q8_0")
    # The bundled pair is FP8 already; any two files of one architecture will do.
    pair, = call("WanCoreExpertPairLoader", high_noise="nano/wan_nano_t2v.safetensors",
                 low_noise="nano/wan_nano_t2v.safetensors", weights="fp8_scaled")
    assert small.low.size(torch.bfloat16) < 0.65 * nano["model"].low.size(torch.bfloat16)
    assert "FP8 e4m3" in pair.high.file.quantised.values() and "FP8 e4m3" in pair.low.file.quantised.values()
    plain, result = sample(nano["model"]), sample(small)
    assert 0 < (result - plain).abs().mean() < 0.05 * plain.abs().mean()
    adapted, _ = call("WanCoreLora", model=small, lora="a.safetensors")
    assert (sample(adapted) - result).abs().mean() > (result - plain).abs().mean()
