"""Linear layers and embeddings over weights that stay as they are stored.

They take the place of a model's own layers when a file with quantised weights is loaded: the numbers of one weight are
made when its layer runs and forgotten after it, so a model needs little more memory than its file. What is done with
the numbers is the replaced layer's own `product`, so each room's rules of precision hold for every format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fp8 import can_multiply, fp8_product, scales_by_row
from .quantised import Quantised


class QuantisedLinear(nn.Module):
    """Stands for `layer`, a linear layer with a function `product(x, weight, bias, **options)`.

    The weight is made in `dtype`. The bias is the layer's own. With `fp8_products` a weight that `fp8.can_multiply`
    takes is not made at all: the product is one of FP8 numbers, and not exactly that of the layer it stands for.
    """

    def __init__(self, layer: nn.Linear, weight: Quantised, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.product = layer.product
        self.bias = layer.bias
        self.dtype = dtype
        self.fp8_products = False
        self._stored = _Stored(weight)
        self._made: Tensor | None = None
        self._by_row: bool | None = None

    @property
    def device(self) -> torch.device:
        return self._stored.device

    @property
    def stored(self) -> Quantised:
        """The weight as it is kept."""
        return self._stored.weight

    def hold(self) -> None:
        """Make the numbers of the weight, or find out how it is multiplied, and keep that until `release`.

        For compiled code, which takes it as it is: kernels that make numbers are compiled already, and there are types
        of codes that PyTorch's compiler cannot read on older cards.
        """
        weight = self._stored.weight
        if self.fp8_products and can_multiply(weight):
            self._by_row = scales_by_row(self.device, self.dtype)
        else:
            self._made = weight.dequantise(self.dtype)

    def release(self) -> None:
        """Forget what `hold` found: the layer may move to another device."""
        self._made = self._by_row = None

    def forward(self, x: Tensor, **options: object) -> Tensor:
        """x [..., in] -> [..., out]; `options` are those of the layer that this one stands for."""
        if self._made is not None:
            return self.product(x, self._made, self.bias, **options)
        weight = self._stored.weight
        if not self.fp8_products or not can_multiply(weight):
            return self.product(x, weight.dequantise(self.dtype), self.bias, **options)
        y = fp8_product(x.to(self.dtype), weight, self.bias, self.dtype, self._by_row)
        if not options.get("gelu"):
            return y
        return F.gelu(y, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(y, approximate="tanh")


class QuantisedEmbedding(nn.Module):
    """Rows of a quantised table; only those that are asked for are ever made. `dtype` is that of the result."""

    def __init__(self, weight: Quantised, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._stored = _Stored(weight)

    @property
    def weight(self) -> Quantised:
        """The table as it is kept."""
        return self._stored.weight

    def forward(self, index: Tensor) -> Tensor:
        """index [...], on the table's device -> [..., columns]."""
        return self.weight.rows(index, self.dtype)


class _Stored(nn.Module):
    """A quantised weight whose parts are buffers, so that what moves modules moves them."""

    def __init__(self, weight: Quantised) -> None:
        super().__init__()
        self._scheme, self._shape = weight.scheme, weight.shape
        for name, part in weight.parts.items():
            self.register_buffer(name, part)

    @property
    def weight(self) -> Quantised:
        return Quantised(self._scheme, self._shape, dict(self._buffers))

    @property
    def device(self) -> torch.device:
        return next(iter(self._buffers.values())).device


def use_fp8_products(module: nn.Module, on: bool) -> None:
    """Switch the quantised layers of `module` to products in FP8, or back."""
    for layer in module.modules():
        if isinstance(layer, QuantisedLinear):
            layer.fp8_products = on
