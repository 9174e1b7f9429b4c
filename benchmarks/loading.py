"""What opening and loading a full-size file costs: time until it is open, and private memory until all of it was used.

    python benchmarks/loading.py bf16        # 28.6 GB, Wan 2.1 T2V 14B
    python benchmarks/loading.py q4_k        # 8.2 GB
    python benchmarks/loading.py fp8         # 14.5 GB
    python benchmarks/loading.py read        # 2.1 GB of real numbers, not in the system's cache, beside a plain read

The file is sparse: it has the right header and size and takes no room on the disk. Private memory (RssAnon) is what the
process holds beside pages of the mapped file, which the kernel takes back whenever it needs them. "Used" means that the
numbers of every weight were made once, layer after layer, as a step of sampling makes them. Printed as JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.shared import host_mb, is_matrix  # noqa: E402
from wan_core.models import Part  # noqa: E402
from wan_core.presets import TRANSFORMERS  # noqa: E402
from wan_core.weights import expected_shapes, open_weights, save_weights  # noqa: E402
from wan_core.weights.linear import QuantisedLinear  # noqa: E402

SPEC = TRANSFORMERS["wan21_t2v_14b"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=("bf16", "fp8", "q4_k", "read"))
    parser.add_argument("--folder", type=Path, help="where the sparse file is put (default: a temporary folder)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.form == "read":
            print(json.dumps(reading(Path(folder, "numbers.safetensors"))))
            return
        suffix = "gguf" if options.form == "q4_k" else "safetensors"
        path = Path(folder, f"wan_14b_{options.form}.{suffix}")
        (write_gguf if suffix == "gguf" else write_safetensors)(path, options.form)
        print(json.dumps(measure(path, options.device)))


def reading(path: Path) -> dict[str, float]:
    """Seconds that a plain read of a file takes, and that it takes until every weight was copied from its mapping, one
    to the place of the other, as on the way to a GPU; the best of three, the file not being in the system's cache."""
    tensor = torch.randn(5120, 5120).to(torch.bfloat16)
    save_weights(path, {f"weight{index}": tensor.roll(index, 0) for index in range(40)})

    piece = torch.zeros_like(tensor)

    def plain() -> None:
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass

    def mapped() -> None:
        for weight in open_weights(path).values():
            piece.copy_(weight)

    seconds = {"plain": [], "mapped": []}
    for _ in range(3):
        for name, read in (("plain", plain), ("mapped", mapped)):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            read()
            seconds[name].append(time.perf_counter() - started)
    return {"gb": round(path.stat().st_size / 1e9, 2), **{f"{name}_s": round(min(taken), 2)
                                                         for name, taken in seconds.items()}}


def write_safetensors(path: Path, form: str) -> None:
    """A sparse file with the tensors of the 14B model, the matrices of its blocks in FP8 if wanted."""
    header, position = {}, 0
    for name, shape in expected_shapes(SPEC).items():
        code, itemsize = ("F8_E4M3", 1) if form == "fp8" and is_matrix(name, shape) else ("BF16", 2)
        end = position + itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("rb+") as file:
        file.truncate(8 + len(text) + position)


def write_gguf(path: Path, form: str) -> None:
    writer = gguf.GGUFWriter(path, "wan")
    kinds = gguf.GGMLQuantizationType
    for name, shape in expected_shapes(SPEC).items():
        kind = kinds[form.upper()] if is_matrix(name, shape) else kinds.F16
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), torch.Size(shape).numel() // block * nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = sum(-(-info.nbytes // 32) * 32 for info in writer.tensors[0].values())
    with path.open("rb+") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + size)


def measure(path: Path, device: str) -> dict[str, object]:
    before, peak = host_mb("RssAnon"), [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], host_mb("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    part = Part.open(path, "transformer")
    opened = time.perf_counter()
    module = part.build(torch.device(device), torch.bfloat16)
    built = time.perf_counter()
    for layer in module.modules():
        if isinstance(layer, QuantisedLinear):
            layer.stored.dequantise(torch.bfloat16)
        else:
            for parameter in layer.parameters(recurse=False):
                parameter.sum()
    used = time.perf_counter()
    done.set()
    watcher.join()
    return {"file": path.name, "gb": round(path.stat().st_size / 1e9, 2), "open_s": round(opened - started, 3),
            "build_s": round(built - opened, 3), "use_s": round(used - built, 1),
            "private_mb": round(peak[0] - before, 1), "device": device}


if __name__ == "__main__":
    main()
