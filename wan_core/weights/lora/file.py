"""A LoRA file of any trainer as adapters of official tensors, and which of them a model can use.

Opening reads names, shapes and alphas; the factors stay in the mapped file. What a file holds is only known to be of
use when it is matched with a model, and then every key ends up in one of three places: matched, skipped for a reason,
or unknown.
"""
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.nn.functional as F

from ...presets import recognise, strip_prefix
from ..errors import LoadError, first_few
from ..tensor_file import TensorFile, open_weights
from .adapters import Adapter, Delta, DoRA, LowRank, fits
from .assemble import Layer, group
from .keys import Target, read_key
from .scaling import read_scaling

_BLOCK = re.compile(r"blocks\.([0-9]+)(?:\.|$)")
# Layers whose output has the model's width, and of which every LoRA has some.
_WIDE = re.compile(r"blocks\.[0-9]+\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.2)$")

# Parts that only some models have: what their tensors' names have, a name that tells a model with it, the reason.
_BRANCHES = (
    (re.compile(r"\.(?:k_img|v_img|norm_k_img)\.|^img_emb\."), "img_emb.proj.1.weight",
     "for the CLIP image branch of Wan 2.1 image-to-video, which this model does not have"),
    (re.compile(r"^vace_"), "vace_patch_embedding.weight", "for VACE blocks, which this model does not have"),
)


