"""The mathematics of adapters: what each kind changes in a weight, and the same change made to activations.

One frozen record per changed tensor. Its factors are as in the file (views of it, until `to` moves them); `scale` holds
alpha and rank already, and the user's strength is given to whoever applies it, so that changing it touches no tensor.

LoRA: Hu et al. 2021, arXiv 2106.09685. LoHa: Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098. LoKr: Yeh et al. 2023
(LyCORIS), arXiv 2309.14859. DoRA: Liu et al. 2024, arXiv 2402.09353.

Weights of convolutions, which here have their stride as kernel and therefore are matrices on patches, are treated as
matrices [out, in * kernel] throughout: an adapter's `shape` is that, and `apply` takes flattened patches.
"""
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Adapter(ABC):
    """A change of one tensor."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that this is for; of a weight given by factors the matrix [out, in * kernel]."""

    @abstractmethod
    def merged(self, base: Tensor, strength: float) -> Tensor:
        """The changed tensor, shape and type of `base`, which is left alone; computed in float32 or wider.

        Strength 0 gives the numbers of `base`, 1 the trained change; between and beyond, the change is in proportion.
        Raises ValueError where `base` has another size.
        """

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Adapter":
        """The same adapter with its tensors on another device or in another floating-point type."""
        return self.map(lambda tensor: tensor.to(device=device, dtype=dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order in which `map` visits them."""
        found = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> "Adapter":
        """The same adapter with `change` of its tensors, which are visited in a fixed order."""
        def changed(value: object) -> object:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Adapter):
                return value.map(change)
            return tuple(changed(item) for item in value) if isinstance(value, tuple) else value

        return dataclasses.replace(
            self, **{field.name: changed(getattr(self, field.name)) for field in dataclasses.fields(self)})


class Additive(Adapter):
    """An adapter that adds the same to a tensor whatever that holds; so it can be applied to activations alone."""

    @abstractmethod
    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """What is added at strength 1, as a tensor of `shape`, computed in `dtype`.

        Raises ValueError where `shape` has another size than the adapter.
        """

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """What a linear layer with this change of its weight adds to its output at strength 1.

        x [..., in] -> [..., out], in x's type and on its device. The weight's delta is not built where factors can be
        multiplied one after the other.
        """

    def merged(self, base: Tensor, strength: float) -> Tensor:
        wide = _wide(base)
        delta = self.delta(tuple(base.shape), wide.dtype).to(base.device)
        return (wide + strength * delta).to(base.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """LoRA: up · down · scale.

    `down` [rank, in, ...], `up` [out, rank, ...] (a convolution's may keep its kernel's axes). `mid` [rank of up, rank
    of down, kernel ...] is the core of a Tucker decomposition, with which `down` has no kernel.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        kernel = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return self.up.shape[0], math.prod(self.down.shape[1:]) * kernel

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        _check_size(self, shape)
        return (self.up.to(dtype).flatten(1) @ self._inner(dtype, self.up.device) * self.scale).view(shape)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self._inner(x.dtype, x.device)), self.up.to(x).flatten(1)) * self.scale

    def _inner(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        down = self.down.to(device, dtype).flatten(1)
        if self.mid is None:
            return down
        return torch.einsum("mn...,ni->mi...", self.mid.to(device, dtype), down).flatten(1)


@dataclass(frozen=True, eq=False)
class LoKr(Additive):
    """LyCORIS' Kronecker product: left ⊗ right · scale.

    `left` [a, b] and `right` [c, d, ...] are each one tensor or the two that it is the product of, [a, r] and [r, b];
    the change is [a * c, b * d]. With `core` [i, j, kernel ...] `right` is a Tucker decomposition, [i, c] and [j, d].
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    core: Tensor | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        first, last = self.right[0], self.right[-1]
        rows = first.shape[0] if self.core is None else first.shape[1]
        columns = math.prod(last.shape[1:]) * (1 if self.core is None else math.prod(self.core.shape[2:]))
        return self.left[0].shape[0] * rows, self.left[-1].shape[1] * columns

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        _check_size(self, shape)
        device = self.left[0].device
        right = _product(self._right(dtype, device))
        return (torch.kron(_product(_cast(self.left, dtype, device)), right) * self.scale).view(shape)

    def apply(self, x: Tensor) -> Tensor:
        # (left ⊗ right) x, with x as a matrix X [b, d], is left · X · rightᵀ.
        left = _product(_cast(self.left, x.dtype, x.device))
        x = x.unflatten(-1, (left.shape[1], -1))
        for factor in reversed(self._right(x.dtype, x.device)):
            x = F.linear(x, factor)
        return (left @ x).flatten(-2) * self.scale

    def _right(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        if self.core is None:
            return _cast(self.right, dtype, device)
        return (_tucker(self.core, *self.right, dtype, device),)


@dataclass(frozen=True, eq=False)
class LoHa(Additive):
    """LyCORIS' Hadamard product: (first_a · first_b) ∘ (second_a · second_b) · scale.

    Each pair is [out, rank] and [rank, in, ...]; with a core [i, j, kernel ...] it is a Tucker decomposition,
    [i, out] and [j, in].
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self.first
        if self.cores is None:
            return a.shape[0], math.prod(b.shape[1:])
        return a.shape[1], math.prod(b.shape[1:]) * math.prod(self.cores[0].shape[2:])

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        _check_size(self, shape)
        return self._matrix(dtype, self.first[0].device).view(shape)

    def apply(self, x: Tensor) -> Tensor:
        rank = self.first[1].shape[0] * self.second[1].shape[0]
        if self.cores is not None or rank * sum(self.shape) >= math.prod(self.shape):
            return F.linear(x, self._matrix(x.dtype, x.device))
        # A Hadamard product of two products is one product of the rank r² (Khatri-Rao): its factors hold every
        # column of one times every column of the other.
        (a1, b1), (a2, b2) = (_cast(pair, x.dtype, x.device) for pair in (self.first, self.second))
        down = (b1[:, None] * b2[None]).flatten(0, 1)
        up = (a1[:, :, None] * a2[:, None]).flatten(1)
        return F.linear(F.linear(x, down), up) * self.scale

    def _matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.cores is None:
            first, second = (_product(_cast(pair, dtype, device)) for pair in (self.first, self.second))
        else:
            first, second = (_tucker(core, *pair, dtype, device)
                             for core, pair in zip(self.cores, (self.first, self.second), strict=True))
        return first * second * self.scale


@dataclass(frozen=True, eq=False)
class Delta(Additive):
    """The change itself, of a weight, a bias or a modulation: value · scale."""

    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        _check_size(self, shape)
        return (self.value.to(dtype) * self.scale).reshape(shape)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value.to(x).flatten(1)) * self.scale


