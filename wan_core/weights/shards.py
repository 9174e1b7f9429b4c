"""Models in several files and folders: reads the index that says which file holds which tensor, and finds it.

The index (`*.safetensors.index.json`, https://huggingface.co/docs/safetensors, "Sharded models") is a JSON object whose
`weight_map` gives for each tensor the name of a file beside it. It comes from a download and is trusted in nothing: it
can only name files in its own folder, and what it says is compared with what the files hold.
"""
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import LoadError, first_few, human_size

INDEX_ENDING = ".safetensors.index.json"
MAX_INDEX = 32_000_000
MAX_SHARDS = 1000
MAX_NAME = 200

# Where the folder of a whole model in the layout of diffusers keeps its parts, by the kinds of `Recognition`.
PART_FOLDERS = {"transformer": "transformer", "vae": "vae", "text_encoder": "text_encoder",
                "clip_vision": "image_encoder"}

_AGAIN = "Download it again."


def find_weights(path: Path, kind: str = "transformer") -> Path:
    """The file to open where a folder was given: its index, its only safetensors file, or those of the subfolder that
    `kind` (see `Recognition`) has in a folder of diffusers. Any other path comes back as it is.

    Raises LoadError where there is none of them, or more than one.
    """
    if not path.is_dir():
        return path
    folders = [path, path / PART_FOLDERS[kind]] if kind in PART_FOLDERS else [path]
    for folder in folders:
        try:
            names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
        except OSError as error:
            raise LoadError(f"{folder.name} cannot be read: {error.strerror}. Check its permissions.") from error
        for ending in (INDEX_ENDING, ".safetensors"):
            # Files that begin with a dot are those that macOS and unfinished downloads leave behind.
            found = [name for name in names if name.endswith(ending) and not name.startswith(".")]
            if len(found) > 1:
                raise LoadError(f"{folder.name} is a folder with {len(found)} models: {first_few(found)}. "
                                "Choose one of these files.")
            if found:
                return folder / found[0]
    sought = f" and has no folder {PART_FOLDERS[kind]!r}" if len(folders) > 1 and not folders[1].is_dir() else ""
    raise LoadError(f"{path.name} is a folder without safetensors files{sought}. Choose a file of model weights, or a "
                    "folder that holds one.")


def read_index(path: Path) -> dict[str, str]:
    """Name of the file, beside `path`, of each tensor of an index.

    Raises LoadError for anything but a sound index of files that are all there.
    """
    try:
        size = path.stat().st_size
        if size > MAX_INDEX:
            raise LoadError(f"{path.name} has {human_size(size)}, too much for the index of a model. {_AGAIN}")
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise LoadError(f"{path.name} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    except LoadError:
        raise
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, _Twice) else f"is damaged or no JSON ({type(error).__name__})"
        raise LoadError(f"{path.name} {what}. {_AGAIN}") from error
    tensors = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(shard, str) for shard in tensors.values()):
        raise LoadError(f"{path.name} is no index of a model: it has no table 'weight_map' from tensors to files. "
                        f"{_AGAIN}")
    _check_shards(path, dict.fromkeys(tensors.values()))
    return tensors


class _Twice(ValueError):
    """A name stands in the index twice; the text completes "the index ..."."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _Twice(f"names {twice!r} twice")
    return table


def _check_shards(path: Path, shards: Collection[str]) -> None:
    if len(shards) > MAX_SHARDS:
        raise LoadError(f"{path.name} names {len(shards)} files, where {MAX_SHARDS} are the most that a model has. "
                        f"{_AGAIN}")
    for shard in shards:
        # A file's bare name and nothing that could lead anywhere else, on any system.
        if (not shard.endswith(".safetensors") or set(shard) & set("/\\:") or shard.startswith(".")
                or not shard.isprintable() or len(shard) > MAX_NAME):
            raise LoadError(f"{path.name} names {shard[:80]!r}, which is no safetensors file in its own folder; it is "
                            f"refused, because it could lead to any file. {_AGAIN}")
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise LoadError(f"{path.name} names {len(shards)} files, and {len(missing)} of them are not beside it: "
                        f"{first_few(missing)}. Download them into the same folder.")


def check_contents(path: Path, index: Mapping[str, str], contents: Mapping[str, Collection[str]]) -> None:
    """Raises LoadError unless each file of `contents` holds the tensors that `index` of `path` says, and no others."""
    by_shard: dict[str, set[str]] = {shard: set() for shard in contents}
    for name, shard in index.items():
        by_shard[shard].add(name)
    for shard, names in contents.items():
        promised = by_shard[shard]
        absent = [name for name in promised if name not in names]
        if absent:
            raise LoadError(f"{path.name} says that {shard} holds {first_few(sorted(absent))}, and it does not: they "
                            "belong to different models or versions. Download all files again.")
        extra = [name for name in names if name not in promised]
        if extra:
            twice = [name for name in extra if name in index]
            what = f"a second {twice[0]!r}, which is also in {index[twice[0]]}" if twice else first_few(sorted(extra))
            raise LoadError(f"{shard} holds {what}, of which {path.name} says nothing: they belong to different models "
                            "or versions. Download all files again.")
