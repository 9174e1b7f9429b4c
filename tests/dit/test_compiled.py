"""Compiled blocks: the numbers of plain ones, of graphs that serve all blocks, sizes, prompts, steps and strengths."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.small_models import SMALL
from tests.weights.lora.lora_files import random, write
from wan_core import load_experts, load_model, open_lora
from wan_core.dit import Compile, ModelInputs, VaceControl, VaceTransformer, WanTransformer, use_compiled
from wan_core.dit.compiled import Compiled
from wan_core.dit.layers import Linear
from wan_core.memory import Layout, OneAtATime, Plan

# Traces and counts graphs as any compiler of PyTorch's, and runs them at once.
TRACED = Compile(backend="eager")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh():
    """Graphs of other tests are gone."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def told(caplog):
    """Warnings of ours; the compiler has a log of its own."""
    return [record.message for record in caplog.records
            if record.name.startswith("wan_core") and record.levelname == "WARNING"]


def small(kind):
    torch.manual_seed(2)
    spec = SMALL[kind]
    return (VaceTransformer if spec.vace_layers else WanTransformer)(spec).requires_grad_(False).eval()


@torch.no_grad()
def answer(model, frames=3, height=8, width=12, words=6, timestep=600.0, batch=1, **how):
    spec = model.spec
    times = torch.full((batch,), timestep)
    if spec.model_type == "ti2v":
        times = torch.tensor([[0.0] + [timestep] * (frames - 1)]).repeat(batch, 1)
    controls = (VaceControl(randn(batch, 96, frames, height, width, seed=3), 0.8),) if spec.vace_layers else ()
    text = model.prepare_text(randn(batch, words, spec.text_dim, seed=1))
    return model(ModelInputs(randn(batch, spec.in_dim, frames, height, width), times, text, controls=controls), **how)


def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm()


CALLS = ({}, {"timestep": 20.0}, {"words": 11}, {"frames": 5, "height": 10}, {"frames": 1, "width": 8}, {"chunk": 30})


@pytest.mark.parametrize("kind", ["t2v", "ti2v", pytest.param("vace", marks=pytest.mark.slow)])
def test_three_graphs_serve_all(kind):
    """Promise: all blocks, steps, prompts, sizes, chunks and frames with a time of their own are served by the three
    graphs of the first call, and the result is that of plain blocks. VACE blocks are a kind of their own."""
    model = small(kind)
    number = 6 if kind == "vace" else 3
    for call in CALLS:
        use_compiled(model, None)
        expected = answer(model, **call)
        use_compiled(model, TRACED)
        assert close(answer(model, **call), expected, 1e-5) and graphs() == number, call


def test_experts_and_a_copy_without():
    """Promise: both experts share the graphs, and a copy of the model without `compile` runs plain blocks."""
    pair = load_experts(placement=OneAtATime("cpu"))
    compiled = replace(pair, compile=TRACED)
    for name in ("high", "low"):
        expected = answer(pair.get(name))
        assert pair.get(name).compiled is None
        assert close(answer(compiled.get(name)), expected, 1e-5) and graphs() == 3
        assert torch.equal(answer(pair.get(name)), expected)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Factors for linear layers of all pieces, in every block."""
    torch.manual_seed(5)
    tensors = {}
    for index in range(6):
        for layer, rows in (("self_attn.q", 128), ("cross_attn.o", 128), ("ffn.0", 384)):
            name = f"diffusion_model.blocks.{index}.{layer}"
            tensors |= {f"{name}.lora_A.weight": random(4, 128), f"{name}.lora_B.weight": random(rows, 4)}
    return open_lora(write(tmp_path_factory.mktemp("loras") / "l.safetensors", tensors))


def test_strengths_are_data(lora):
    """Promise: another strength of a LoRA, or the end of its range, needs no other graph; one that is 0 for the whole
    run is no part of any."""
    model = replace(load_model(placement=OneAtATime("cpu")), compile=TRACED)
    plain = replace(model, compile=None)
    for strength, sigma in ((0.7, 0.5), (-0.4, 0.5), (1.3, 0.5), (1.3, 0.95)):
        expected = answer(plain.with_lora(lora, strength, start=0.9).get("low", sigma))
        found = answer(model.with_lora(lora, strength, start=0.9).get("low", sigma))
        assert close(found, expected, 1e-5) and graphs() == 3
    assert close(found, answer(plain.get("low")), 1e-5)
    assert not close(found, answer(model.with_lora(lora, 0.7).get("low")), 1e-3)
    before = answer(model.get("low"))
    number = graphs()
    assert torch.equal(answer(model.with_lora(lora, 0.0).get("low")), before) and graphs() == number


@pytest.mark.parametrize("weights", ["bf16", pytest.param("q8_0", marks=pytest.mark.slow), "fp8_scaled"])
def test_swapped_is_resident(weights, lora):
    """Promise: with compiled blocks, block swap changes no bit and needs no graph, whatever the weights are."""
    model = load_model(placement=OneAtATime("cpu"))
    if weights != "bf16":
        model = model.quantised(weights)
    model = model.with_lora(lora, 0.8)
    expected = answer(model.get("low"))
    model = replace(model, compile=TRACED)
    resident = answer(model.get("low"))
    assert close(resident, expected, 1e-5)
    swapped = replace(model, plan=Plan(Layout(4)))
    assert torch.equal(answer(swapped.get("low")), resident) and graphs() == 3


def test_fp8_products():
    """Promise: products in FP8 are part of the graphs."""
    model = load_model(placement=OneAtATime("cpu"), fp8_products="on").quantised("fp8_scaled")
    expected = answer(model.get("low"))
    # Where a number falls on the other side of a rounding step, it is a step away.
    assert close(answer(replace(model, compile=TRACED).get("low")), expected, 2e-2) and graphs() == 3


@pytest.mark.slow
def test_many_graphs():
    """Promise: more kinds of calls than PyTorch's own limit of graphs are compiled, too, and its settings stay."""
    model = small("t2v")
    limit = torch._dynamo.config.recompile_limit
    use_compiled(model, replace(TRACED, dynamic=False))
    for frames in range(1, limit + 3):
        answer(model, frames=frames, height=4, width=4)
        assert graphs() == 3 * frames
    assert torch._dynamo.config.recompile_limit == limit


