"""What benchmarks share: a table of results and the machine they hold for, time and memory, and random weights.

Random weights are pieces of one mapped file of random numbers, each tensor at another place of it. So a full-size model
is there in seconds and takes half a gigabyte of disk, while everything that is made of it, on a device or in pinned
memory, has its full size.
"""

import gc
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_core.models import Part
from wan_core.presets import TransformerSpec, VAESpec
from wan_core.weights import TensorFile, expected_shapes
from wan_core.weights.quantised import Quantised, Scaled
from wan_core.weights.tensor_file import Kept

# Standard deviation of random weights, with which activations neither vanish nor overflow, and that of FP8 codes.
SPREAD, CODES_SPREAD = 0.02, 64.0
FP8 = Scaled(torch.float8_e4m3fn)


class Report:
    """Prints each result as a line of a table and writes all of them to a file at once."""

    def __init__(self, path: Path | None, device: torch.device, scale: str,
                 versions: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._content = {"scale": scale, "machine": {**machine(device), **(versions or {})}, "results": []}
        print(json.dumps(self._content["machine"]))
        print("\n| case | measured | ours | goal | |\n|---|---|---|---|---|", flush=True)

    def add(self, case: str, what: str, value: float, goal: tuple[float, float] | None = None, **facts: object) -> None:
        """One number; `goal` is the least and the most that it may be."""
        met = None if goal is None else goal[0] <= value <= goal[1]
        self._content["results"].append({"case": case, "what": what, "value": value, "goal": goal, "met": met, **facts})
        wanted = "" if goal is None else f"<= {goal[1]:g}" if goal[0] <= 0 else f"{goal[0]:g} to {goal[1]:g}"
        word = {None: "", True: "met", False: "**not met**"}[met]
        beside = ", ".join(f"{name} {fact:.4g}" if isinstance(fact, float) else f"{name} {fact}"
                           for name, fact in facts.items())
        print(f"| {case} | {what} | {value:.4g}{f' ({beside})' if beside else ''} | {wanted} | {word} |", flush=True)
        self._write()

    def compare(self, case: str, times: Mapping[str, Sequence[float]], limit: float | None,
                most: Mapping[str, float] | None = None, **facts: object) -> None:
        """Seconds of several ways to do the same work, "ours" and others', and of the machine's `limit`.

        Medians count. `most` has goals: the most that "ours", in seconds, or "ours/NAME" may be; one for something that
        was not measured is left out.
        """
        seconds = {name: statistics.median(values) for name, values in times.items()}
        known = {**seconds, **({} if limit is None else {"limit": limit})}
        ratios = {f"ours/{name}": seconds["ours"] / value for name, value in known.items() if name != "ours"}
        values = {"ours": seconds["ours"], **ratios}
        goals = {name: {"most": goal, "met": values[name] <= goal} for name, goal in (most or {}).items()
                 if name in values}
        self._content["results"].append({"case": case, "seconds": seconds, "limit": limit, "ratios": ratios,
                                         "goals": goals, "all": {name: list(one) for name, one in times.items()},
                                         **facts})
        beside = ", ".join([*(f"{name} {value:.4g}" for name, value in known.items() if name != "ours"),
                            *(f"{name} {value:.3g}" for name, value in ratios.items())])
        wanted = ", ".join(f"{name} <= {goal['most']:g}" for name, goal in goals.items())
        word = {None: "", True: "met", False: "**not met**"}[all(goal["met"] for goal in goals.values())
                                                             if goals else None]
        print(f"| {case} | s | {seconds['ours']:.4g}{f' ({beside})' if beside else ''} | {wanted} | {word} |",
              flush=True)
        self._write()

    def note(self, case: str, text: str) -> None:
        """Something that could not be measured, and why."""
        self._content["results"].append({"case": case, "note": text})
        print(f"| {case} | {text} | | | |", flush=True)
        self._write()

    @property
    def content(self) -> dict[str, object]:
        """All results so far, as they are in the file: "scale", "machine" and a list of "results"."""
        return self._content

    def _write(self) -> None:
        if self._path:
            self._path.write_text(json.dumps(self._content, indent=1) + "\n")


def best_device() -> str:
    return next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "cpu")


def device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def machine(device: torch.device) -> dict[str, object]:
    """What has to be known of a measurement: device, driver, PyTorch, and the state of this repository."""
    folder = Path(__file__).parent
    driver = None
    if device.type == "cuda":
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {"device": device_name(device), "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
            "commit": output_of(["git", "-C", str(folder), "rev-parse", "HEAD"]),
            "changed": bool(output_of(["git", "-C", str(folder), "status", "--porcelain", "../wan_core"]))}


