"""Page-locked host memory, up to a limit: the device copies from it by itself, at the full rate of the bus.

PyTorch's own pinned allocator rounds every size up to a power of two, which for blocks of 700 MB wastes half of the
memory again; so ordinary memory is registered with the driver instead. Reference: CUDA runtime API, cudaHostRegister.
"""

import logging
import weakref

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PAGE = 4096


class Pinning:
    """Hands out pinned memory until `limit` bytes are taken. All of it is released with this object."""

    def __init__(self, device: torch.device, limit: int) -> None:
        # Only the CUDA runtime, and ROCm's under its name, can register memory that it did not make.
        self._left, self._device = limit if device.type == "cuda" else 0, device
        self._taken: list[Tensor] = []
        weakref.finalize(self, _release, self._taken)

    def take(self, nbytes: int) -> Tensor | None:
        """Pinned bytes [nbytes] uint8; None where the limit is reached or the driver refuses."""
        if not 0 < nbytes <= self._left:
            return None
        # Whole pages, so that nothing else is registered with them.
        room = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8)
        start, size = -room.data_ptr() % PAGE, -(-nbytes // PAGE) * PAGE
        memory = room[start:start + nbytes]
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)):
            log.warning("Wan: the driver pins no more host memory; other weights go through small pinned pieces.")
            self._left = 0
            _forget_error(self._device)
            return None
        self._left -= nbytes
        self._taken.append(memory)
        return memory


def _forget_error(device: torch.device) -> None:
    """The runtime reports a refusal a second time, to whoever asks next; here it is asked for nothing."""
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError:
        log.debug("the refusal to pin memory was reported again", exc_info=True)


def _release(taken: list[Tensor]) -> None:
    for memory in taken:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    taken.clear()
