"""The transformer: a step, attention alone, and what compiling it gains.

A step is as many forwards as guidance takes: one or two, see `Scale.passes`. Ours is a `Model` as a run uses it, which
is asked for its transformer before each step.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.cases.bench import PROMPT_TOKENS, Bench, Clip, computed_in, name_of
from benchmarks.fused_kernels import without_kernels
from benchmarks.limits import token_count, transformer_work
from benchmarks.shared import synchronise
from wan_core.dit import Compile, ModelInputs, fused
from wan_core.dit.attention import attention, describe_backends
from wan_core.models import Model

Step = Callable[[], object]


def step(bench: Bench) -> None:
    """One step of the transformer beside diffusers and ComfyUI; on a GPU also with Sage attention, without kernels."""
    for form in bench.scale.forms:
        model = bench.model(bench.scale.spec, form, attention="auto")
        for clip in bench.scale.clips:
            case, dtype = f"step, {form}, {clip.name}", computed_in(form)
            if bench.is_late(case):
                continue
            inputs = Inputs(bench, clip)
            work = {"ours": inputs.ours(model)}
            if form != "fp8":
                work |= bench.beside(case, ("diffusers", "comfyui"), lambda peer: inputs.theirs(peer, dtype))
            measure(bench, case, clip, form, work, clip.goals.get(form))
            del work
            for name, variant in variants(bench, model).items():
                goals = clip.goals.get(f"{form} {name}")
                measure(bench, f"{case}, {name}", clip, form, {"ours": variant(inputs)}, goals)
        model.placement.clear()


def variants(bench: Bench, model: Model) -> dict[str, Callable[["Inputs"], Step]]:
    """Other ways to compute the same step that can run here."""
    dtype = model.computes_in(model.low)
    runs_here = describe_backends(bench.device, dtype)
    found = {backend: lambda inputs, backend=backend: inputs.ours(replace(model, attention=backend))
             for backend in ("sage", "sage3") if runs_here[backend] is None}
    if bench.is_gpu and fused.tried_kernels(bench.device, dtype) is not None:
        found["without kernels"] = lambda inputs: plain(inputs.ours(model))
    return found


def plain(run: Step) -> Step:
    """The same step with PyTorch's operations in place of the fused kernels."""
    def step_without() -> None:
        with without_kernels():
            run()
    return step_without


def measure(bench: Bench, case: str, clip: Clip, form: str, work: dict[str, Step],
            goals: dict[str, float] | None) -> None:
    """Report steps beside each other and beside what the machine could do."""
    tokens = token_count(bench.scale.spec, clip.shape)
    needed = transformer_work(bench.scale.spec, tokens) * bench.scale.passes
    times = bench.times(case, work, clip.rounds)
    bench.report.compare(case, times, bench.limit(needed, form), goals, part="step", tokens=tokens, flops=needed.total,
                         **({"diffusers_attention": peers.best_attention(computed_in(form), bench.device)}
                            if "diffusers" in times else {}))


class Inputs:
    """What the transformers of a scale are given for a clip: noise, a timestep, prompts of the usual length."""

    def __init__(self, bench: Bench, clip: Clip) -> None:
        spec = bench.scale.spec
        self._bench = bench
        self.latents = torch.randn(clip.shape, device=bench.device)
        self.texts = torch.zeros(bench.scale.passes, 1, spec.text_len, spec.text_dim, device=bench.device)
        self.texts[:, :, :PROMPT_TOKENS] = torch.randn(bench.scale.passes, 1, PROMPT_TOKENS, spec.text_dim)

    def ours(self, model: Model) -> Step:
        """One of our steps."""
        timestep = torch.tensor([500.0])
        prepared = [model.get("low").prepare_text(text) for text in self.texts]

        def run() -> None:
            module = model.get("low")
            for text in prepared:
                module(ModelInputs(self.latents, timestep, text), backend=model.attention)
        return run

    def theirs(self, peer: str, dtype: torch.dtype) -> Step:
        """The same by another implementation."""
        forward = peers.transformer(peer, self._bench.scale.spec, dtype, self._bench.device)
        timestep = torch.tensor([500.0], device=self._bench.device)

        def run() -> None:
            for text in self.texts:
                forward(self.latents, timestep, text)
        return run


def compiled(bench: Bench) -> None:
    """A step with compiled blocks beside the same without, and what the first one takes."""
    for form in bench.scale.forms:
        model = bench.model(bench.scale.spec, form, attention="auto")
        for clip in bench.scale.clips:
            case = f"step, {form}, {clip.name}, compiled"
            if bench.is_late(case):
                continue
            inputs = Inputs(bench, clip)
            ours, eager = inputs.ours(replace(model, compile=Compile())), inputs.ours(model)
            synchronise(bench.device)
            began = time.perf_counter()
            ours()
            synchronise(bench.device)
            bench.report.add(case, "first step, s", time.perf_counter() - began)
            measure(bench, case, clip, form, {"ours": ours, "not compiled": eager}, clip.goals.get(form))
        model.placement.clear()


def attention_alone(bench: Bench) -> None:
    """Self-attention as it is chosen here, beside all backends that can run, PyTorch's own and diffusers' fastest."""
    spec = bench.scale.spec
    for dtype in dict.fromkeys(map(computed_in, bench.scale.forms)):
        for clip in bench.scale.clips:
            tokens = token_count(spec, clip.shape)
            case = f"attention, {name_of(dtype)}, {tokens:,} tokens"
            if bench.is_late(case):
                continue
            q, k, v = (torch.randn(1, tokens, spec.num_heads, 128, device=bench.device).to(dtype) for _ in range(3))
            times = bench.times(case, attentions(bench, case, q, k, v), max(clip.rounds, 3))
            flops = 4.0 * tokens ** 2 * spec.num_heads * 128
            bench.report.compare(case, times, flops / bench.machine.matmul(dtype), part="attention", flops=flops)


def attentions(bench: Bench, case: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Step]:
    """Attention of q, k, v [1, L, heads, 128] by "ours", which is the backend "auto", by our others, and by others';
    the report says which of ours cannot run, and why."""
    reasons = describe_backends(bench.device, q.dtype)
    if absent := [f"{name}: {reason}" for name, reason in reasons.items() if reason]:
        bench.report.note(case, f"cannot run here: {'; '.join(absent)}")
    heads = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    work: dict[str, Step] = {"ours": lambda: attention(q, k, v, backend="auto"),
                             "torch": lambda: F.scaled_dot_product_attention(*heads)}
    if "diffusers" in bench.peers:
        attend = peers.attend(peers.best_attention(q.dtype, bench.device))
        work["diffusers"] = lambda: attend(q, k, v)
    # On a CPU it takes longer to compile FlexAttention than to measure all others; on a GPU all logits have no room.
    left_out = "auto", "sdpa-math" if bench.is_gpu else "flex"
    others = [name for name, reason in reasons.items() if reason is None and name not in left_out]
    return work | {name: lambda name=name: attention(q, k, v, backend=name) for name in others}
