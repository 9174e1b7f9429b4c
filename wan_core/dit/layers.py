"""Layers of the Wan transformer that keep to float32 where the official code does, whatever the weights' dtype.

The residual stream, norms, modulation, time path and head are float32 islands; matrix products and attention run in
the dtype of the weights (Wan2.1 `wan/modules/model.py`, the autocast regions).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .fused import joins_gelu, rms_heads
from .inputs import TextTokens
from .nag import NormalisedAttention
from .rope import rotate, rotate_pairs

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

        On a CPU in bfloat16 bias and GELU are fused into oneDNN's matrix product, which spares two passes; on a CUDA
        device into cuBLAS's, where that has this form of GELU.
        """
        x = x.to(weight.dtype)
        fusible = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        # PyTorch's compiler takes this operation with constant weights only, and fuses by itself.
        if fusible and _FUSED_LINEAR and not torch.compiler.is_compiling():
            return _FUSED_LINEAR(x, weight, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))
        if gelu and joins_gelu(x, bias):
            return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).view(*x.shape[:-1], -1)
        y = F.linear(x, weight, bias)
        return gelu_of(y) if gelu else y


def gelu_of(y: Tensor) -> Tensor:
    """GELU (tanh form) of y; in place unless gradients are recorded."""
    if torch.is_grad_enabled():
        return F.gelu(y, approximate="tanh")
    return torch.ops.aten.gelu_(y, approximate="tanh")


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
    """Keys and values [B, N, heads, head_dim] that all video tokens attend to, and a bias [N] of the logits or None;
    if attention to them is guided, the source to guide it away from, and how."""

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    away: "Source | None" = None
    how: NormalisedAttention | None = None

    def attended(self, q: Tensor, backend: str) -> Tensor:
        """Attention [B, L, D] of queries [B, L, heads, head_dim]."""
        out = attention(q, self.k, self.v, bias=self.bias, backend=backend)
        return out if self.how is None else self.how.guided(out, self.away.attended(q, backend))


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
        q = self._rotated(self.q(x), self.norm_q, rope, x.dtype)
        k = self._rotated(self.k(x), self.norm_k, rope, x.dtype)
        return q, k, self._heads(self.v(x))

    def _rotated(self, x: Tensor, norm: RMSNorm, rope: Tensor, dtype: torch.dtype) -> Tensor:
        """Normed and rotated queries or keys by heads, maybe in the memory of x [B, L, D]."""
        fused = rms_heads(x, norm.weight, norm.eps, self.num_heads, dtype, rope)
        if fused is not None:
            return fused
        numbers, scale = norm.parts(x)
        del x
        if not rope.is_complex():
            return rotate_pairs(self._heads(numbers * scale), rope).to(dtype)
        return rotate(self._heads(numbers), rope * scale.unsqueeze(-1)).to(dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class CrossAttention(SelfAttention):
    """Attention of the video tokens to the text tokens; no rotation."""

    def prepare(self, text: TextTokens, image: Tensor | None) -> tuple[Source, ...]:
        """What the video tokens attend to; `image` is None: this attention has no layers for it."""
        source = Source(self._keys(self.k(text.tokens), self.norm_k), self._heads(self.v(text.tokens)), text.bias)
        if text.away is None:
            return (source,)
        away, = CrossAttention.prepare(self, text.away.text, None)
        return (source._replace(away=away, how=text.away.how),)

    def query(self, x: Tensor) -> Tensor:
        """Normed queries [B, L, heads, head_dim] of x [B, L, D]."""
        return self._keys(self.q(x), self.norm_q).to(x.dtype)

    def attend(self, q: Tensor, sources: tuple[Source, ...], backend: str) -> Tensor:
        """Attention of `query`'s result to each of the sources, added up, before its output projection: [B, L, D]."""
        first, *others = (source.attended(q, backend) for source in sources)
        return sum(others, first)

    def _keys(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Normed queries or keys by heads, in the type of x [B, N, D] and maybe in its memory."""
        fused = rms_heads(x, norm.weight, norm.eps, self.num_heads, x.dtype)
        if fused is not None:
            return fused
        numbers, scale = norm.parts(x)
        return self._heads(numbers * scale if torch.is_grad_enabled() else numbers.mul_(scale)).to(x.dtype)
