"""Puts a checkpoint's tensors into a module: opens it, checks it against the module, assigns tensor by tensor.

At no time does a second copy of the weights exist: the module is built on the meta device and receives views of the
mapped file, or, where device or dtype differ, converted tensors one at a time.
"""
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..presets import Recognition, recognise, strip_prefix
from .build import build_module, can_run
from .dialects import official_clip_names, official_umt5_names
from .errors import LoadError, first_few
from .tensor_file import TensorFile, open_weights

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Tensors that repackaged files carry beside the weights: the tokenizer, and the marker of the scaled-FP8 format (which
# is refused by its weights' type and needs no second complaint).
EXTRAS = ("spiece_model", "scaled_fp8")


def open_model(path: str | Path, kind: str) -> tuple[TensorFile, Recognition]:
    """Opens a checkpoint of `kind` under official tensor names; kinds are those of `Recognition`.

    Prefixes are stripped and known dialects translated. Raises LoadError where the file holds something else, an
    architecture that this version cannot run, or tensors that do not fill its module (see `load_module`), so that
    nobody waits for other models to run first; the text says what it seems to be. Reads no weights.
    """
    file, recognition = recognise_file(open_weights(path))
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
    try:
        _, mapping = strip_prefix(file.names)
    except ValueError as error:
        raise LoadError(f"{file.path.name}: {error}.") from error
    file = file.renamed(mapping)
    recognition = recognise(file.shapes())
    if recognition.kind == "text_encoder" and recognition.dialect == "transformers":
        file = file.renamed(official_umt5_names(file.names))
    if recognition.kind == "clip_vision" and recognition.spec is not None:
        file = file.renamed(official_clip_names(file.names, recognition.dialect))
    return file, recognition


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], *,
                dtype_for: Callable[[str, torch.dtype], torch.dtype] | None = None,
                device: torch.device | str = "cpu", ignore: Iterable[str] = EXTRAS) -> nn.Module:
    """Fills `module` (built on the meta device) with `tensors`, named as the module's state dict; returns the module.

    `dtype_for(name, stored_dtype)` says in which type a tensor is kept; without it, in the stored one. A tensor that
    already has that type on that device is not copied. Names that begin with one of `ignore` are skipped.
    Parameters come out frozen (`requires_grad` False).

    Raises LoadError, before anything is assigned, that names the first few missing, unexpected and misshapen tensors
    and those of a type that cannot be computed with, and says what the file seems to be.
    """
    check_tensors(module, tensors, ignore)
    for name, target in module.state_dict(keep_vars=True).items():
        tensor = tensors[name]
        dtype = dtype_for(name, tensor.dtype) if dtype_for else tensor.dtype
        _assign(module, name, tensor.to(device=device, dtype=dtype), isinstance(target, nn.Parameter))
    return module


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], ignore: Iterable[str] = EXTRAS) -> None:
    """Raises the LoadError of `load_module` unless `tensors` fill `module`; reads and assigns nothing."""
    ignore = tuple(ignore)
    targets = {name: tuple(target.shape) for name, target in module.state_dict().items()}
    found = {name: shape for name, shape in _shapes(tensors).items() if not name.startswith(ignore)}
    problems = _problems(targets, found, _dtypes(tensors))
    if problems:
        label = tensors.path.name if isinstance(tensors, TensorFile) else "The set of tensors"
        raise LoadError(f"{label} does not fit {type(module).__name__}: {'; '.join(problems)}. "
                        f"It seems to be {recognise(found).reason}.")


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
