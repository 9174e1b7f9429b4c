"""A process that has everything loaded and makes runs in forks of itself, which it kills when it is told to.

Started with the folder of a tiny model. Each line of JSON on its standard input is a run: the `folder` of its
checkpoints, the file `out` for the bytes of its result, and after how many seconds it is to be killed (`kill`, null:
never). Each line on its standard output is the exit status of one, negative for a signal, and how long it ran.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.tiny_runs import tiny_model, tiny_run
from wan_core import Checkpoints


def serve(models: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model(models, "pair")
    # Nothing is to be read or imported for the first time in a fork.
    tiny_run(model, steps=4)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        child = os.fork()
        if not child:
            result = tiny_run(model, steps=4, checkpoints=Checkpoints(order["folder"]))
            whole = Path(order["out"] + ".part")
            whole.write_bytes(result.numpy().tobytes())
            whole.replace(order["out"])
            os._exit(0)
        if order["kill"] is not None:
            time.sleep(order["kill"])
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps([status, time.perf_counter() - began]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
