"""Puts a checkpoint's tensors into a module: opens it, checks it against the module, assigns tensor by tensor.

At no time does a second copy of the weights exist: the module is built on the meta device and receives views of the
mapped file, or, where device or dtype differ, converted tensors one at a time.
"""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..presets import Recognition, foreign_dialect, recognise, strip_prefix
from .build import build_module, can_run
from .dialects import official_clip_names, official_names
from .errors import LoadError, first_few
from .linear import QuantisedEmbedding, QuantisedLinear
from .quantised import Quantised, RowScheme
from .scales import with_scales
from .shards import find_weights
from .tensor_file import TensorFile, open_weights

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What repackaged files carry beside the weights: the tokenizer.
EXTRAS = ("spiece_model",)


def open_model(path: str | Path, kind: str) -> tuple[TensorFile, Recognition]:
    """Opens a checkpoint of `kind` under official tensor names; kinds are those of `Recognition`.

    `path` is a file, the index of a model in several files, or a folder (see `find_weights`).
    Prefixes are stripped and known dialects translated. Raises LoadError where the file holds something else, an
    architecture that this version cannot run, or tensors that do not fill its module (see `load_module`), so that
    nobody waits for other models to run first; the text says what it seems to be. Reads no weights.
    """
    file, recognition = recognise_file(open_weights(find_weights(Path(path), kind)))
    if recognition.kind != kind:
        wanted = {"vae": "VAE", "text_encoder": "text encoder", "clip_vision": "CLIP vision model"}.get(kind, kind)
        raise LoadError(f"{file.path.name} seems to be {recognition.reason}. Choose a file that holds a {wanted}.")
    if recognition.spec is None:
        raise LoadError(f"{file.path.name} seems to be {recognition.reason}.")
    if not can_run(recognition.spec):
        raise LoadError(f"{file.path.name} is recognised as {recognition.reason}, which this version cannot run yet.")
    try:
        module = build_module(recognition.spec)
    except LoadError:
        raise
    except ValueError as error:
        raise LoadError(f"{file.path.name} seems to be {recognition.reason}, but {error}.") from error
    check_tensors(module, file)
    return file, recognition


def open_vace_module(path: str | Path) -> TensorFile:
    """Opens a file that holds a VACE module, under official names. Raises LoadError where it holds something else."""
    file, recognition = recognise_file(open_weights(path))
    if recognition.kind != "vace_module":
        raise LoadError(f"{file.path.name} seems to be {recognition.reason}. Choose a file that holds a VACE module; a "
                        "whole VACE model is loaded as a model of its own.")
    return file


def recognise_file(file: TensorFile) -> tuple[TensorFile, Recognition]:
    """`file` under official tensor names, without prefix, and what it seems to be."""
    file = with_scales(file)
    try:
        _, mapping = strip_prefix(file.names)
        file = file.renamed(mapping)
        foreign = foreign_dialect(file.names)
        if foreign:
            file = file.renamed(official_names(file.names, *foreign))
    except ValueError as error:
        raise LoadError(f"{file.path.name}: {error}.") from error
    recognition = recognise(file.shapes())
    if foreign:
        recognition = replace(recognition, dialect=foreign[1])
    if recognition.kind == "clip_vision" and recognition.spec is not None:
        file = file.renamed(official_clip_names(file.names, recognition.dialect))
    return file, recognition


