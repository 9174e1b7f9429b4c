"""How bytes get from the host to a device while the device computes: a second stream, or at once where there is none.

A lane knows two kinds of work, copies and computing, and marks: points in either that the other can wait for. Whoever
owns buffers on the device says which mark a copy has to wait for; a lane never waits by itself.
Reference: CUDA programming guide, "Asynchronous Concurrent Execution"; PyTorch's `torch.cuda` and `torch.xpu`, whose
streams and events are the same (ROCm has CUDA's).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

# Pairs of host tensor and the device's tensor of the same shape and type that takes its bytes.
Copies = Sequence[tuple[Tensor, Tensor]]

# Sizes of the pinned pieces through which memory goes that is not pinned itself, and how many there are.
PIECE = 32 << 20
PIECES = 3


class Lane(Protocol):
    """Copies beside computing; marks are whatever the lane wants them to be."""

    def copy(self, copies: Callable[[], Copies], after: object | None) -> object:
        """Begin copies once the mark `after` is reached; the mark that is returned stands for their end.

        `copies` is called when they begin, at the latest when somebody waits for that mark.
        """

    def mark(self) -> object:
        """A mark that stands for the end of all computing that was asked for so far."""

    def wait(self, mark: object) -> None:
        """Computing that is asked for from now on waits for the mark."""

    def finish(self) -> None:
        """Return when all copies have ended."""


class AtOnce:
    """Copies when they are asked for: for devices without streams, and for the CPU. Marks mean nothing."""

    def copy(self, copies: Callable[[], Copies], after: object | None) -> object:
        for source, target in copies():
            target.copy_(source)
        return None

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        """Everything has happened already."""

    def finish(self) -> None:
        """Everything has happened already."""


class SecondStream:
    """Copies on a stream of their own. Pageable memory goes through a few small pinned pieces, filled by a thread.

    Pinned memory is copied by the device alone; of pageable memory the driver would make the caller wait, so that
    nothing overlaps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._backend = device, getattr(torch, device.type)
        self._stream = self._backend.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wan-copies")
        self._pieces: list[tuple[Tensor, object]] = []
        self._turn = 0

    def copy(self, copies: Callable[[], Copies], after: object | None) -> object:
        return self._thread.submit(self._copy, copies, after)

    def mark(self) -> object:
        event = self._backend.Event()
        event.record(self._backend.current_stream(self._device))
        return event

    def wait(self, mark: object) -> None:
        event = mark.result() if isinstance(mark, Future) else mark
        self._backend.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        self._thread.submit(lambda: None).result()
        self._stream.synchronize()

    def _copy(self, copies: Callable[[], Copies], after: object | None) -> object:
        if after is not None:
            self._stream.wait_event(after)
        with self._backend.stream(self._stream):
            for source, target in copies():
                if source.is_pinned():
                    target.copy_(source, non_blocking=True)
                else:
                    self._copy_in_pieces(_bytes(source), _bytes(target))
        done = self._backend.Event()
        done.record(self._stream)
        return done

    def _copy_in_pieces(self, source: Tensor, target: Tensor) -> None:
        for part, goal in zip(source.split(PIECE), target.split(PIECE)):
            piece, free = self._next_piece()
            free.synchronize()
            piece[:len(part)].copy_(part)
            goal.copy_(piece[:len(part)], non_blocking=True)
            free.record(self._stream)

    def _next_piece(self) -> tuple[Tensor, object]:
        if len(self._pieces) < PIECES:
            self._pieces.append((torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), self._backend.Event()))
            return self._pieces[-1]
        self._turn += 1
        return self._pieces[self._turn % PIECES]


def lane_for(device: torch.device) -> Lane:
    """The lane of a device: a second stream on CUDA, ROCm and XPU, at once elsewhere."""
    return SecondStream(device) if device.type in ("cuda", "xpu") else AtOnce()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
