"""UMT5 encoder: token ids to the text embeddings that Wan's cross-attention reads.

The architecture is T5 v1.1 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", https://arxiv.org/abs/1910.10683) with UMT5's one change: every layer owns a relative position bias
(Chung et al. 2023, "UniMax", https://arxiv.org/abs/2304.09151). Parameter names are those of the released
``models_t5_umt5-xxl-enc-bf16.pth``.

Precision: weights may be stored in any floating dtype; activations are float32 and each weight is cast where it is
used. T5 leaves attention scores unscaled, so bfloat16 activations shift the softmax by some percent, and in float16
its feed-forward overflows. A prompt is encoded once per video, so exact arithmetic is affordable here.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import TextEncoderSpec

NORM_EPS = 1e-6
HIDDEN_SCORE = -1e9


class UMT5Encoder(nn.Module):
    """The encoder half of UMT5, without language-model head."""

    def __init__(self, spec: TextEncoderSpec):
        """Build with freshly initialised weights (build under ``torch.device("meta")`` to load a checkpoint).

        Raises ValueError if the attention width is not a multiple of the head count or the buckets are too few.
        """
        if spec.dim_attn % spec.num_heads:
            raise ValueError(f"UMT5: dim_attn {spec.dim_attn} is not a multiple of num_heads {spec.num_heads}; "
                             "choose a head count that divides it")
        if spec.num_buckets < 4 or spec.num_buckets % 2 or spec.max_distance <= spec.num_buckets // 4:
            raise ValueError(f"UMT5: num_buckets {spec.num_buckets} with max_distance {spec.max_distance}: expected an "
                             "even number of at least 4 buckets and max_distance above a quarter of it")
        super().__init__()
        self.spec = spec
        self.token_embedding = nn.Embedding(spec.vocab_size, spec.dim)
        if spec.shared_pos:
            self.pos_embedding = RelativePositionBias(spec)
        self.blocks = nn.ModuleList([Block(spec) for _ in range(spec.num_layers)])
        self.norm = RMSNorm(spec.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initialisation: each weight's deviation makes its output keep unit scale without attention scaling."""
        spec = self.spec
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, RelativePositionBias):
                nn.init.normal_(module.embedding.weight, std=(2 * spec.num_buckets * spec.num_heads) ** -0.5)
            elif isinstance(module, Attention):
                # The head width's square root, which attention does not divide by, is folded into the query.
                nn.init.normal_(module.q.weight, std=(spec.dim * spec.dim_attn / spec.num_heads) ** -0.5)
                nn.init.normal_(module.k.weight, std=spec.dim ** -0.5)
                nn.init.normal_(module.v.weight, std=spec.dim ** -0.5)
                nn.init.normal_(module.o.weight, std=spec.dim_attn ** -0.5)
            elif isinstance(module, GatedFeedForward):
                nn.init.normal_(module.gate[0].weight, std=spec.dim ** -0.5)
                nn.init.normal_(module.fc1.weight, std=spec.dim ** -0.5)
                nn.init.normal_(module.fc2.weight, std=spec.dim_ffn ** -0.5)

    def forward(self, ids: Tensor, mask: Tensor, on_block: Callable[[int], None] | None = None) -> Tensor:
        """Encode token ids.

        ids: [B, L] int64 in 0..vocab_size-1. mask: [B, L], non-zero where a token is real; masked tokens are invisible
        to the others, but their own rows hold meaningless values and are for the caller to zero.
        on_block(i) is called before block i and may raise to stop early.
        Returns [B, L, dim] float32. Raises ValueError on mismatched or out-of-range input.
        """
        self._check(ids, mask)
        length = ids.shape[1]
        # The table of pieces, of which a few rows are read, may be on the host.
        x = self.token_embedding(ids.to(self.token_embedding.weight.device)).to(self.device).float()
        visible = mask.to(x.device).bool()
        visible = None if bool(visible.all()) else visible[:, None, None, :]
        buckets = relative_buckets(length, self.spec.num_buckets, self.spec.max_distance).to(x.device)
        shared = additive_bias(self.pos_embedding(buckets), visible) if self.spec.shared_pos else None
        for i, block in enumerate(self.blocks):
            if on_block is not None:
                on_block(i)
            x = block(x, shared, buckets, visible)
        return self.norm(x)

    @property
    def device(self) -> torch.device:
        """What the encoder computes on."""
        return self.norm.weight.device

    def _check(self, ids: Tensor, mask: Tensor) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ValueError(f"UMT5: token ids are {ids.dtype} of shape {tuple(ids.shape)}; expected non-empty int64 "
                             "[batch, length]")
        if mask.shape != ids.shape:
            raise ValueError(f"UMT5: mask has shape {tuple(mask.shape)}, expected that of the ids, {tuple(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(f"UMT5: token ids span {low}..{high}, expected 0..{self.spec.vocab_size - 1}; the "
                             "tokenizer does not belong to this text encoder")


