"""What block swap costs and what a run needs of memory, measured and beside what is predicted, in one command.

    python benchmarks/memory.py --out memory.json                # a CUDA GPU: full size, under 10 minutes
    python benchmarks/memory.py --device cpu --out memory.json   # small, under 2 minutes, and predictions of full size
    python benchmarks/memory.py --only bf16 vae --out memory.json

Weights are random; their numbers repeat, but every tensor on the device and in pinned memory has its full size. With
too little host memory for all blocks (28 GB in bfloat16) fewer are pinned, which the table says.
A guided step is one of the sampling loop, two passes through the transformer; the first one warms up and does not
count, of several others the shortest does. On a CPU, which may be shared, time is the processor's. Memory is what
PyTorch's allocator has given out at its peak, weights included; on a CPU, what tensors took. "Limit" is the time in
which the swapped blocks' bytes can come from pinned memory or, where it is longer, that of a step with all blocks
resident. Copies do not overlap on a CPU, so the goals for time count on a GPU alone. Every line is in the file --out as
soon as it is measured.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.limits import transfer_rate  # noqa: E402
from benchmarks.shared import Report, best_device, free, host_mb, random_part, synchronise  # noqa: E402
from wan_core import load_model, load_text_encoder, load_vae  # noqa: E402
from wan_core.conditioning import TextCondition  # noqa: E402
from wan_core.forecast import fitted, needs, operations  # noqa: E402
from wan_core.memory import Layout, Memory, OneAtATime, Plan  # noqa: E402
from wan_core.memory.budget import GB  # noqa: E402
from wan_core.memory.leaves import leaves  # noqa: E402
from wan_core.memory.meter import MemoryMeter  # noqa: E402
from wan_core.memory.plan import CHUNK, lost_share  # noqa: E402
from wan_core.models import Model, VideoVAE  # noqa: E402
from wan_core.pipeline import generate  # noqa: E402
from wan_core.presets import PRESETS, TRANSFORMERS, VAES, TransformerSpec, VAESpec  # noqa: E402
from wan_core.sampling import Conditions, Guidance, Step, denoise, make_schedule  # noqa: E402

PROMPT_TOKENS = 60
# Predictions assume these: operations a second, and bytes a second from pinned memory to the device.
CARDS = {"H200": (700e12, 50e9), "RTX 4090": (150e12, 25e9)}
RUNS = 20
# How much a process may differ between two equal moments, in MB: one leaked nano transformer a run would be 30.
HOST_SPREAD = 5.0


@dataclass(frozen=True)
class Clip:
    """Latents [B, C, T, H, W], how many guided steps are timed, and the goal for the peak with all blocks swapped."""

    name: str
    shape: tuple[int, ...]
    steps: int
    goal_gb: float | None = None


@dataclass(frozen=True)
class Scale:
    """The sizes of everything; `short` is the clip whose step takes no longer than the copies, `numbers` how many
    random ones there are."""

    spec: TransformerSpec
    dtype: torch.dtype
    long: tuple[Clip, ...]
    short: Clip
    chunk: int
    vae: VAESpec
    latents: tuple[int, ...]
    vae_budget: float
    numbers: int


FULL = Scale(
    TRANSFORMERS["wan21_t2v_14b"], torch.bfloat16,
    (Clip("81 frames 480p", (1, 16, 21, 60, 104), 2, 6.0), Clip("81 frames 720p", (1, 16, 21, 90, 160), 1, 10.0)),
    Clip("17 frames 480p", (1, 16, 5, 60, 104), 2), CHUNK, VAES["wan21_vae"], (1, 16, 21, 90, 160), 4.0, 1 << 28)
SMALL = Scale(
    TransformerSpec(model_type="t2v", dim=256, ffn_dim=704, num_heads=2, num_layers=8), torch.float32,
    (Clip("1,280 tokens", (1, 16, 5, 32, 32), 1), Clip("2,000 tokens", (1, 16, 5, 40, 40), 1)),
    Clip("256 tokens", (1, 16, 1, 32, 32), 1), 512,
    replace(VAES["wan21_vae"], dim=16, decoder_dim=16), (1, 16, 3, 32, 32), 0.08, 1 << 23)


class NeverLeaner(Model):
    """A model that fails where memory runs out: a leaner one would be measured under the wrong name."""

    def recover(self, error: Exception, shape: tuple[int, ...]) -> None:
        return None


@dataclass(frozen=True)
class Bench:
    """Where and at which scale everything is measured, and who takes the results."""

    scale: Scale
    device: torch.device
    folder: Path
    report: Report
    memory: Memory
    deadline: float

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def clock(self) -> float:
        """Seconds from some moment on; on a CPU, which may be shared, of work."""
        synchronise(self.device)
        return time.perf_counter() if self.is_gpu else time.process_time()

    @property
    def dense(self) -> str:
        """What weights that are not quantised are called."""
        return "bf16" if self.scale.dtype == torch.bfloat16 else "float32"

    def model(self, scale: Scale, form: str, **options: object) -> NeverLeaner:
        """The transformer of `scale`, its matrices in FP8 for the form "fp8"."""
        part = random_part(scale.spec, self.folder, scale.dtype, fp8=form == "fp8", count=scale.numbers,
                           device=self.device)
        return NeverLeaner(part, part, PRESETS["wan21_t2v_14b"], OneAtATime(self.device),
                           str(scale.dtype).removeprefix("torch."), memory=self.memory, **options)


def main() -> None:
    cases = {"bf16": dense, "fp8": scaled_fp8, "vae": vae_decode, "runs": consecutive_runs, "predicted": predictions}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(f"{name + ':':<11}{function.__doc__.splitlines()[0]}"
                                                      for name, function in cases.items()))
    parser.add_argument("--only", nargs="+", choices=cases, metavar="CASE",
                        help="see below (default: all; predicted on a CPU alone)")
    parser.add_argument("--device", default=best_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the results in JSON")
    parser.add_argument("--pinned", type=float, help="GB of host memory to pin at most (default: half of what is free)")
    parser.add_argument("--minutes", type=float, default=8.0,
                        help="steps that are not begun by then are left out (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the random numbers lie, 0.8 GB (default: a temporary one)")
    options = parser.parse_args()
    device = torch.empty(0, device=options.device).device
    torch.manual_seed(0)
    began, failed = time.perf_counter(), []
    report = Report(options.out, device, "small" if device.type == "cpu" else "full")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(SMALL if device.type == "cpu" else FULL, device, Path(folder), report,
                      Memory(pinned=options.pinned), began + 60 * options.minutes)
        for name in options.only or [name for name in cases if name != "predicted" or device.type == "cpu"]:
            try:
                cases[name](bench)
            # A case that fails is no reason to lose those behind it.
            except Exception as error:
                failed.append(name)
                report.note(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            free(device)
    print(f"\n{time.perf_counter() - began:.0f} s")
    sys.exit(1 if failed else 0)


def dense(bench: Bench) -> None:
    """Steps and peaks of a transformer in bfloat16 (on a CPU float32), resident and with all blocks swapped."""
    transformer(bench, bench.dense)


def scaled_fp8(bench: Bench) -> None:
    """The same with the blocks' matrices in scaled FP8."""
    transformer(bench, "fp8")


