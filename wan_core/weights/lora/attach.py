"""Adapters on a module that is ready to run: low-rank on the activations of linear layers, whatever those store.

Nothing is merged: a layer's weights stay as they are, so adapters work on every weight format, in any number, and are
gone without a trace when they are taken off. Small tensors that are no linear layer's (norms, biases, modulation,
patches) are replaced by changed copies for the time being; the originals come back as they were.

Strengths belong to the slot of a file, not to its tensors: a new strength is a number written into a list. Compiled
code is given them as a tensor: numbers would be constants in it, and each new one would have it compiled again.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import QuantisedLinear
from .adapters import Adapter, Additive, DoRA
from .keys import Target

Slots = list[tuple[int, Adapter]]


class Strengths:
    """One number for each slot, all 0 at first: as `numbers`, and as a tensor."""

    def __init__(self, count: int) -> None:
        self.numbers = [0.0] * count
        self._tensor: Tensor | None = None

    def set(self, numbers: Sequence[float]) -> None:
        self.numbers[:] = numbers
        if self._tensor is not None:
            # Where it is: what was recorded with it sees the new ones.
            self._tensor.copy_(torch.tensor(self.numbers))

    def on(self, device: torch.device) -> Tensor:
        """The numbers as a float32 tensor on `device`, [slots]; the same one until another device is asked for."""
        if self._tensor is None or self._tensor.device != device:
            with torch.inference_mode(False):
                self._tensor = torch.tensor(self.numbers, device=device)
        return self._tensor


class Attachment:
    """Adapters on `module`: one slot for each table of `stack`. All strengths are 0 at first.

    Takes the adapters' tensors to the module's device. Keep it as long as the adapters are to stay.
    """

    def __init__(self, module: nn.Module, stack: Sequence[Mapping[Target, Adapter]]) -> None:
        self._strengths = Strengths(len(stack))
        self._layers: list[tuple[nn.Module, str, AdaptedLinear]] = []
        self._tensors: list[_ChangedTensor] = []
        targets: dict[Target, Slots] = {}
        for slot, adapters in enumerate(stack):
            for target, adapter in adapters.items():
                targets.setdefault(target, []).append((slot, adapter))
        layers = []
        for target, slots in targets.items():
            owner = module.get_submodule(target.module)
            if target.parameter == "weight" and isinstance(owner, nn.Linear | QuantisedLinear):
                layers.append((target.module, owner, slots))
            else:
                self._tensors.append(_ChangedTensor(owner, target.parameter, slots))
        # A layer's bias is changed on the layer itself, so all of them are found before any layer is wrapped.
        for path, owner, slots in layers:
            self._wrap(module, path, owner, slots)

    def set(self, strengths: Sequence[float]) -> bool:
        """Give each slot its strength; nothing is copied but the small tensors whose strength has changed.

        Returns whether there are such tensors: others have taken their place.
        """
        if list(strengths) == self._strengths.numbers:
            return False
        # The layers hold this object.
        self._strengths.set(strengths)
        for tensor in self._tensors:
            tensor.set(strengths)
        return bool(self._tensors)

    def detach(self) -> None:
        """Leave the module as it was."""
        for parent, name, layer in self._layers:
            setattr(parent, name, layer.layer)
        self.set([0.0] * len(self._strengths.numbers))

    def _wrap(self, module: nn.Module, path: str, layer: nn.Module, slots: Slots) -> None:
        parent, _, name = path.rpartition(".")
        adapted = AdaptedLinear(layer, slots, self._strengths)
        setattr(module.get_submodule(parent), name, adapted)
        self._layers.append((module.get_submodule(parent), name, adapted))


class AdaptedLinear(nn.Module):
    """Stands for `layer`, a linear layer, and adds what the adapters of the slots add at their `strengths`."""

    def __init__(self, layer: nn.Module, slots: Slots, strengths: Strengths) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._strengths = strengths
        self._held: Tensor | None = None
        device = layer.bias.device
        self._slots = [slot for slot, _ in slots]
        self._adapters = nn.ModuleList(_Tensors(adapter.to(device)) for _, adapter in slots)
        # DoRA's lengths are those of the changed weight, and need the whole of it once.
        for tensors in self._adapters:
            if isinstance(tensors.adapter, DoRA):
                tensors.register_buffer("gain", tensors.adapter.gain(self._dense()))

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    def hold(self) -> None:
        """Compute with strengths from a tensor until `release`; then those of 0 cost as much as others."""
        self._held = self._strengths.on(self.device)

    def release(self) -> None:
        """Compute with numbers again."""
        self._held = None

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """x [..., in] -> [..., out]; with `gelu` the layer's own activation comes after the adapters."""
        if self._held is not None:
            return self._with_tensor(x, self._held, gelu)
        strengths = self._strengths.numbers
        active = [(strengths[slot], tensors) for slot, tensors in zip(self._slots, self._adapters) if strengths[slot]]
        if not active:
            return self.layer(x, gelu=True) if gelu else self.layer(x)
        y = self.layer(x)
        x = x.to(y.dtype)
        total = y
        for strength, tensors in active:
            total = total + strength * self._change(tensors, x, y)
        return F.gelu(total, approximate="tanh") if gelu else total

    def _with_tensor(self, x: Tensor, strengths: Tensor, gelu: bool) -> Tensor:
        """`forward` with `strengths` [slots]. In float32, as a number would not be rounded to the type of y either."""
        y = self.layer(x)
        x = x.to(y.dtype)
        total = y
        for slot, tensors in zip(self._slots, self._adapters):
            total = (total.float() + strengths[slot] * self._change(tensors, x, y).float()).to(y.dtype)
        return F.gelu(total, approximate="tanh") if gelu else total

    def _change(self, tensors: "_Tensors", x: Tensor, y: Tensor) -> Tensor:
        adapter = tensors.adapter
        if isinstance(adapter, Additive):
            return adapter.apply(x)
        plain = y if self.bias is None else y - self.bias.to(y.dtype)
        if not isinstance(adapter, DoRA):
            return F.linear(x, adapter.value.to(x)) - plain
        gain = tensors.gain.to(x)
        if gain.shape[0] != 1:
            rows = gain.flatten()
            return (rows - 1) * plain + rows * adapter.inner.apply(x)
        turned = x * gain
        bias = 0 if self.bias is None else self.bias.to(y.dtype)
        return self.layer(turned) - bias + adapter.inner.apply(turned) - plain

    def _dense(self) -> Tensor:
        layer = self.layer
        return layer.stored.dequantise() if isinstance(layer, QuantisedLinear) else layer.weight.float()


