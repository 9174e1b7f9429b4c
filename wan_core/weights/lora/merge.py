"""Folds LoRAs into weights while they are read: no cost at run time, and undone by reading the file again.

The file itself is never changed, so a merge leaves no rounding behind: the model without it is built from the same
bytes as before. Weights that are quantised keep their storage; their adapters stay on the activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from ..tensor_file import Changed, TensorFile
from .adapters import Adapter
from .file import Matched
from .keys import Target
from .stack import Lora


def fold(files: Mapping[str, TensorFile], loras: tuple[Lora, ...]) -> tuple[dict[str, TensorFile], tuple[Lora, ...]]:
    """The files of the experts, under official names, with the LoRAs in their dense tensors; and what is left of these.

    Left are the adapters of quantised weights, and LoRAs that hold at some noise levels only, which no file can say.
    """
    folded, left = dict(files), []
    for lora in loras:
        if (lora.start, lora.end) != (1.0, 0.0):
            left.append(lora)
            continue
        rest = {}
        for expert, file in folded.items():
            adapters = lora.adapters[expert]
            rest[expert] = {target: adapters[target] for target in adapters if target.name in file.quantised}
            dense = {target: adapters[target] for target in adapters.keys() - rest[expert].keys()}
            if dense and lora.strengths[expert]:
                folded[expert] = _changed(file, dense, lora.strengths[expert])
        if any(rest.values()):
            left.append(replace(lora, matched={expert: Matched(adapters, (), ()) for expert, adapters in rest.items()}))
    return folded, tuple(left)


def _changed(file: TensorFile, adapters: Mapping[Target, Adapter], strength: float) -> TensorFile:
    changes = {target.name: Changed(target.name, _change(adapter, strength)) for target, adapter in adapters.items()}
    return file.renamed({name: changes.get(name, name) for name in file})


def _change(adapter: Adapter, strength: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: adapter.merged(tensor, strength)