@dataclass(frozen=True, eq=False)
class DoRA(Adapter):
    """A change of direction (`inner`) with a learned length: magnitude · (W + ΔW) / ‖W + ΔW‖.

    The length is that of each row of the weight or of each column; `magnitude` has one number for each, as [out],
    [out, 1, ...] or [1, in, ...]. Needs the weight that it changes: a layer that applies adapters to activations asks
    for `gain` once and then multiplies, with rows, y <- y + strength * ((gain - 1) * Wx + gain * inner.apply(x)).
    """

    inner: Additive
    magnitude: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def axis(self, shape: tuple[int, ...]) -> int:
        """0 where the magnitudes belong to the rows of a weight of `shape` [out, in, ...], 1 where to the columns.

        Raises ValueError where they fit neither.
        """
        count, own = self.magnitude.numel(), tuple(self.magnitude.shape)
        if own[:1] == shape[:1] and count == shape[0]:
            return 0
        # PEFT writes the rows of a convolution as [1, out, 1, ...]; where both fit, columns are meant.
        for axis in (1, 0):
            if own[:1] == (1,) and len(shape) > axis and count == shape[axis]:
                return axis
        raise ValueError(f"DoRA magnitudes of shape {list(own)} fit neither the rows nor the columns of a weight of "
                         f"shape {list(shape)}")

    def gain(self, base: Tensor) -> Tensor:
        """By what the rows or columns of W + ΔW are multiplied, [out, 1, ...] or [1, in, ...]; float32 or wider."""
        return self._gain(self._turned(base), tuple(base.shape))

    def merged(self, base: Tensor, strength: float) -> Tensor:
        wide, turned = _wide(base), self._turned(base)
        return (wide + strength * (turned * self._gain(turned, tuple(base.shape)) - wide)).to(base.dtype)

    def _turned(self, base: Tensor) -> Tensor:
        return self.inner.merged(_wide(base), 1.0)

    def _gain(self, turned: Tensor, shape: tuple[int, ...]) -> Tensor:
        kept = self.axis(shape)
        norm = torch.linalg.vector_norm(turned, dim=[d for d in range(len(shape)) if d != kept], keepdim=True)
        # Rows of zeros stay zeros.
        return self.magnitude.to(turned).reshape(norm.shape) / norm.clamp_min(torch.finfo(torch.float32).eps)


@dataclass(frozen=True, eq=False)
class Replacement(Adapter):
    """A tensor that takes the place of the model's, in proportion to the strength. Needs the one that it replaces."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def merged(self, base: Tensor, strength: float) -> Tensor:
        _check_size(self, tuple(base.shape))
        wide = _wide(base)
        return (wide + strength * (self.value.to(wide).reshape(wide.shape) - wide)).to(base.dtype)


def fits(adapter: Adapter, shape: tuple[int, ...]) -> bool:
    """Whether an adapter is for a tensor of `shape`; axes of length 1 and a flattened kernel make no difference."""
    own = adapter.shape
    return _as_matrix(own) == _as_matrix(shape) or [n for n in own if n != 1] == [n for n in shape if n != 1]


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _check_size(adapter: Adapter, shape: tuple[int, ...]) -> None:
    if not fits(adapter, tuple(shape)):
        raise ValueError(f"an adapter for a tensor of shape {list(adapter.shape)} cannot change one of shape "
                         f"{list(shape)}; match it with the model first")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _cast(factors: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(factor.to(device, dtype).flatten(1) for factor in factors)


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    return factors[0] @ factors[1] if len(factors) == 2 else factors[0]


def _tucker(core: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    core, a, b = core.to(device, dtype), a.to(device, dtype).flatten(1), b.to(device, dtype).flatten(1)
    return torch.einsum("ij...,ip,jq->pq...", core, a, b).flatten(1)
