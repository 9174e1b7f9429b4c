"""Run a ComfyUI script as ``__main__``: repairs torchvision where needed, and ends with the process that started it.

On a machine without a GPU the only torchvision wheel to be had may be built for another torch, and its import stops at
"operator torchvision::nms does not exist": it registers fake kernels for operators that its missing library would have
defined. Declaring the two operators first is enough for the import, and ComfyUI calls neither of them.
They are declared only if a child process finds torchvision unusable, so that a healthy installation runs untouched.

With ``--while-stdin-is-open`` the process ends when its standard input closes, so that a server never outlives a test
run, however that was ended.

usage: launcher.py [--while-stdin-is-open] PATH/TO/ComfyUI/main.py [arguments of main.py]
Reference: https://docs.pytorch.org/docs/stable/library.html#torch.library.Library
"""
import importlib.util
import os
import runpy
import subprocess
import sys
import threading

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def end_with_stdin() -> None:
    """End this process as soon as standard input is closed at its other end."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-stdin").start()


def torchvision_needs_declarations() -> bool:
    """True if torchvision is installed and its import fails for want of its own operators."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    trial = subprocess.run([sys.executable, "-c", "import torchvision"], stdin=subprocess.DEVNULL, capture_output=True,
                           text=True, check=False)
    return trial.returncode != 0 and "torchvision::" in trial.stderr


def declare_operators():
    """Declare torchvision's operators without implementations.

    Returns the ``torch.library.Library`` that owns them: the declarations vanish with it, so the caller keeps it.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in OPERATORS:
        library.define(schema)
    return library


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--while-stdin-is-open"]:
        end_with_stdin()
        arguments = arguments[1:]
    if not arguments:
        raise SystemExit(__doc__)
    script = os.path.abspath(arguments[0])
    sys.argv = [script, *arguments[1:]]
    sys.path[0] = os.path.dirname(script)
    library = declare_operators() if torchvision_needs_declarations() else None
    runpy.run_path(script, run_name="__main__")
    del library


if __name__ == "__main__":
    main()
