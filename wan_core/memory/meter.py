"""Counts the memory that tensors take while something runs, for real tensors or for ones without data.

Every storage is counted from the operation that makes it to the moment it is freed, so the peak is exact but for what
an operation allocates for itself while it runs. With tensors on the meta device nothing is computed, and a full-size
step is measured in a fraction of a second on any machine: that is how peaks are predicted.
Reference: PyTorch's `torch.utils._python_dispatch`; the same idea in its `torch.distributed._tools.mem_tracker`.
"""

import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Bytes in storages that were made on devices of one type since the meter was entered: `now` and at the `peak`."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device_type = device_type
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: object, types: Sequence[type], arguments: tuple = (),
                           options: Mapping[str, object] | None = None) -> object:
        for tensor in tree_leaves((arguments, options)):
            # What was there before is not counted, nor are views of it.
            self._see(tensor, 0)
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            self._see(tensor, 1)
        return result

    def _see(self, tensor: object, counts: int) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes() * counts

        def freed(_reference: weakref.ref) -> None:
            del self._known[key]
            self.now -= nbytes

        self._known[key] = weakref.ref(storage, freed)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class FusedAttention(TorchFunctionMode):
    """Attention of tensors without data takes the memory of a fused kernel: its output and one number a query.

    On the meta device PyTorch would take its reference implementation, which holds the whole matrix of logits.
    """

    def __torch_function__(self, function: object, types: Sequence[type], arguments: tuple = (),
                           options: Mapping[str, object] | None = None) -> object:
        if function is not F.scaled_dot_product_attention or not arguments[0].is_meta:
            return function(*arguments, **(options or {}))
        q, _, v = arguments[:3]
        torch.empty(q.shape[:3], device=q.device)
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