@dataclass(frozen=True)
class Skipped:
    """Keys of a file that a model has no use for, and why: `reason` completes "these keys are ..."."""

    keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Entry:
    """An adapter in a file: the tensor that it changes, for which expert ('high', 'low' or 'both'), from which keys."""

    target: Target
    expert: str
    adapter: Adapter
    keys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Matched:
    """What a model can use of a file. `unknown` are keys that name nothing which the model or this engine has."""

    adapters: Mapping[Target, Adapter]
    skipped: tuple[Skipped, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An opened LoRA. `unknown` are keys that are no part of any adapter; `path` names the file in messages."""

    path: Path
    entries: tuple[Entry, ...]
    unknown: tuple[str, ...]

    @property
    def experts(self) -> tuple[str, ...]:
        """('high', 'low') for a file with adapters of both experts of a pair, else ('both',): it fits either."""
        return ("high", "low") if any(entry.expert == "low" for entry in self.entries) else ("both",)

    def match(self, shapes: Mapping[str, tuple[int, ...]], expert: str | None = None) -> Matched:
        """Finds for each adapter its tensor in a model, whose tensors have the official names and shapes of `shapes`.

        `expert`: 'high' or 'low', which is needed for a file with both. Adapters of a patch embedding with fewer
        input channels than the model's are widened with zeros. Raises LoadError where nothing matches, with what the
        file seems to be for, and ValueError for a missing or unknown expert.
        """
        if expert not in (None, "high", "low") or (expert is None and self.experts != ("both",)):
            raise ValueError(f"{self.path.name} holds adapters for {' and '.join(self.experts)} noise: expert is "
                             f"{expert!r} and should be 'high' or 'low'")
        mine = [entry for entry in self.entries if entry.expert in ("both", expert)]
        adapters: dict[Target, Adapter] = {}
        skipped: list[Skipped] = []
        branches: dict[str, list[str]] = {}
        unknown = list(self.unknown)
        for entry in mine:
            shape = shapes.get(entry.target.name)
            if shape is None:
                reason = _branch(entry.target, shapes)
                (unknown if reason is None else branches.setdefault(reason, [])).extend(entry.keys)
                continue
            found = _fitted(entry, tuple(shape))
            if isinstance(found, str):
                skipped.append(Skipped(entry.keys, found))
            else:
                adapters[entry.target] = found
        skipped += [Skipped(tuple(keys), reason) for reason, keys in branches.items()]
        if not adapters:
            raise LoadError(self._nothing(mine, shapes, skipped))
        return Matched(adapters, tuple(skipped), tuple(unknown))

    def _nothing(self, mine: list[Entry], shapes: Mapping[str, tuple[int, ...]], skipped: list[Skipped]) -> str:
        theirs, own = size_of({entry.target.name: entry.adapter.shape for entry in mine}), size_of(shapes)
        if theirs[1] > own[1] or theirs[0] not in (None, own[0]):
            why = f"it seems to be made for a model {size_phrase(theirs)}; this one is {size_phrase(own)}"
        elif skipped:
            why = f"its keys are {skipped[0].reason}"
        else:
            why = f"its keys, such as {first_few([key for entry in mine for key in entry.keys])}, are of another model"
        return f"{self.path.name} has no adapter that fits this model: {why}. Choose a LoRA for this model."


def open_lora(path: str | Path) -> LoraFile:
    """Opens a LoRA (LoRA, LoHa, LoKr, DoRA or full differences) in safetensors or PyTorch form and any key dialect.

    Raises LoadError as `open_weights` does, for a file without adapters, and for adapters that contradict themselves;
    the text names key and problem. Nothing is allocated and no factor read.
    """
    with open_weights(path) as file:
        keys = {name: key for name in file.names if (key := read_key(name)) is not None}
        # Expert keys say something only where the file has both experts'.
        both = len({key.low_noise for key in keys.values()}) == 2
        entries: list[Entry] = []
        unknown = [name for name in file.names if name not in keys]
        scalings = {low: read_scaling(file.metadata, file.path.name, low_noise=low)
                    for low in {key.low_noise for key in keys.values()}}
        for (low, module), roles in group(file, keys).items():
            written = keys[next(iter(roles.values()))].written
            scale = partial(scalings[low].scale, layer=written)
            parts, rest = Layer(file, module, roles, scale).adapters()
            expert = ("low" if low else "high") if both else "both"
            entries += [Entry(target, expert, adapter, used) for target, adapter, used in parts]
            unknown += rest
        _check_unique(file, entries)
        if not entries:
            raise LoadError(_no_lora(file))
        return LoraFile(file.path, tuple(entries), tuple(unknown))


def _check_unique(file: TensorFile, entries: list[Entry]) -> None:
    seen: dict[tuple[Target, str], Entry] = {}
    for entry in entries:
        other = seen.setdefault((entry.target, entry.expert), entry)
        if other is not entry:
            raise LoadError(f"{file.path.name}: {other.keys[0]!r} and {entry.keys[0]!r} both change "
                            f"{entry.target.name}. Keep one of them.")


def _no_lora(file: TensorFile) -> str:
    try:
        names = strip_prefix(file.names)[1]
    except ValueError:
        names = {name: name for name in file.names}
    shapes = file.shapes()
    reason = recognise({new: shapes[old] for new, old in names.items()}).reason
    return (f"{file.path.name} holds no LoRA; its tensors are {first_few(list(file.names))}, and it seems to be "
            f"{reason}. Choose a LoRA file.")


def _branch(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next((reason for pattern, anchor, reason in _BRANCHES
                 if pattern.search(target.name) and anchor not in shapes), None)


def _fitted(entry: Entry, shape: tuple[int, ...]) -> Adapter | str:
    """The adapter as it fits a tensor of `shape`, or the reason why it does not."""
    adapter = entry.adapter
    if fits(adapter, shape):
        if isinstance(adapter, DoRA):
            try:
                adapter.axis(shape)
            except ValueError as error:
                return str(error)
        return adapter
    if entry.target == ("patch_embedding", "weight") and (widened := _widened(adapter, shape)):
        return widened
    return f"for a tensor {entry.target.name} of shape {list(adapter.shape)}, which in this model has {list(shape)}"


def _widened(adapter: Adapter, shape: tuple[int, ...]) -> Adapter | None:
    """An adapter of a patch embedding [out, in, *kernel] with zeros for the input channels that it does not know.

    The latent comes first among the channels of every Wan model, so what was trained on fewer belongs at the front.
    None where it was trained on more channels, or not in a form that can be widened.
    """
    kernel = math.prod(shape[2:])
    rows, columns = adapter.shape[0], math.prod(adapter.shape[1:])
    if rows != shape[0] or columns % kernel or columns > math.prod(shape[1:]):
        return None
    missing = math.prod(shape[1:]) - columns
    if isinstance(adapter, LowRank) and adapter.mid is None:
        return replace(adapter, down=F.pad(adapter.down.flatten(1), (0, missing)))
    if isinstance(adapter, Delta):
        return replace(adapter, value=F.pad(adapter.value.flatten(1), (0, missing)))
    return None


def size_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int]:
    """Width and number of blocks of a model, from shapes of its tensors or of the adapters for them."""
    blocks = [int(match[1]) for name in shapes if (match := _BLOCK.match(name))]
    width = next((shape[0] for name, shape in shapes.items() if _WIDE.match(name.rpartition(".")[0])), None)
    return width, max(blocks) + 1 if blocks else 0


def size_phrase(size: tuple[int | None, int]) -> str:
    width, blocks = size
    return f"of width {width} with {blocks} blocks" if width else f"with {blocks} blocks"