class Block(nn.Module):
    """Pre-norm self-attention and gated feed-forward, each added to the residual."""

    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        self.norm1 = RMSNorm(spec.dim)
        self.attn = Attention(spec)
        self.norm2 = RMSNorm(spec.dim)
        self.ffn = GatedFeedForward(spec)
        if not spec.shared_pos:
            self.pos_embedding = RelativePositionBias(spec)

    def forward(self, x: Tensor, bias: Tensor | None, buckets: Tensor, visible: Tensor | None) -> Tensor:
        """x: [B, L, dim] -> [B, L, dim].

        bias: additive attention bias [1 or B, heads, L, L] that all blocks share, or None: this block's own, of the
        `buckets` of distances and the `visible` keys (see `additive_bias`).
        """
        if bias is None:
            bias = additive_bias(self.pos_embedding(buckets), visible)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention with an additive bias and no scaling of the scores."""

    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        self.num_heads = spec.num_heads
        self.q = Linear(spec.dim, spec.dim_attn)
        self.k = Linear(spec.dim, spec.dim_attn)
        self.v = Linear(spec.dim, spec.dim_attn)
        self.o = Linear(spec.dim_attn, spec.dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: [B, L, dim] -> [B, L, dim]; bias: [1 or B, heads, L, L]."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = bias.to(q.dtype).expand(x.shape[0], -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """GELU-gated feed-forward (Shazeer 2020, "GLU Variants Improve Transformer"), GELU in its tanh form."""

    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        self.gate = nn.Sequential(Linear(spec.dim, spec.dim_ffn), nn.GELU(approximate="tanh"))
        self.fc1 = Linear(spec.dim, spec.dim_ffn)
        self.fc2 = Linear(spec.dim_ffn, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, dim] -> [B, L, dim]."""
        return self.fc2(self.gate(x) * self.fc1(x))


class Linear(nn.Linear):
    """Linear layer without bias that computes in its input's dtype, whatever dtype its weight is stored in."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features] in x's dtype."""
        return self.product(x, self.weight, None)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        """x [..., in] times weight [out, in]; also the arithmetic of layers whose weights are quantised."""
        return F.linear(x, weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] float32 -> same shape, float32."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * self.weight.float()


class RelativePositionBias(nn.Module):
    """One learnt score per head and bucket of relative distance."""

    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        self.embedding = nn.Embedding(spec.num_buckets, spec.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """buckets: [2L-1] of the distances -(L-1)..L-1 -> bias [heads, L, L] for (query, key).

        The bias depends on key - query alone, so a row is a window of one strip of 2L-1 scores; the window moves
        left as the query moves right. This is far less work than looking up L*L buckets.
        """
        strip = self.embedding(buckets).T
        return strip.unfold(1, (buckets.shape[0] + 1) // 2, 1).flip(1)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of every distance key - query from -(length-1) to length-1: [2*length-1] int64, on the CPU.

    T5's bidirectional rule (Raffel et al. 2020, section 2.1): half of the buckets for each direction; in each half, one
    bucket per distance up to half of them, then logarithmically wider ones up to max_distance, beyond which all
    distances share the last. Always computed on the CPU in float32: some distances lie exactly on a boundary, and a
    device's own logarithm could move them to the other side.
    """
    distance = torch.arange(1 - length, length, device="cpu")
    half = num_buckets // 2
    exact = half // 2
    reach = distance.abs()
    ratio = torch.log(reach.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(reach < exact, reach, wide) + half * (distance > 0)


def additive_bias(bias: Tensor, visible: Tensor | None) -> Tensor:
    """Join position bias [heads, L, L] and key visibility [B, 1, 1, L] (None: all) to float32 [1 or B, heads, L, L].

    Hidden keys get a large finite score in place of -inf, so that a row without any visible key gives an average
    and not NaN.
    """
    bias = bias.float()[None]
    return bias if visible is None else torch.where(visible, bias, HIDDEN_SCORE)
