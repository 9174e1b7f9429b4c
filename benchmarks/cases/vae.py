"""The video VAEs: decode and encode at full width beside diffusers and ComfyUI, and the peak memory of a decode.

Videos begin and end on the host, as in a run. All compute in `Scale.vae_dtype`.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases.bench import Bench, name_of
from benchmarks.limits import decoder_work, encoder_work
from benchmarks.shared import randomise
from wan_core.vae import WanVAE


def wan21(bench: Bench) -> None:
    """Wan 2.1's VAE, decode and encode, beside diffusers and ComfyUI."""
    both_ways(bench, "wan21_vae")


def wan22(bench: Bench) -> None:
    """Wan 2.2's VAE, the same."""
    both_ways(bench, "wan22_vae")


def both_ways(bench: Bench, name: str) -> None:
    spec, dtype, (frames, height, width) = bench.scale.vaes[name], bench.scale.vae_dtype, bench.scale.video
    stride, step = spec.spatial_stride, spec.temporal_stride
    size = f"{frames} frames {width}x{height}"
    if bench.is_late(f"{name}, {size}"):
        return
    ours = randomise(WanVAE(spec)).to(bench.device, dtype).eval()
    others = bench.beside(name, ("diffusers", "comfyui"), lambda peer: peers.vae(peer, spec, dtype, bench.device))
    latents = torch.randn(1, spec.z_dim, 1 + (frames - 1) // step, height // stride, width // stride)
    video = torch.rand(1, 3, frames, height, width) * 2 - 1
    rates = bench.machine.convolution(dtype), bench.machine.matmul(dtype)
    for way, needed, run, theirs, given in (
            ("decode", decoder_work(spec, frames, height, width), ours.decode, peers.decode, latents),
            ("encode", encoder_work(spec, frames, height, width), ours.encode, peers.encode, video)):
        case = f"{name} {way}, {size}, {name_of(dtype)}"
        if bench.is_late(case):
            continue
        work = {"ours": lambda run=run, given=given: run(given)}
        for peer, module in others.items():
            work[peer] = lambda theirs=theirs, module=module, given=given: theirs(module, given)
        times = bench.times(case, work, 2)
        limit = needed.products / rates[0] + needed.attention / rates[1]
        bench.report.compare(case, times, limit, bench.scale.vae_goals.get(f"{name} {way}"), part="vae",
                             flops=needed.total)


def memory(bench: Bench) -> None:
    """Peak memory of the decode of a clip and of a long one, each in a process of its own; on a CPU alone."""
    if bench.is_gpu:
        bench.report.note("VAE memory", "benchmarks/memory.py measures it on a GPU")
        return
    frames, height, width = bench.scale.video
    for name in bench.scale.vaes:
        case = f"{name} decode, peak memory, {width}x{height}"
        if bench.is_late(case):
            continue
        peaks = {who: peak(bench, name, who, frames) for who in ("ours", "diffusers") if who in ("ours", *bench.peers)}
        longest = peak(bench, name, "ours", bench.scale.long_clip)
        pixels = (bench.scale.long_clip - frames) * 3 * height * width * 4
        bench.report.add(case, f"MB for {frames} frames", peaks.pop("ours"), **peaks)
        bench.report.add(case, f"MB for {bench.scale.long_clip} frames", longest, of_them_more_pixels=pixels / 1e6)


def peak(bench: Bench, name: str, who: str, frames: int) -> float:
    """MB that a process which does nothing else takes at its peak."""
    script = Path(__file__).parent.parent / "vae_peak.py"
    command = [sys.executable, str(script), name, who, "--scale", bench.scale.name, "--frames", str(frames), "--size",
               *map(str, bench.scale.video[1:]), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]
