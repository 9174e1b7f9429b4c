"""Opens a checkpoint without reading it: names, shapes and types at once, a tensor's bytes when they are touched.

The whole file is mapped into memory and every tensor is a view of that mapping, so a model that stays on the CPU is
never copied, and opening a 28 GB file takes milliseconds. The file itself can never be changed through a tensor (see
`mapping`). The safetensors library maps in the same way but lets the kernel reserve
memory for the whole file, which fails where the file is larger than the memory; here nothing is reserved.

GGUF and PyTorch's own files (.pth, .pt, .bin) are read by `gguf_file` and `torch_file`.
"""
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import LoadError, human_size
from .gguf_file import GGUFContents
from .gguf_header import MAGIC, Value
from .mapping import map_file, mapped_tensor
from .quantised import Quantised, Scheme, dense
from .safetensors_header import Entry, HeaderError, UnreadableType, looks_like_header, parse_header
from .shards import INDEX_ENDING, check_contents, find_weights, read_index
from .torch_file import read_torch

Device = torch.device | str

_AGAIN = "Download it again."

# What people do open by mistake: first bytes -> (what it is, what to do). Compared in lower case.
_FOREIGN = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the file it stands for",
     "Fetch the file itself (git lfs pull) or download it from its page."),
    (b"<", "is a web page, probably a download that ended in a login or error page", _AGAIN),
    (b"{", "is a JSON file and holds no tensors", "Choose the weights that lie beside it."),
)


