"""Writes converted weights into a new file, one tensor at a time: memory never holds the model.

FP8 goes into safetensors under the names of the `scaled_fp8` format, which every version of ComfyUI reads; int8, MXFP8
and NVFP4 under those of `comfy_quant`, which newer ones do; block formats into GGUF by the gguf package. The file is
complete or not there: it is written beside its destination and renamed.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from .convert import TARGETS, Target, converted
from .encode import Layout
from .quantised import Quantised
from .safetensors_header import DTYPES
from .save import replacing
from .tensor_file import TensorFile

OnTensor = Callable[[int, int], None]

# Types that a GGUF file has for plain tensors, by their names there.
_GGUF_DTYPES = MappingProxyType({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16})
_CODES = {getattr(torch, name): code for code, name in DTYPES.items() if hasattr(torch, name)}


def write_quantised(file: TensorFile, form: str, path: Path, on_tensor: OnTensor) -> int:
    """Write `file`, under official names, to `path` with its matrices in the format `form`; returns its bytes.

    `on_tensor(done, of)` is called after each tensor. Raises ValueError for what `converted` refuses, for weights that
    are quantised already, and a path with another ending than the format's; OSError if it cannot be written.
    """
    whole = converted(file, form, in_file=True)
    target = TARGETS[form]
    if path.suffix != f".{target.container}":
        raise ValueError(f"{form} is written to a .{target.container} file; {path.name} ends differently.")
    if file.quantised:
        some = next(iter(file.quantised))
        raise ValueError(f"{file.path.name} is quantised already ({some} is {file.quantised[some]}). Quantise the "
                         "bfloat16 file of the model: every further step would add its own loss.")
    if path.exists() and path.samefile(file.path):
        raise ValueError(f"{path.name} is the file that is read; choose another name.")
    with replacing(path) as temporary:
        (_write_gguf if target.container == "gguf" else _write_safetensors)(whole, target, temporary, on_tensor)
    return path.stat().st_size


def _names(name: str, target: Target) -> dict[str, str]:
    """Under which names the parts of a weight stand in a safetensors file."""
    layer = name.removesuffix("weight")
    if target.stated:
        return {"codes": name, "scale": f"{layer}weight_scale", "tensor_scale": f"{layer}weight_scale_2"}
    return {"codes": name, "scale": f"{layer}scale_weight"}


def _statements(name: str, target: Target) -> dict[str, Tensor]:
    """What a safetensors file says of a weight's format, as bytes of JSON."""
    if not target.stated:
        return {}
    text = _json({"format": target.stated})
    return {f"{name.removesuffix('weight')}comfy_quant": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _write_safetensors(file: TensorFile, target: Target, path: Path, on_tensor: OnTensor) -> None:
    """Layout: see `safetensors_header`. Types and sizes follow from shapes alone, so the header comes first."""
    entries: Layout = {}
    for name, shape in file.shapes().items():
        if name in file.quantised:
            names = _names(name, target)
            entries |= {names[part]: what for part, what in target.layout(shape).items()}
            entries |= {text: (piece.dtype, piece.shape) for text, piece in _statements(name, target).items()}
        else:
            entries[name] = (file.dtypes()[name], shape)
    # Two numbers say that the weights are to be multiplied out, as long as no scales of the inputs are known.
    legacy = not target.stated and any(name.endswith(".scale_weight") for name in entries)
    marker = {"scaled_fp8": torch.zeros(2, dtype=target.scheme.dtype)} if legacy else {}
    entries |= {name: (piece.dtype, piece.shape) for name, piece in marker.items()}
    with path.open("wb") as stream:
        stream.write(_header(entries, file.metadata))
        for index, name in enumerate(file):
            tensor = file[name]
            # Parts in the order of the layout, which is that of the header.
            pieces = [tensor] if isinstance(tensor, Tensor) else [
                *(tensor.parts[part] for part in target.layout(tensor.shape)), *_statements(name, target).values()]
            for piece in pieces:
                stream.write(_bytes(piece).data)
            on_tensor(index + 1, len(file))
        for piece in marker.values():
            stream.write(_bytes(piece).data)


def _header(entries: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    position = 0
    for name, (dtype, shape) in entries.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = _json(header)
    return len(text).to_bytes(8, "little") + text


def _json(table: Mapping[str, object]) -> bytes:
    """JSON with spaces behind it, so that whatever follows begins at a multiple of 8, as readers want it."""
    text = json.dumps(table).encode()
    return text + b" " * (-len(text) % 8)


def _write_gguf(file: TensorFile, target: Target, path: Path, on_tensor: OnTensor) -> None:
    """As published files of Wan: architecture "wan", small tensors in float32, the others as they are."""
    # Imported here because it takes a quarter of a second, which nobody should wait for who only makes a video.
    import gguf

    writer = gguf.GGUFWriter(path, "wan")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {}
    for name, shape in file.shapes().items():
        kinds[name] = _gguf_kind(file, name, shape)
        kind = gguf.GGMLQuantizationType[kinds[name]]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, name in enumerate(file):
        tensor = file[name]
        stored = tensor.parts["raw"] if isinstance(tensor, Quantised) else tensor.to(_GGUF_DTYPES[kinds[name]])
        writer.write_tensor_data(_bytes(stored))
        on_tensor(index + 1, len(file))
    writer.close()


def _gguf_kind(file: TensorFile, name: str, shape: tuple[int, ...]) -> str:
    """The name of the type that a tensor has in a GGUF file."""
    if name in file.quantised:
        return file.quantised[name]
    kind = next((kind for kind, dtype in _GGUF_DTYPES.items() if dtype == file.dtypes()[name]), "F32")
    return "F32" if len(shape) == 1 or name.endswith("modulation") else kind


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
