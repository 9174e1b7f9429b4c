"""Import a node pack the way ComfyUI does and tell what that cost; run by ComfyUI's interpreter, through launcher.py.

What ComfyUI itself has loaded by then (torch, its own modules) is loaded first and not counted. Measured is processor
time, which other programs on the machine do not lengthen; the log is what the pack said during its import.

usage: launcher.py probe_import.py CHECKOUT PACK
writes one line of JSON: {"seconds", "log": [[level, text]], "nodes": [id], "cuda_started": bool}
"""
import importlib.util
import json
import logging
import sys
import time


class Recorder(logging.Handler):
    """Keeps (level, text) of every record."""

    def __init__(self):
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def main() -> None:
    checkout, pack = sys.argv[1:3]
    sys.path.insert(0, checkout)
    sys.argv = [f"{checkout}/main.py", "--cpu"]
    import comfy.options
    comfy.options.enable_args_parsing()
    import torch

    import nodes  # noqa: F401 - the core's nodes, and with them torch and all of comfy

    recorder = Recorder()
    logging.getLogger().addHandler(recorder)
    logging.captureWarnings(True)
    # The same module name as in ComfyUI's own loader: the path of the folder, without dots.
    name = pack.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, f"{pack}/__init__.py", submodule_search_locations=[pack])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    begin = time.process_time()
    spec.loader.exec_module(module)
    seconds = time.process_time() - begin
    sys.stdout.write(json.dumps({"seconds": seconds, "log": recorder.lines,
                                 "nodes": sorted(getattr(module, "NODE_CLASS_MAPPINGS", {})),
                                 "cuda_started": torch.cuda.is_initialized()}) + "\n")


if __name__ == "__main__":
    main()
