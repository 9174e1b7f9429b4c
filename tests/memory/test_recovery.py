"""Out of memory: which errors say so, and that nothing which they ended keeps memory."""

import errno
import weakref

import pytest
import torch

from wan_core.memory.recovery import is_out_of_memory, release


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"),
    MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: you tried to "
                 "allocate 4000000000000 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB). Tried to allocate 2 GB"),
    RuntimeError("Invalid buffer size: 25.00 GiB"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("miopenStatusAllocFailed"), RuntimeError("HIP error: hipErrorOutOfMemory"),
], ids=str)
def test_memory_that_ran_out_is_told_in_many_ways(error):
    """Promise: errors of every backend's allocator, and of the libraries that allocate by themselves, are known."""
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError(errno.ENOSPC, ""),
    RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"), KeyboardInterrupt(),
], ids=str)
def test_other_errors_are_none_of_memory(error):
    """Promise: what less memory would not help against is not taken for it."""
    assert not is_out_of_memory(error)


def test_the_host_s_own_error_is_known():
    """Promise: what PyTorch raises on this machine for more memory than there is, is known."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_what_a_failed_function_held_is_let_go():
    """Promise: tensors in the functions that an error ended, and in those of the error that it came from, are freed
    while the error itself is still being handled."""
    held = []

    def inner(tensor):
        raise torch.OutOfMemoryError("out of memory")

    def outer():
        large, small = torch.zeros(1000), torch.zeros(3)
        held.extend(weakref.ref(tensor) for tensor in (large, small))
        try:
            inner(small)
        except RuntimeError as error:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED") from error

    try:
        outer()
    except RuntimeError as error:
        assert all(tensor() is not None for tensor in held)
        release(error, torch.device("cpu"))
        assert all(tensor() is None for tensor in held) and len(held) == 2
