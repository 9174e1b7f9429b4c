"""Loading: from a file of real numbers, which the system has in its cache, to weights on the device.

On a CPU ours maps the file and reads nothing before it is used, so every weight is read once by all. What a full-size
file takes of memory, and a file that is not in the cache, `benchmarks/loading.py` measures.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.cases.bench import Bench, name_of
from benchmarks.shared import randomise
from wan_core.models import Part
from wan_core.weights import expected_shapes, save_weights

_AS_INTEGERS = {2: torch.int16, 4: torch.int32}


def load(bench: Bench) -> None:
    """A transformer's file to the device, beside diffusers' own format."""
    spec, dtype = bench.scale.loaded, torch.bfloat16
    nbytes = dtype.itemsize * sum(torch.Size(shape).numel() for shape in expected_shapes(spec).values())
    case = f"load, {nbytes / 1e9:.2f} GB in {name_of(dtype)}"
    if bench.is_late(case):
        return
    path = bench.folder / "loaded.safetensors"
    save_weights(path, {name: torch.randn(shape).mul_(0.02).to(dtype) for name, shape in expected_shapes(spec).items()})
    folder = bench.folder / "loaded"
    try:
        work = {"ours": lambda: used(Part.open(path, "transformer").build(bench.device, dtype))}
        work |= bench.beside(case, ("diffusers",), lambda _: diffusers_load(bench, folder))
        times = bench.times(case, work, 3)
        rate = bench.machine.transfer() if bench.is_gpu else bench.machine.copy()
        bench.report.compare(case, times, nbytes / rate, part="load", bytes=nbytes)
    finally:
        path.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def diffusers_load(bench: Bench, folder: Path) -> Callable[[], object]:
    """Writes the same transformer as diffusers does; the result reads it. Raises ImportError where accelerate, with
    which diffusers reads it, is missing."""
    import accelerate  # noqa: F401
    from diffusers import WanTransformer3DModel

    spec = bench.scale.loaded
    module = WanTransformer3DModel(
        num_attention_heads=spec.num_heads, attention_head_dim=spec.dim // spec.num_heads, in_channels=spec.in_dim,
        out_channels=spec.out_dim, text_dim=spec.text_dim, ffn_dim=spec.ffn_dim, num_layers=spec.num_layers)
    randomise(module).to(torch.bfloat16).save_pretrained(folder)
    return lambda: used(WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(bench.device))


def used(module: nn.Module) -> None:
    """Read every number of a module's weights once, as the first step does."""
    for weight in module.parameters():
        if weight.device.type == "cpu":
            # Whole numbers are compared at the rate of memory, halves are not.
            weight.detach().view(_AS_INTEGERS[weight.dtype.itemsize]).max()