def output_of(command: list[str]) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def free(device: torch.device) -> None:
    """Give back what a case has left over."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def median_time(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Seconds of one run; the first round, which compiles and warms up, does not count where there are several."""
    return statistics.median(round_times(work, rounds, device))


def round_times(work: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """Seconds of one run in each of the rounds that count; see `median_time`."""
    times = []
    # On a GPU a round is several runs, so that waiting for them weighs little.
    runs = 1 if device.type == "cpu" else 10
    for _ in range(rounds + (rounds > 1)):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(runs):
            work()
        synchronise(device)
        times.append((time.perf_counter() - started) / runs)
    return times[rounds > 1:]


def interleave(work: dict[str, Callable[[], object]], rounds: int, device: torch.device, deadline: float,
               failed: Callable[[str, Exception], None]) -> dict[str, list[float]]:
    """Seconds of each piece of work, in turn, `rounds` times after one to warm up; no round begins behind `deadline`,
    a value of `time.perf_counter`, but the first that counts.

    Work that fails is told to `failed`, which may raise, and left out.
    """
    work, times = dict(work), {name: [] for name in work}
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() > deadline:
            break
        for name, run in tuple(work.items()):
            synchronise(device)
            began = time.perf_counter()
            try:
                run()
                synchronise(device)
            except Exception as error:
                failed(name, error)
                del work[name], times[name]
                continue
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def randomise(module: nn.Module) -> nn.Module:
    """Small random values everywhere, also where an initialisation puts zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=SPREAD)
    return module


def host_mb(what: str = "VmRSS") -> float:
    """Memory of this process in MB: all that is resident, RssAnon (mapped files left out), or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1e3


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a transformer's tensor is one of those that quantised files have quantised."""
    return name.startswith("blocks.") and len(shape) == 2


def random_part(spec: TransformerSpec | VAESpec, folder: Path, dtype: torch.dtype, *, fp8: bool = False,
                count: int = 1 << 28, device: torch.device | str = "cpu") -> Part:
    """A checkpoint of `spec` in `dtype`, its matrices in scaled FP8 if wanted, of `count` numbers that are repeated.

    `folder` is where the numbers lie, and must be there as long as the checkpoint; they are made by `device` when they
    are needed first.
    """
    shapes, pools = expected_shapes(spec), {}
    codes = {name for name, shape in shapes.items() if fp8 and is_matrix(name, shape)}
    scale = torch.tensor(SPREAD / CODES_SPREAD)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    # Tensors follow one another, as in a file, and begin anew where the numbers end.
    ends = dict(zip(sizes, itertools.accumulate(-(-size // 64) * 64 for size in sizes.values())))

    def numbers(name: str, kind: torch.dtype, place: torch.device | str) -> Tensor:
        if torch.device(place).type == "meta":
            return torch.empty(shapes[name], dtype=kind, device="meta")
        if kind not in pools:
            pools[kind] = mapped_numbers(folder, kind, count, device)
        start = ends[name] % (count - sizes[name] + 1) // 64 * 64
        return pools[kind][start:start + sizes[name]].view(shapes[name]).to(place)

    def read(name: str, place: torch.device | str) -> Tensor | Quantised:
        if name not in codes:
            return numbers(name, dtype, place)
        return Quantised(FP8, shapes[name], {"codes": numbers(name, FP8.dtype, place), "scale": scale.to(place)})

    file = TensorFile(folder, "safetensors", {}, dict.fromkeys(shapes, dtype), shapes, read,
                      {name: Kept(FP8.name, sizes[name] + scale.nbytes) for name in codes})
    file.nbytes = sum(file.size(name) for name in shapes)
    return Part(file, spec, ())


def mapped_numbers(folder: Path, dtype: torch.dtype, count: int, device: torch.device | str) -> Tensor:
    """`count` normal numbers of a type, mapped from a file in `folder`, which is written where it is not there yet."""
    path = folder / f"{str(dtype).removeprefix('torch.')}_{count}.bin"
    if not path.exists():
        spread = CODES_SPREAD if dtype == FP8.dtype else SPREAD
        largest = torch.finfo(dtype).max
        with path.open("wb") as stream:
            # In pieces, because in float32 they would take a gigabyte.
            for piece in torch.empty(count, dtype=torch.uint8).split(1 << 24):
                numbers = torch.randn(len(piece), device=device).mul_(spread).clamp_(-largest, largest).to(dtype)
                stream.write(numbers.cpu().view(torch.uint8).numpy().data)
    return torch.from_file(str(path), shared=False, size=count * dtype.itemsize, dtype=torch.uint8).view(dtype)