def load_module(module: nn.Module, tensors: Mapping[str, Tensor | Quantised], *,
                dtype_for: Callable[[str, torch.dtype], torch.dtype] | None = None,
                device: torch.device | str = "cpu", on_host: Callable[[str], bool] = lambda name: False,
                ignore: Iterable[str] = EXTRAS) -> nn.Module:
    """Fills `module` (built on the meta device) with `tensors`, named as the module's state dict; returns the module.

    Tensors go to `device`, but for those of which `on_host(name)` says that they stay on the host: as they are in the
    mapped file, or made on the device and brought back.
    `dtype_for(name, stored_dtype)` says in which type a tensor is kept; without it, in the stored one. A tensor that
    already has that type on that device is not copied. Quantised weights of linear layers and embeddings stay as they
    are stored, and the layer computes in that type; others are made dense. Names that begin with one of `ignore` are
    skipped. Parameters come out frozen (`requires_grad` False).

    Raises LoadError, before anything is assigned, that names the first few missing, unexpected and misshapen tensors
    and those of a type that cannot be computed with, and says what the file seems to be.
    """
    check_tensors(module, tensors, ignore)
    types = _dtypes(tensors)
    for name, target in module.state_dict(keep_vars=True).items():
        stored, place = types[name], "cpu" if on_host(name) else device
        made = isinstance(tensors, TensorFile) and name in tensors.made
        tensor = tensors.read(name, device if made else place) if isinstance(tensors, TensorFile) else tensors[name]
        dtype = dtype_for(name, stored) if dtype_for else stored
        if isinstance(tensor, Quantised):
            try:
                tensor.check()
            except ValueError as error:
                raise LoadError(f"{_label(tensors)}: {name} cannot be used: {error}. Download it again.") from error
            tensor = tensor.to(place)
            if _replace(module, name, tensor, dtype):
                continue
            tensor = tensor.dequantise(dtype)
        _assign(module, name, tensor.to(device=place, dtype=dtype), isinstance(target, nn.Parameter))
    return module


def _replace(module: nn.Module, name: str, weight: Quantised, dtype: torch.dtype) -> bool:
    """Puts a layer for quantised weights in the place of the one that `name` belongs to, if there is such a layer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf == "weight" and isinstance(owner, nn.Embedding) and isinstance(weight.scheme, RowScheme):
        layer = QuantisedEmbedding(weight, dtype)
    elif leaf == "weight" and hasattr(owner, "product"):
        layer = QuantisedLinear(owner, weight, dtype)
    else:
        return False
    parent, _, own = path.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)
    return True


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], ignore: Iterable[str] = EXTRAS) -> None:
    """Raises the LoadError of `load_module` unless `tensors` fill `module`; reads and assigns nothing."""
    ignore = tuple(ignore)
    targets = {name: tuple(target.shape) for name, target in module.state_dict().items()}
    found = {name: shape for name, shape in _shapes(tensors).items() if not name.startswith(ignore)}
    problems = _problems(targets, found, _dtypes(tensors))
    if problems:
        raise LoadError(f"{_label(tensors)} does not fit {type(module).__name__}: {'; '.join(problems)}. "
                        f"It seems to be {recognise(found).reason}.")


def _label(tensors: Mapping[str, Tensor | Quantised]) -> str:
    return tensors.path.name if isinstance(tensors, TensorFile) else "The set of tensors"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    if isinstance(tensors, TensorFile):
        return tensors.shapes()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return tensors.dtypes() if isinstance(tensors, TensorFile) else {name: t.dtype for name, t in tensors.items()}


def _problems(targets: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]],
              dtypes: Mapping[str, torch.dtype]) -> list[str]:
    missing, unexpected, misshapen = compare_shapes(targets, found)
    misshapen = [f"{name} is {list(found[name])} and should be {list(targets[name])}" for name in misshapen]
    odd = unsupported_types(dtypes[name] for name in targets.keys() & found.keys())
    problems = [f"{what} tensors: {first_few(names)}" for what, names in
                (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    return [odd, *problems] if odd else problems


def unsupported_types(dtypes: Iterable[torch.dtype]) -> str:
    """A phrase that names the weight types that cannot be computed with and what to use, '' where there are none."""
    odd = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in COMPUTABLE})
    return f"weights of type {', '.join(odd)} are not supported in this version; use the bfloat16, float16 or " \
           "float32 file of the model" if odd else ""


def compare_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]],
                   ) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing in `found`, unexpected in it, and in both with different shapes."""
    return ([name for name in expected if name not in found], [name for name in found if name not in expected],
            [name for name, shape in expected.items() if found.get(name, shape) != shape])


def _assign(module: nn.Module, name: str, tensor: Tensor, is_parameter: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    # Attribute assignment would refuse a parameter where a buffer is and the other way round, which is wanted.
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