def transformer(bench: Bench, form: str) -> None:
    """Guided steps of all clips with every layout; see the names of the cases."""
    model, scale = bench.model(bench.scale, form), bench.scale
    count, pinned = scale.spec.num_layers, model.memory.pinned_bytes()
    every = (*scale.long, scale.short)
    layouts = [("resident", Plan(), every),
               # What chunks alone cost is seen at one size.
               ("resident in chunks", Plan(chunk=scale.chunk), scale.long[:1]),
               ("swapped", Plan(Layout(count, 2, pinned), scale.chunk), every)]
    if bench.is_gpu and form != "fp8":
        layouts.append(("swapped, not pinned", Plan(Layout(count, 2), scale.chunk), (scale.long[0], scale.short)))
    resident: dict[str, float] = {}
    for name, plan, clips in layouts:
        if plan.layout.swapped:
            # What is there would count in the peak.
            model.placement.clear()
        for clip in clips:
            case = f"{form}, {clip.name}, {name}"
            planned = replace(model, plan=plan)
            seconds = steps_of(bench, planned, clip, case)
            if seconds is None:
                continue
            if not plan.layout.swapped:
                resident.setdefault(clip.name, seconds)
                continue
            counts = bench.is_gpu and plan.layout.pinned > 0
            if clip is scale.short:
                against_limit(bench, planned, clip, case, seconds, resident.get(clip.name, 0.0), counts)
            elif clip.name in resident:
                bench.report.add(case, "time / resident", seconds / resident[clip.name], (0, 1.03) if counts else None)
    model.placement.clear()


