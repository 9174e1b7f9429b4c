"""Layers of the Wan transformer that keep to float32 where the official code does, whatever the weights' dtype.

The residual stream, norms, modulation, time path and head are float32 islands; matrix products and attention run in
the dtype of the weights (Wan2.1 `wan/modules/model.py`, the autocast regions).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .inputs import TextTokens
from .rope import rotate

# What PyTorch's own compiler calls for a linear layer and its activation; absent in builds without oneDNN.
_FUSED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Float32Linear(nn.Linear):
    """A linear layer computed in float32, whatever its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class Linear(nn.Linear):
    """A linear layer computed in the dtype of its weights, if wanted with a GELU (tanh form) behind it."""

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in, and what its output is."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return self.product(x, self.weight, self.bias, gelu=gelu)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
        """x [..., in] times weight [out, in] plus bias; also the arithmetic of layers whose weights are quantised.

        On a CPU in bfloat16 bias and GELU are fused into oneDNN's matrix product, which spares two passes.
        """
        x = x.to(weight.dtype)
        fusible = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        if fusible and _FUSED_LINEAR:
            return _FUSED_LINEAR(x, weight, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension D of x [B, L, D], in float32.

    `parts` gives the two factors apart, x * weight [B, L, D] and the scale of each row [B, L, 1]: whoever multiplies
    the result by something of its own anyway can save a pass over x.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * self.weight.float(), torch.rsqrt(norm.square() / x.shape[-1] + self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm with weights of its own, in float32 in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift for x [B, L, D] and shift, scale [B, 1, D]; float32.

    For a single sample the modulation is the norm's own affine map, so one fused pass does all of it.
    """
    if x.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def add_residual(x: Tensor, update: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate * update in float32; in place unless gradients are recorded."""
    if torch.is_grad_enabled():
        return x + (update if gate is None else update * gate)
    return x.add_(update) if gate is None else x.addcmul_(update.to(x.dtype), gate)


class Source(NamedTuple):
    """Keys and values [B, N, heads, head_dim] that all video tokens attend to, and a bias [N] of the logits or None."""

    k: Tensor
    v: Tensor
    bias: Tensor | None = None


class SelfAttention(nn.Module):
    """Attention of all video tokens to each other, with RMS-normalised, rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, heads, head_dim] of x [B, L, D] at positions rope [L, 1, head_dim / 2]."""
        q = self._rotated(*self.norm_q.parts(self.q(x)), rope).to(x.dtype)
        k = self._rotated(*self.norm_k.parts(self.k(x)), rope).to(x.dtype)
        return q, k, self._heads(self.v(x))

    def _rotated(self, x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
        return rotate(self._heads(x), rope * scale.unsqueeze(-1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class CrossAttention(SelfAttention):
    """Attention of the video tokens to the text tokens; no rotation."""

    def prepare(self, text: TextTokens, image: Tensor | None) -> tuple[Source, ...]:
        """What the video tokens attend to; `image` is None: this attention has no layers for it."""
        return (Source(self._keys(self.k(text.tokens), self.norm_k), self._heads(self.v(text.tokens)), text.bias),)

    def forward(self, x: Tensor, sources: tuple[Source, ...], backend: str) -> Tensor:
        """x [B, L, D] -> [B, L, D]: attention to each of the sources, added up."""
        q = self._keys(self.q(x), self.norm_q).to(x.dtype)
        first, *others = (attention(q, source.k, source.v, bias=source.bias, backend=backend) for source in sources)
        return self.o(sum(others, first))

    def _keys(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Normed queries or keys by heads, in the type of x [B, N, D]."""
        numbers, scale = norm.parts(x)
        return self._heads(numbers * scale if torch.is_grad_enabled() else numbers.mul_(scale)).to(x.dtype)
