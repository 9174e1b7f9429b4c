"""Joins quantised weights with their scales: FP8, int8, MXFP8 and NVFP4 as they are stored in safetensors files.

Three ways of saying what a weight is are in use, and a file may mix them: the older `scaled_fp8` files have
`X.scale_weight` beside `X.weight`; newer ones `X.weight_scale` and a tensor `X.comfy_quant` of JSON text, or a table
`_quantization_metadata` in the header. FP8 weights without any of it are taken as they are. Reference: ComfyUI's
`comfy/quant_ops.py` and `comfy/ops.py`, and its QUANTIZATION.md.

Scales of a layer's input are left away: they serve products in the weights' own format, for which ours are measured.
"""

import json
import math
from collections.abc import Mapping

import torch

from ..presets import PREFIXES
from .errors import LoadError
from .quantised import MXFP8, NVFP4, Scaled
from .tensor_file import Parts, TensorFile

_SCALES = ("scale_weight", "weight_scale")
_MORE_SCALES = ("weight_scale_2", "pre_quant_scale")
# What else a layer may bring along, and the marker of the older format.
_UNUSED = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
_METADATA = "_quantization_metadata"

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_JSON = 4096

Options = Mapping[str, object]


def with_scales(file: TensorFile) -> TensorFile:
    """`file` with a `Quantised` in the place of each low-precision weight, without the tensors that it is made of.

    Reads the JSON texts and nothing else. Raises LoadError for formats that are not supported, by their names, and for
    scales that are missing or do not fit.
    """
    stated, shapes = _stated_options(file), file.shapes()
    recipes: dict[str, Parts] = {}
    for name, dtype in file.dtypes().items():
        layer, _, leaf = name.rpartition(".")
        if name in file.quantised or leaf in (*_SCALES, *_MORE_SCALES, *_UNUSED):
            continue
        scale = next((f"{layer}.{suffix}" for suffix in _SCALES if f"{layer}.{suffix}" in shapes), None)
        if leaf != "weight":
            scale, options = None, None
        else:
            options = next((stated[key] for key in (layer, *map(layer.removeprefix, PREFIXES)) if key in stated), None)
        if options is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
            recipes[name] = _stated(file, name, scale, options)
        # Some converters also give a scale to weights that they keep in half precision.
        elif dtype in _FP8 or scale:
            recipes[name] = _scaled(file, name, dtype, scale)
    used = {part for recipe in recipes.values() for part in recipe.names.values()}
    kept = [name for name in file if name not in recipes and name not in used
            and name.rpartition(".")[2] not in _UNUSED]
    return file if len(kept) == len(file) else file.renamed({**{name: name for name in kept}, **recipes})


def _stated_options(file: TensorFile) -> dict[str, Options]:
    """What the file says of its layers: name of the layer -> options, of which "format" is one."""
    stated: dict[str, Options] = {}
    if _METADATA in file.metadata:
        layers = _json(file, _METADATA, file.metadata[_METADATA]).get("layers")
        if not isinstance(layers, dict):
            raise LoadError(f"{file.path.name}: its {_METADATA} holds no table of layers. Download it again.")
        for layer, options in layers.items():
            stated[layer] = options if isinstance(options, dict) else {"format": options}
    for name, shape in file.shapes().items():
        if name.endswith(".comfy_quant"):
            if math.prod(shape) > _MAX_JSON or file.dtypes()[name] not in (torch.uint8, torch.int8):
                raise LoadError(f"{file.path.name}: {name} is no short text. Download it again.")
            stated[name.removesuffix(".comfy_quant")] = _json(file, name, bytes(file[name].flatten().tolist()))
    return stated


def _json(file: TensorFile, name: str, text: str | bytes) -> Options:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file.path.name}: {name} is not JSON. Download it again.") from error
    if not isinstance(table, dict):
        raise LoadError(f"{file.path.name}: {name} is no table. Download it again.")
    return {**table, **table["params"]} if isinstance(table.get("params"), dict) else table


def _stated(file: TensorFile, name: str, scale: str | None, options: Options) -> Parts:
    """The recipe of a weight whose format the file states."""
    form, shape = options.get("format"), file.shapes()[name]
    if len(shape) != 2:
        raise LoadError(f"{file.path.name}: {name} is stated to be {form} and has the shape {list(shape)}; only "
                        "matrices can be quantised.")
    fp8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
           "float8_e5m2": torch.float8_e5m2}
    if form in fp8:
        return _scaled(file, name, fp8[form], scale)
    if form not in ("int8_tensorwise", "mxfp8", "nvfp4"):
        raise LoadError(f"{file.path.name} holds {name} in the format {form!r}, which this version cannot read. Use a "
                        "file of the model in another format.")
    if scale is None:
        raise LoadError(f"{file.path.name} holds {name} in the format {form} without its scale. Download it again.")
    if form == "int8_tensorwise":
        if not options.get("convrot"):
            return _scaled(file, name, torch.int8, scale)
        group = options.get("convrot_groupsize", 256)
        if type(group) is not int or group not in (4, 16, 64, 256, 1024) or shape[1] % group:
            raise LoadError(f"{file.path.name}: {name} is rotated in groups of {group!r} of its {shape[1]} columns, "
                            "which cannot be.")
        return _scaled(file, name, torch.int8, scale, group)
    return _blocked(file, name, scale, MXFP8() if form == "mxfp8" else NVFP4())


def _scaled(file: TensorFile, name: str, dtype: torch.dtype, scale: str | None, rotation: int | None = None) -> Parts:
    """The recipe of a weight with one scale, one a row, or one for each of some equal parts of a row."""
    shape, stored = file.shapes()[name], file.dtypes()[name]
    if stored != dtype and stored.itemsize != 1:
        raise LoadError(f"{file.path.name}: {name} is stated to be {dtype} and stored as {stored}. Download it again.")
    names = {"codes": name}
    if scale is not None:
        rows, count = (shape or (1,))[0], math.prod(file.shapes()[scale])
        per_row = count // rows if rows else 0
        if count != 1 and (len(shape) != 2 or not per_row or count % rows or shape[1] % per_row):
            raise LoadError(f"{file.path.name}: the scale of {name} {list(shape)} has the shape "
                            f"{list(file.shapes()[scale])}. Expected one number, or one for each row.")
        names["scale"] = scale
    return Parts(Scaled(dtype, rotation), shape, names)


def _blocked(file: TensorFile, name: str, scale: str, scheme: MXFP8 | NVFP4) -> Parts:
    """The recipe of a weight with a scale for each block of 16 or 32 columns."""
    stored, layer = file.shapes()[name], name.removesuffix(".weight")
    shape = (stored[0], stored[1] * scheme.codes_per_byte)
    expected = scheme.scale_count(shape)
    found = math.prod(file.shapes()[scale])
    if shape[1] % scheme.block or found != expected:
        raise LoadError(f"{file.path.name}: {name} of {list(shape)} in {scheme.name} has {found} block scales, and "
                        f"{expected} are expected. Only files written for ComfyUI are supported.")
    names = {"codes": name, "scale": scale}
    if isinstance(scheme, NVFP4):
        if f"{layer}.weight_scale_2" not in file:
            raise LoadError(f"{file.path.name} holds {name} in {scheme.name} without weight_scale_2. Download it "
                            "again.")
        names["tensor_scale"] = f"{layer}.weight_scale_2"
        if f"{layer}.pre_quant_scale" in file:
            names["column_scale"] = f"{layer}.pre_quant_scale"
    return Parts(scheme, shape, names)
