"""Step caches: whole runs with each of them, and what a step takes that is computed and one that is reused.

Which steps TeaCache and EasyCache reuse follows from weights, so with random ones their share of reused steps is not
that of the released model; MagCache's follows from the schedule alone. The limit is that of the computed passes.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.cases.bench import PROMPT_TOKENS, Bench
from benchmarks.limits import token_count, transformer_work
from benchmarks.shared import synchronise
from wan_core.cache import EasyCache, MagCache, StepCache, TeaCache
from wan_core.conditioning import TextCondition
from wan_core.models import Model
from wan_core.pipeline import initial_noise, sample
from wan_core.sampling import Conditions, Guidance, Step, make_schedule

SHIFT, SCALE = 5.0, 5.0


@dataclass(frozen=True)
class Run:
    """Seconds of a whole run, and of its steps that were computed and reused."""

    seconds: float
    computed: tuple[float, ...]
    reused: tuple[float, ...]


def whole_runs(bench: Bench) -> None:
    """Guided runs with no cache and with each, and their computed and reused steps."""
    spec, form = bench.scale.cached, bench.scale.forms[0]
    case = f"run of {bench.scale.cached_steps} steps, {form}"
    model = bench.model(spec, form, attention="auto")
    preset = model.preset.name
    caches: dict[str, StepCache | None] = {
        "no cache": None, "TeaCache": TeaCache.for_preset(preset), "MagCache": MagCache.for_preset(preset),
        "EasyCache": EasyCache.of_quality("balanced")}
    if bench.is_late(case):
        return
    # Kernels are compiled and weights are read at the first steps.
    run(bench, model, 2)
    one = bench.limit(transformer_work(spec, token_count(spec, bench.scale.cached_shape)) * 2, form)
    plain: Run | None = None
    for name, cache in caches.items():
        if bench.is_late(f"{case}, {name}"):
            continue
        measured = run(bench, replace(model, cache=cache), bench.scale.cached_steps)
        plain = plain or measured
        facts = {"reused_share": len(measured.reused) / bench.scale.cached_steps}
        for what in ("computed", "reused"):
            if steps := getattr(measured, what):
                facts[f"{what}_step_s"] = statistics.median(steps)
        bench.report.compare(f"{case}, {name}", {"ours": [measured.seconds], **(
            {"no cache": [plain.seconds]} if cache else {})}, one * len(measured.computed), part="caches", **facts)
        if measured.reused:
            bench.report.add(f"{case}, {name}", "reused step / computed step",
                             facts["reused_step_s"] / facts["computed_step_s"], reused_share=facts["reused_share"])
    model.placement.clear()


def run(bench: Bench, model: Model, steps: int) -> Run:
    """A guided run from noise to latents."""
    prompts = [TextCondition(torch.randn(1, PROMPT_TOKENS, model.spec.text_dim)) for _ in range(2)]
    shape, marks, reused = bench.scale.cached_shape, [], []

    def on_step(step: Step) -> None:
        synchronise(bench.device)
        marks.append(time.perf_counter())
        reused.append(bool(step.reused))

    synchronise(bench.device)
    began = time.perf_counter()
    sample(model, torch.zeros(shape), make_schedule("unipc", steps, SHIFT),
           Conditions(prompts[:1], prompts[1:]), Guidance(SCALE, SCALE), noise=initial_noise(shape, 0), on_step=on_step)
    seconds = time.perf_counter() - began
    # The first step has what a run prepares in it.
    each = [(after - before, was) for before, after, was in zip(marks, marks[1:], reused[1:])]
    return Run(seconds, tuple(taken for taken, was in each if not was) + (marks[0] - began,),
               tuple(taken for taken, was in each if was))
