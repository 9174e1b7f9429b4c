"""Tells that memory ran out, in the words of every backend, and frees what a failed computation still holds.

PyTorch has a type of error for CUDA, ROCm and XPU; the allocators of the CPU and of MPS, and libraries that allocate
by themselves, raise a RuntimeError with a text of their own. Reference: `torch.OutOfMemoryError`, cublasStatus_t,
cudnnStatus_t, and the allocators' sources (c10/core/impl/alloc_cpu.cpp, aten/src/ATen/mps/MPSAllocator.mm).
"""

import errno
import gc
import traceback

import torch

from .placement import Placement

# In lower case. That cuBLAS could not be initialised nearly always means that its workspace found no room.
_TEXTS = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed",
    "allocfailed", "erroroutofmemory", "out_of_device_memory", "out_of_host_memory", "out_of_resources",
    "cublas_status_not_initialized", "invalid buffer size",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def made_room(error: BaseException, placement: Placement) -> bool:
    """Take everything of `placement` off its device, if `error` says that memory ran out; whether it does."""
    if not is_out_of_memory(error):
        return False
    placement.clear()
    release(error, placement.device)
    return True


def release(error: BaseException, device: torch.device) -> None:
    """Let go of the tensors that the functions which `error` ended still hold, and of the unused memory of `device`.

    Call it when whoever else holds tensors has let go of them. Functions that still run keep theirs.
    """
    ended: BaseException | None = error
    while ended is not None:
        traceback.clear_frames(ended.__traceback__)
        ended = ended.__cause__ or ended.__context__
    gc.collect()
    # torch.cuda (ROCm as well), torch.xpu and torch.mps keep freed memory for later; the CPU's allocator does not.
    backend = getattr(torch, device.type)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