class _Tensors(nn.Module):
    """An adapter whose tensors are buffers, so that what moves modules moves them."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        # Without numbers: those are in the buffers alone.
        self._adapter = adapter.to("meta")
        for index, tensor in enumerate(adapter.tensors):
            self.register_buffer(f"tensor{index}", tensor)

    @property
    def adapter(self) -> Adapter:
        """The adapter with its tensors where they are now."""
        # In their order; a gain comes behind them.
        tensors = iter(self._buffers.values())
        return self._adapter.map(lambda _: next(tensors))


class _ChangedTensor:
    """A parameter that is no linear layer's weight, and its adapters."""

    def __init__(self, owner: nn.Module, name: str, slots: Slots) -> None:
        self._owner, self._name = owner, name
        self._original: nn.Parameter = getattr(owner, name)
        # Norms and modulation are computed in float32; in their stored type a small change would be rounded away.
        self._dtype = self._original.dtype if isinstance(owner, nn.Linear | nn.Conv3d | QuantisedLinear) else None
        self._slots = [(slot, adapter.to(self._original.device)) for slot, adapter in slots]

    def set(self, strengths: Sequence[float]) -> None:
        """Put a changed copy, or the original, in its place."""
        active = [(strengths[slot], adapter) for slot, adapter in self._slots if strengths[slot]]
        changed = self._original.detach().float()
        for strength, adapter in active:
            changed = adapter.merged(changed, strength)
        setattr(self._owner, self._name,
                nn.Parameter(changed.to(self._dtype), requires_grad=False) if active else self._original)