class Uncompilable(Linear):
    """A linear layer that cannot be part of a graph."""

    def forward(self, x, *, gelu=False):
        torch._dynamo.graph_break()
        return super().forward(x, gelu=gelu)


def test_what_cannot_be_compiled_runs_all_the_same(caplog):
    """Promise: where one of the pieces cannot be compiled, the result is that of plain blocks, nothing being computed
    twice, and one line of the log says why."""
    model = small("t2v")
    expected = answer(model)
    for block in model.blocks:
        block.ffn[2].__class__ = Uncompilable
    use_compiled(model, TRACED)
    for _ in range(2):
        assert close(answer(model), expected, 1e-5)
    assert len(told(caplog)) == 1 and "runs without torch.compile" in told(caplog)[0]


def test_no_compiler(caplog):
    """Promise: on a machine without a C++ compiler a model that is to be compiled runs, and the log says what is
    missing."""
    model = small("t2v")
    expected = answer(model)
    use_compiled(model, Compile())
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        assert torch.equal(answer(model), expected)
    assert "C++ compiler" in told(caplog)[0]


class TooLarge(Linear):
    """A linear layer for whose numbers there is no room."""

    def hold(self):
        raise torch.OutOfMemoryError("injected")

    def release(self):
        """Nothing was held."""


def test_memory_that_runs_out_is_no_failure_of_the_compiler(caplog):
    """Promise: memory that runs out in a compiled block is what the caller is told, who knows what to do about it; the
    model stays compiled."""
    model = small("t2v")
    use_compiled(model, TRACED)
    expected = answer(model)
    model.blocks[1].ffn[0].__class__ = TooLarge
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        answer(model)
    model.blocks[1].ffn[0].__class__ = Linear
    # In that block the pieces that came before were compiled for it.
    assert torch.equal(answer(model), expected) and graphs() == 5 and not told(caplog)


def test_gradients():
    """Promise: where gradients are recorded blocks are plain, so a compiled model can be trained."""
    model = small("t2v").requires_grad_(True)
    use_compiled(model, TRACED)
    text = model.prepare_text(randn(1, 6, 96))
    model(ModelInputs(randn(1, 16, 3, 8, 12), torch.tensor([500.0]), text)).sum().backward()
    assert model.blocks[0].ffn[0].weight.grad.abs().sum() > 0 and not graphs()


def test_cuda_graphs_only_where_weights_stay(caplog):
    """Promise: where CUDA graphs cannot be, the model is compiled without them, and the log says why, once."""
    model = replace(load_model(placement=OneAtATime("cpu")), compile=Compile("reduce-overhead"))
    for _ in range(2):
        assert not model.get("low").compiled.records
    assert len(told(caplog)) == 1 and "the device cpu has none" in told(caplog)[0]


def test_what_cuda_graphs_are_made_of():
    """Promise: graphs that are to be recorded change none of their inputs, and the result is the same."""
    model = small("t2v")
    expected = answer(model)
    seen = []

    def note(graph, inputs):
        def run(*values):
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            before = [tensor.clone() for tensor in tensors]
            result = graph(*values)
            seen.append(all(map(torch.equal, before, tensors)))
            return result

        return run

    how = Compile()
    object.__setattr__(how, "backend", note)
    model.compiled = Compiled(how, records=True)
    assert close(answer(model), expected, 1e-5) and seen and all(seen)


@pytest.mark.parametrize("wrong", [{"mode": "fastest"}, {"backend": "gcc"},
                                   {"mode": "reduce-overhead", "backend": "eager"}])
def test_unknown_choices(wrong):
    """Promise: an unknown mode or compiler is refused at once, with what there is."""
    with pytest.raises(ValueError, match="choose|Use the mode default"):
        Compile(**wrong)


def test_inductor():
    """Promise: compiled by PyTorch's own compiler, a step is equal to the plain one within 1e-4, in chunks as well."""
    model = small("t2v")
    calls = ({}, {"chunk": 30}, {"frames": 5, "height": 10})
    expected = [answer(model, **call) for call in calls]
    use_compiled(model, Compile())
    assert all(close(answer(model, **call), result) for call, result in zip(calls, expected)) and graphs() == 3


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bf16", "q8_0", "fp8_scaled"])
def test_inductor_in_half_precision(weights, lora):
    """Promise: in bfloat16, with LoRAs on weights of any kind, a compiled step is the plain one within 1 %."""
    model = load_model(placement=OneAtATime("cpu"), dtype="bfloat16")
    model = (model if weights == "bf16" else model.quantised(weights)).with_lora(lora, 0.8)
    expected = answer(model.get("low"))
    assert close(answer(replace(model, compile=Compile()).get("low")), expected, 1e-2)


SECOND_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.dit.test_compiled import Compile, answer, small, use_compiled
model = small("t2v")
use_compiled(model, Compile())
answer(model)
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_kept_on_disk(tmp_path):
    """Promise: another process finds what the first has compiled: all three graphs."""
    root = Path(__file__).resolve().parents[2]
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SECOND_PROCESS, str(root)], capture_output=True, text=True,
                              check=True, cwd=root, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
        found.append(int(done.stdout))
    assert found == [0, 3]