def steps_of(bench: Bench, model: Model, clip: Clip, case: str) -> float | None:
    """Report time and peak of guided steps; returns the time in seconds, None where there is no room or no time."""
    if time.perf_counter() > bench.deadline:
        bench.report.note(case, "left out: the time is up")
        return None
    branches = prompts(model.spec)
    need, layout = needs(model, clip.shape, branches), model.plan.layout
    predicted = need.peak(model.plan)
    room = model.placement.budget(predicted)
    if room is not None and predicted > room:
        bench.report.note(case, f"does not fit: needs {predicted / GB:.1f} GB of {room / GB:.1f}")
        return None
    times: list[float] = []
    noise, conditions = torch.randn(clip.shape), Conditions(branches[:1], branches[1:])

    def run(count: int) -> None:
        def on_step(_step: Step) -> None:
            times.append(bench.clock())

        denoise(model, noise, make_schedule("unipc", count, 5.0), conditions, Guidance(5.0, 5.0), device=bench.device,
                on_step=on_step)

    with peak_of(model, bench.device) as peak:
        # On a CPU the counting would be measured as well, and two steps have all that is ever alive.
        run(1 + clip.steps if bench.is_gpu else 2)
    if not bench.is_gpu:
        times.clear()
        run(1 + clip.steps)
    seconds = min(after - before for before, after in zip(times, times[1:]))
    pinned = min(layout.pinned, need.swapped(layout)) if bench.is_gpu else 0
    bench.report.add(case, "s per guided step", seconds, **({"pinned_gb": pinned / GB} if layout.swapped else {}))
    if clip.goal_gb and layout.swapped:
        bench.report.add(case, "peak, GB", peak() / GB, (0, clip.goal_gb))
    bench.report.add(case, "peak / predicted", peak() / predicted, (0.95, 1.05), measured_gb=peak() / GB,
                     predicted_gb=predicted / GB)
    return seconds


