"""How fast every part is, beside other implementations and beside what the machine could do, in one command.

    python benchmarks/speed.py --out speed.json --plot speed.png            # the whole, sized for the device
    python benchmarks/speed.py --only step vae --out speed.json             # some of it
    python benchmarks/speed.py --scale tiny                                 # does it run here? in seconds
    python benchmarks/results.py speed.json --plot speed.png                # table and plot again, anywhere

Ours and others do the same work in one process, in turn, with random weights: dense arithmetic takes the same time
whatever the numbers, if they are not zeros. Medians count, after one round to warm up. "Limit" is what the work takes
at the rates that this machine reaches in large matrix products, convolutions or copies, measured in the same run;
benchmarks/limits.py has the formulas. On a CPU "small" has the released widths with fewer layers and smaller videos; on
a CUDA GPU "full" has the released models (about 40 GB of its memory for ours, 75 with diffusers beside it, 105 with
ComfyUI too: see --peers). Goals are those for one H200, and ratios to diffusers for a CPU. Every line is in the file
--out as soon as it is measured; nothing is downloaded.
"""

import argparse
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import peers, results  # noqa: E402
from benchmarks.cases import caches, loading, machine, predicted, swap, text, transformer, vae  # noqa: E402
from benchmarks.cases.bench import SCALES, Bench, Scale, explained  # noqa: E402
from benchmarks.shared import Report, best_device, free  # noqa: E402

# In this order: what takes longest comes last, in case the time is up.
CASES = {
    "machine": machine.rates, "step": transformer.step, "attention": transformer.attention_alone, "text": text.encode,
    "load": loading.load, "compile": transformer.compiled, "caches": caches.whole_runs, "swap": swap.swapped,
    "predicted": predicted.goals, "vae": vae.wan21, "vae22": vae.wan22, "vae-memory": vae.memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the arguments (those of the shell, if None) ask for; 0 unless a case has failed."""
    options = parsed(arguments)
    device = torch.empty(0, device=options.device).device
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.basicConfig(format="%(message)s")
    began, failed = time.perf_counter(), []
    scale = sized(SCALES[options.scale or ("full" if device.type == "cuda" else "small")], options)
    report = Report(options.out, device, scale.name, peers.versions())
    here = peers.available()
    for name in (name for name in here if name in options.peers and here[name]):
        report.note(name, here[name])
    found = tuple(name for name in here if name in options.peers and not here[name])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, torch.no_grad():
        bench = Bench(scale, device, Path(folder), report, began + 60 * options.minutes, found, options.rounds,
                      options.pinned)
        for name in options.only or CASES:
            try:
                CASES[name](bench)
            # A case that fails is no reason to lose those behind it.
            except Exception as error:
                failed.append(name)
                traceback.print_exc()
                report.note(name, f"failed: {explained(error)}")
            free(device)
    print(f"\n{time.perf_counter() - began:.0f} s\n\n{results.table(report.content)}")
    if options.plot and (missing := results.draw(report.content, options.plot)):
        print(missing)
    return 1 if failed else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name + ':':<12}{function.__doc__.splitlines()[0]}" for name, function in CASES.items()))
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="see below (default: all)")
    parser.add_argument("--device", default=best_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--scale", choices=SCALES, help="(default: full on a GPU, small on a CPU)")
    parser.add_argument("--out", type=Path, help="file for the results in JSON")
    parser.add_argument("--plot", type=Path, help="file for a plot: .png, .svg or .pdf")
    parser.add_argument("--minutes", type=float, default=25.0,
                        help="what is not begun by then is left out (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="timed runs after the warm-up (default: 1 to 5, by case)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--peers", nargs="*", choices=tuple(peers.available()), default=tuple(peers.available()),
                        help="whom to measure beside (default: all that are here)")
    parser.add_argument("--frames", type=int, help="of the VAEs' videos")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the VAEs' videos, in pixels")
    parser.add_argument("--pinned", type=float, help="GB of host memory to pin at most for swap (default: half)")
    parser.add_argument("--folder", type=Path, help="where random numbers and files lie, 10 GB on a GPU, 2 GB on a CPU "
                                                    "(default: a temporary one)")
    return parser.parse_args(arguments)


def sized(scale: Scale, options: argparse.Namespace) -> Scale:
    """The scale with the videos that were asked for."""
    frames, height, width = scale.video
    height, width = options.size or (height, width)
    return replace(scale, video=(options.frames or frames, height, width))


if __name__ == "__main__":
    sys.exit(main())
