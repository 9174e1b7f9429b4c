"""A file mapped into memory, and tensors that are views of it.

The mapping is private and copy-on-write where that costs nothing; on Windows, which sets memory aside for all of a
mapping that could be written to, it is read-only. Nobody writes into weights.
"""

import mmap
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .errors import LoadError


def map_file(path: Path, descriptor: int) -> mmap.mmap:
    """The whole open file. Raises LoadError where the system cannot map it."""
    try:
        if sys.platform == "linux":
            # Without MAP_NORESERVE (0x4000; unnamed in older Pythons) the kernel refuses files larger than the memory.
            return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000),
                             mmap.PROT_READ | mmap.PROT_WRITE)
        access = mmap.ACCESS_READ if sys.platform == "win32" else mmap.ACCESS_COPY
        return mmap.mmap(descriptor, 0, access=access)
    except OSError as error:
        raise LoadError(f"{path.name} cannot be mapped into memory: {error.strerror}. "
                        "Move it to a local disk.") from error


def mapped_tensor(mapping: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """`count` numbers of the mapping from byte `offset` on, as a view [count]."""
    with warnings.catch_warnings():
        # That a tensor should not be written to is known here.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)