@contextmanager
def peak_of(model: Model, device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many bytes were taken at the peak, weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    # The slots are counted when they are made; weights that stay are the mapped file.
    module = model.get("low")
    swapped = {leaf for name in model.plan.layout.names(module) for leaf in leaves(module.get_submodule(name))}
    resident = sum(leaf.get().nbytes for leaf in leaves(module) if leaf not in swapped)
    model.placement.clear()
    with MemoryMeter(device.type) as meter:
        yield lambda: meter.peak + resident


def against_limit(bench: Bench, model: Model, clip: Clip, case: str, seconds: float, resident: float,
                  counts: bool) -> None:
    """Report how a step's time compares with that of its copies, or of its computing where that is longer; `counts`
    says whether the goal holds."""
    rate = transfer_rate(bench.device)
    nbytes = 2 * needs(model, clip.shape, prompts(model.spec)).swapped(model.plan.layout)
    copying = nbytes / rate
    bench.report.add(case, "time / limit", seconds / max(copying, resident),
                     (0, 1.1) if counts else None, copying_s=copying, resident_s=resident,
                     gb_per_s=rate / 1e9)


def prompts(spec: TransformerSpec) -> list[TextCondition]:
    """Embeddings of a positive and a negative prompt."""
    return [TextCondition(torch.randn(1, PROMPT_TOKENS, spec.text_dim)) for _ in range(2)]


def vae_decode(bench: Bench) -> None:
    """VAE decode of 81 frames at 720p (on a CPU a small one), in tiles that are chosen for a budget of 4 GB."""
    scale = bench.scale
    part = random_part(scale.vae, bench.folder, scale.dtype, count=scale.numbers, device=bench.device)
    vae = VideoVAE(part, OneAtATime(bench.device), str(scale.dtype).removeprefix("torch."),
                   memory=Memory(scale.vae_budget))
    vae, predicted = fitted(vae, scale.latents)
    _, _, frames, height, width = scale.latents
    case = f"VAE decode, {4 * frames - 3} frames {8 * width}x{8 * height}"
    latents = torch.randn(scale.latents)
    out = vae.module().frame_buffer(latents)
    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    began = bench.clock()
    vae.decode(latents, out=out)
    seconds = bench.clock() - began
    if bench.is_gpu:
        peak = torch.cuda.max_memory_allocated(bench.device)
    else:
        with MemoryMeter(bench.device.type) as meter:
            vae.decode(latents, out=out)
        # Features of the whole clip, which tiles are cut from, are on the host; the weights are the mapped file.
        tiled = frames * height * width * vae.module().decoder.conv1.out_channels * scale.dtype.itemsize
        features = tiled if vae.tiling else 0
        peak = meter.peak - features + part.size(scale.dtype)
    tiles = f"{vae.tiling.width}x{vae.tiling.height}" if vae.tiling else "none"
    bench.report.add(case, "peak, GB", peak / GB, (0, scale.vae_budget), tiles=tiles)
    bench.report.add(case, "peak / predicted", peak / predicted, (0.95, 1.05), predicted_gb=predicted / GB)
    bench.report.add(case, "s", seconds)
    vae.placement.clear()


def consecutive_runs(bench: Bench) -> None:
    """Host memory over 20 whole runs, each with the bundled model loaded anew and all its blocks swapped."""
    seen = []
    for seed in range(RUNS):
        placement = OneAtATime(bench.device)
        # With this budget a run that plans for itself cannot keep the blocks either.
        model = load_model(placement=placement)
        model = replace(model, plan=Plan(Layout(model.spec.num_layers)), memory=Memory(smallest_budget(model)))
        generate("a red circle moving left", model=model, vae=load_vae(placement=placement),
                 text_encoder=load_text_encoder(placement=placement), steps=3, seed=seed)
        seen.append(host_mb())
    # The first runs fill caches of PyTorch and of the allocator.
    early, late = statistics.median(seen[5:10]), statistics.median(seen[-5:])
    bench.report.add(f"{RUNS} runs", "growth of host memory, MB", late - early, (-1e9, HOST_SPREAD),
                     after_1=seen[0], after_5=seen[4], after_20=seen[-1])


def smallest_budget(model: Model) -> float:
    """GB with which all blocks have to be swapped for a clip of the preset's size."""
    sampling, stride = model.preset.sampling, model.vae_spec.spatial_stride
    shape = (1, model.vae_spec.z_dim, 1 + (sampling.frames - 1) // model.vae_spec.temporal_stride,
             sampling.height // stride, sampling.width // stride)
    texts = [TextCondition(torch.ones(1, model.spec.text_len, model.spec.text_dim)) for _ in range(2)]
    return needs(model, shape, texts).peak(Plan(Layout(model.spec.num_layers))) / GB


def predictions(bench: Bench) -> None:
    """What is predicted for the full-size cases on graphics cards, all blocks swapped; nothing is measured."""
    for form in ("bf16", "fp8"):
        # FP8 products are what cards since Ada compute.
        model = bench.model(FULL, form, fp8_products="on" if form == "fp8" else "off")
        plan = Plan(Layout(FULL.spec.num_layers), FULL.chunk)
        for clip in (*FULL.long, FULL.short):
            need = needs(model, clip.shape, prompts(FULL.spec))
            case = f"predicted: {form}, {clip.name}, swapped"
            bench.report.add(case, "peak, GB", need.peak(plan) / GB, (0, clip.goal_gb) if clip.goal_gb else None,
                             resident_gb=need.peak(Plan()) / GB, weights_gb=need.weights(plan.layout) / GB)
            work = operations(model, clip.shape)
            for card, (flops, bandwidth) in CARDS.items():
                bench.report.add(case, f"time lost to copies on an {card}, %",
                                 100 * lost_share(need, plan, work, flops, bandwidth), (0, 3) if clip.goal_gb else None,
                                 tflops=flops / 1e12, gb_per_s=bandwidth / 1e9)
    vae = VideoVAE(random_part(FULL.vae, bench.folder, torch.bfloat16), OneAtATime("cpu"), "bfloat16",
                   memory=Memory(FULL.vae_budget))
    fitting, peak = fitted(vae, FULL.latents)
    bench.report.add("predicted: VAE decode, 81 frames 1280x720", "peak, GB", peak / GB, (0, FULL.vae_budget),
                     tiles=f"{fitting.tiling.width}x{fitting.tiling.height}" if fitting.tiling else "none")


if __name__ == "__main__":
    main()
