"""CLIP vision transformer: a picture to the image tokens that Wan 2.1's image-to-video models attend to.

The architecture is the Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) with CLIP's extra
norm in front (Radford et al. 2021, https://arxiv.org/abs/2103.00020) and exact GELU. Wan does not use CLIP's embedding
of the whole picture but the tokens before the last block, which still know where things are. Parameter names are those
of ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``, without its prefix ``visual.``.

Precision: matrices compute in the dtype that they are kept in; norms and the residual are float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import CLIPVisionSpec

NORM_EPS = 1e-5


class CLIPVision(nn.Module):
    """The image half of CLIP."""

    def __init__(self, spec: CLIPVisionSpec):
        """Build with freshly initialised weights (build under ``torch.device("meta")`` to load a checkpoint)."""
        super().__init__()
        self.spec = spec
        tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, spec.dim, spec.patch_size, stride=spec.patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.empty(1, 1, spec.dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, spec.dim))
        self.pre_norm = LayerNorm(spec.dim)
        self.transformer = nn.ModuleList([Block(spec) for _ in range(spec.num_layers)])
        self.post_norm = LayerNorm(spec.dim)
        self.head = nn.Parameter(torch.empty(spec.dim, spec.out_dim))
        for parameter in (self.cls_embedding, self.pos_embedding, self.head):
            nn.init.normal_(parameter, std=spec.dim ** -0.5)

    def forward(self, pixels: Tensor, on_block: Callable[[int], None] | None = None) -> Tensor:
        """Image tokens before the last block, which is not computed.

        pixels: [B, 3, image_size, image_size], standardised (see `preprocess`).
        on_block(i) is called before block i and may raise to stop early.
        Returns [B, 1 + (image_size / patch_size)^2, dim] float32: the class token, then the patches in rows, without
        final norm. Raises ValueError for pixels of another shape.
        """
        size = self.spec.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"CLIP vision: pixels have shape {list(pixels.shape)}; expected [batch, 3, {size}, "
                             f"{size}] from preprocess")
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2).float()
        x = torch.cat([self.cls_embedding.float().expand(len(pixels), -1, -1), patches], dim=1)
        x = self.pre_norm(x + self.pos_embedding.float())
        for i, block in enumerate(self.transformer[:-1]):
            if on_block is not None:
                on_block(i)
            x = block(x)
        return x

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of CLIP, from the result [B, tokens, dim] of `forward`.

        Returns the tokens after the last block [B, tokens, dim], without final norm, and the picture's embedding in
        the space that CLIP shares with text [B, out_dim], not normalised; both float32.
        """
        last = self.transformer[-1](hidden)
        return last, Linear.product(self.post_norm(last[:, 0]), self.head.T).float()


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to the residual."""

    def __init__(self, spec: CLIPVisionSpec):
        super().__init__()
        self.norm1 = LayerNorm(spec.dim)
        self.attn = Attention(spec.dim, spec.num_heads)
        self.norm2 = LayerNorm(spec.dim)
        self.mlp = nn.Sequential(Linear(spec.dim, spec.mlp_dim), nn.GELU(), Linear(spec.mlp_dim, spec.dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, dim] float32 -> the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, dim] -> [B, L, dim] in the matrices' dtype."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Linear(nn.Linear):
    """Linear layer that computes in its weight's dtype, whatever its input's."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features] in the weight's dtype."""
        return self.product(x, self.weight, self.bias)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times weight [out, in], in the weight's dtype; also for layers whose weights are quantised."""
        return F.linear(x.to(weight.dtype), weight, bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever dtype its weights are kept in."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> the same in float32."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