@dataclass(frozen=True)
class Joined:
    """A tensor made of others: those of `names`, one below the other along the first axis, then given `layout`."""

    names: tuple[str, ...]
    layout: Callable[[Tensor], Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a tensor of the file as it is there."""
        return len(self.names) == 1 and self.layout is None

    def read(self, read: Callable[[str], Tensor | Quantised]) -> Tensor:
        """The tensor, from a function that gives each of `names`. A single one that is not quantised is not copied."""
        parts = [dense(read(name)) for name in self.names]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.layout(whole) if self.layout else whole


@dataclass(frozen=True)
class Changed:
    """The tensor `name` with a change made to it that keeps shape and type, whenever it is asked for."""

    name: str
    change: Callable[[Tensor], Tensor]

    def read(self, read: Callable[[str], Tensor | Quantised]) -> Tensor:
        """The tensor, from a function that gives the one in the file; one without numbers stays as it is."""
        tensor = read(self.name)
        return tensor if tensor.is_meta else self.change(tensor)


class Kept(NamedTuple):
    """What a quantised weight is stored as, and how many bytes its parts take."""

    format: str
    nbytes: int


class Recipe(Protocol):
    """A quantised weight that is put together whenever it is asked for."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def nbytes(self, file: "TensorFile") -> int:
        """Bytes of its parts; reads nothing."""

    def read(self, read: Callable[[str], Tensor | Quantised]) -> Quantised:
        """The weight, from a function that gives the tensors of the file."""


@dataclass(frozen=True)
class Parts:
    """A quantised weight of `shape` made of others: `names` gives for each part of the scheme a tensor of the file."""

    scheme: Scheme
    shape: tuple[int, ...]
    names: Mapping[str, str]

    def nbytes(self, file: "TensorFile") -> int:
        """See `Recipe`."""
        return sum(file.size(name) for name in self.names.values())

    def read(self, read: Callable[[str], Tensor | Quantised]) -> Quantised:
        """The weight, from a function that gives each of `names`."""
        return Quantised(self.scheme, self.shape, {part: read(name) for part, name in self.names.items()})


class TensorFile(Mapping[str, Tensor | Quantised]):
    """An open checkpoint: a read-only mapping from tensor name to tensor (CPU, the file's own type).

    `path`, `format` ('safetensors', 'gguf' or 'torch'), `metadata` (table of strings) and `nbytes` (size of the file
    or files) describe it; `header_values` is the whole table of values of a GGUF file, lists too, and empty for others.
    Taking a tensor reads nothing; its bytes are read when they are used. Tensors stay valid after `close`. Weights of a
    quantised format come as `Quantised`; `quantised` gives the names of their formats, and `dtypes` the type that they
    are meant to be computed in. `made` are the names of those that are computed from others whenever they are read.
    `sources` are the files that the tensors come from, as they lay on the disk: name, bytes, time of change in ns.
    """

    def __init__(self, path: Path, format: str, metadata: dict[str, str], dtypes: dict[str, torch.dtype],
                 shapes: dict[str, tuple[int, ...]], read: Callable[[str, Device], Tensor | Quantised],
                 kept: "Mapping[str, Kept] | None" = None):
        self.path, self.format, self.metadata = path, format, metadata
        state = path.stat()
        self.nbytes = state.st_size
        self.sources: tuple[tuple[str, int, int], ...] = ((path.name, state.st_size, state.st_mtime_ns),)
        self.header_values: Mapping[str, Value] = MappingProxyType({})
        self.made: frozenset[str] = frozenset()
        self._dtypes, self._shapes, self._read = dtypes, shapes, read
        self._kept = dict(kept or {})
        self.quantised = {name: what.format for name, what in self._kept.items()}

    def __getitem__(self, name: str) -> Tensor | Quantised:
        return self.read(name)

    def read(self, name: str, device: Device = "cpu") -> Tensor | Quantised:
        """The tensor on `device`; where it is made of others or quantised on load, that is done there."""
        if self._read is None:
            raise ValueError(f"{self.path.name} is closed")
        if name not in self._shapes:
            raise KeyError(name)
        return self._read(name, device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return MappingProxyType(self._shapes)

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return MappingProxyType(self._dtypes)

    def size(self, name: str) -> int:
        """Bytes of a tensor as it is stored; nothing is read."""
        if name in self._kept:
            return self._kept[name].nbytes
        return math.prod(self._shapes[name]) * self._dtypes[name].itemsize

    def renamed(self, mapping: Mapping[str, "str | Joined | Changed | Recipe"]) -> "TensorFile":
        """The same file under other names: `mapping` gives for each new name the one in the file; others are left out.

        A `Joined`, `Changed` or `Recipe` in place of a name stands for a tensor that is made whenever it is asked for.
        Both stay open on their own. Raises LoadError where tensors cannot be joined.
        """
        read, dtypes, shapes, kept = self._read, {}, {}, {}
        for new, old in mapping.items():
            if isinstance(old, str | Changed):
                source = old if isinstance(old, str) else old.name
                dtypes[new], shapes[new] = self._dtypes[source], self._shapes[source]
                if old in self._kept:
                    kept[new] = self._kept[old]
                continue
            if not isinstance(old, Joined):
                dtypes[new], shapes[new] = torch.bfloat16, old.shape
                kept[new] = Kept(old.scheme.name, old.nbytes(self))
                continue
            # Shape and type of the result, without any data.
            parts = {name: torch.empty(self._shapes[name], dtype=self._dtypes[name], device="meta")
                     for name in old.names}
            try:
                whole = old.read(parts.__getitem__)
            except (RuntimeError, IndexError) as error:
                found = ", ".join(f"{name} {list(self._shapes[name])}" for name in old.names)
                raise LoadError(f"{self.path.name} holds tensors that do not fit each other: {found}. "
                                f"{_AGAIN}") from error
            dtypes[new], shapes[new] = whole.dtype, tuple(whole.shape)

        def read_new(name: str, device: Device) -> Tensor | Quantised:
            old = mapping[name]
            return read(old, device) if isinstance(old, str) else old.read(lambda source: read(source, device))

        renamed = TensorFile(self.path, self.format, self.metadata, dtypes, shapes, read_new, kept)
        renamed.nbytes, renamed.header_values, renamed.sources = self.nbytes, self.header_values, self.sources
        renamed.made = frozenset(new for new, old in mapping.items() if (
            old in self.made if isinstance(old, str) else
            not isinstance(old, Parts) and not (isinstance(old, Joined) and old.is_plain)))
        return renamed

    def extended(self, other: "TensorFile") -> "TensorFile":
        """The tensors of this file and of `other`, whose tensors count where both have one; named as this file."""
        both = TensorFile(self.path, self.format, self.metadata, {**self._dtypes, **other._dtypes},
                          {**self._shapes, **other._shapes},
                          lambda name, device: (other if name in other else self).read(name, device),
                          {**self._kept, **other._kept})
        both.nbytes, both.header_values = self.nbytes + other.nbytes, self.header_values
        both.sources = self.sources + other.sources
        both.made = self.made - set(other) | other.made
        return both

    def close(self) -> None:
        """Lets go of the file. Its mapping ends with the last tensor taken from it."""
        self._read = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_weights(path: str | Path) -> TensorFile:
    """Opens a safetensors, GGUF or PyTorch file, told apart by content and not by name, or the index
    (`*.safetensors.index.json`) of a model in several files, or the folder of either (see `find_weights`).

    Raises LoadError for a missing, empty, truncated, damaged or foreign file.
    """
    path = find_weights(Path(path))
    if not path.exists():
        raise LoadError(f"{path.name} does not exist. Check the path and the file's name.")
    if not path.is_file():
        raise LoadError(f"{path.name} is no regular file. Choose a file of model weights.")
    if path.name.endswith(INDEX_ENDING):
        return _open_sharded(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise LoadError(f"{path.name} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    if not size:
        raise LoadError(f"{path.name} is empty. {_AGAIN}")
    if looks_like_header(start, size):
        return _open_safetensors(path, size)
    if start.startswith(MAGIC):
        return _open_gguf(path)
    # Zip archives since PyTorch 1.6, a bare pickle before.
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return _open_torch(path, is_zip=start.startswith(b"PK"))
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what, advice in _FOREIGN:
        if text.startswith(magic):
            raise LoadError(f"{path.name} {what}. {advice}")
    raise LoadError(f"{path.name} ({human_size(size)}) is neither a safetensors, GGUF nor PyTorch file, or its "
                    "beginning is damaged. Choose a .safetensors file or, if this should be one, download it again.")


def _open_sharded(path: Path) -> TensorFile:
    index = read_index(path)
    shards = {}
    for shard in dict.fromkeys(index.values()):
        part = shards[shard] = open_weights(path.with_name(shard))
        if part.format != "safetensors":
            raise LoadError(f"{shard} is no safetensors file, as {path.name} says. {_AGAIN}")
    check_contents(path, index, {shard: part.names for shard, part in shards.items()})
    metadata, dtypes, shapes = {}, {}, {}
    for part in shards.values():
        metadata.update(part.metadata)
        dtypes.update(part.dtypes())
        shapes.update(part.shapes())
    whole = TensorFile(path, "safetensors", metadata, dtypes, shapes,
                       lambda name, device: shards[index[name]].read(name, device))
    whole.nbytes = sum(part.nbytes for part in shards.values())
    whole.sources += tuple(source for part in shards.values() for source in part.sources)
    return whole


def _open_safetensors(path: Path, size: int) -> TensorFile:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            raise LoadError(f"{path.name} is truncated: its header alone takes {human_size(length)} and the file has "
                            f"{human_size(size)}. {_AGAIN}")
        try:
            entries, metadata = parse_header(stream.read(length), size - 8 - length)
        except HeaderError as error:
            raise _load_error(path, error) from error
        mapping = map_file(path, stream.fileno())
    return TensorFile(
        path, "safetensors", metadata, {name: entry.dtype for name, entry in entries.items()},
        {name: entry.shape for name, entry in entries.items()},
        lambda name, device: _view(mapping, 8 + length, entries[name]).to(device))


def _open_gguf(path: Path) -> TensorFile:
    with path.open("rb") as stream:
        mapping = map_file(path, stream.fileno())
    try:
        contents = GGUFContents(mapping)
    except HeaderError as error:
        raise _load_error(path, error) from error
    file = TensorFile(path, "gguf", contents.metadata, contents.dtypes, contents.shapes,
                      lambda name, device: contents.read(name).to(device),
                      {name: Kept(*what) for name, what in contents.kept.items()})
    file.header_values = MappingProxyType(contents.header.values)
    return file


def _load_error(path: Path, error: HeaderError) -> LoadError:
    advice = "Use a file of the model in another format." if isinstance(error, UnreadableType) else _AGAIN
    return LoadError(f"{path.name} {error}. {advice}")


def _view(mapping: mmap.mmap, base: int, entry: Entry) -> Tensor:
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=entry.dtype)
    start = base + entry.start
    if start % entry.dtype.itemsize:
        # Only foreign writers leave tensors unaligned; kernels expect alignment, so these are copied.
        return torch.frombuffer(bytearray(mapping[start:base + entry.end]), dtype=entry.dtype).view(entry.shape)
    return mapped_tensor(mapping, entry.dtype, count, start).view(entry.shape)


def _open_torch(path: Path, is_zip: bool) -> TensorFile:
    tensors = read_torch(path, is_zip)
    return TensorFile(path, "torch", {}, {name: tensor.dtype for name, tensor in tensors.items()},
                      {name: tuple(tensor.shape) for name, tensor in tensors.items()},
                      lambda name, device: tensors[name].to(device))
