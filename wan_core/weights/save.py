"""Writes a safetensors file so that at every moment the path holds the old file, the whole new one, or nothing."""
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import human_size


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `tensors` (any device) and `metadata` (strings only) to `path`, replacing what was there.

    The file is written beside its destination, flushed to the disk and renamed. Raises ValueError for no tensors or
    metadata that is not text, and OSError where the disk is full or the folder cannot be written; nothing is left
    behind then and an existing file is untouched.
    """
    path, metadata = Path(path), dict(metadata or {})
    if not tensors:
        raise ValueError(f"no tensors to write to {path.name}")
    odd = [key for key, value in metadata.items() if not isinstance(key, str) or not isinstance(value, str)]
    if odd:
        raise ValueError(f"the metadata of a safetensors file is text, but that of {odd[0]!r} is a "
                         f"{type(metadata[odd[0]]).__name__}: turn it into a string, for example with json.dumps")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in plain.values())
    with replacing(path, f" ({human_size(size)})") as temporary:
        save_file(plain, temporary, metadata)
        # safetensors makes its files private; a model file is as open as any other that the user makes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)


@contextmanager
def replacing(path: Path, size: str = "") -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` if all goes well, and nothing is left behind otherwise.

    Raises OSError, in which `size` follows the file's name, where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path.name}{size} could not be written: {error}. Free some space or choose another folder; "
                      "nothing was left behind.") from error
    finally:
        temporary.unlink(missing_ok=True)
