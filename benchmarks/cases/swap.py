"""Block swap: a guided step with all blocks coming and going beside a resident one, as `memory.py` measures it."""

from dataclasses import replace

from benchmarks import memory
from benchmarks.cases.bench import Bench
from wan_core.memory import Memory


def swapped(bench: Bench) -> None:
    """A step with all blocks swapped against a resident one, and against the copies alone."""
    if bench.is_late("swap"):
        return
    scale = memory.FULL if bench.scale.name == "full" else memory.SMALL
    # One clip is enough here; the rest is for the command of its own.
    long = scale.short if bench.scale.name == "tiny" else scale.long[0]
    memory.dense(memory.Bench(replace(scale, long=(long,)), bench.device, bench.folder, bench.report,
                              Memory(pinned=bench.pinned), bench.deadline))
