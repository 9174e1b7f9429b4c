"""The image branch of Wan 2.1's image-to-video models: CLIP features as tokens of their own in cross-attention.

Queries are shared with the text; keys and values of the image have projections of their own, and both results are
added before the output projection (Wan2.1 `wan/modules/model.py`, classes WanI2VCrossAttention and MLPProj).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import TransformerSpec
from .inputs import TextTokens
from .layers import CrossAttention, LayerNorm, Linear, RMSNorm, Source


class ImageCrossAttention(CrossAttention):
    """Attention of the video tokens to the text and to the image; without image tokens, to the text alone."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, num_heads, eps)
        self.k_img = Linear(dim, dim)
        self.v_img = Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim, eps)

    def prepare(self, text: TextTokens, image: Tensor | None) -> tuple[Source, ...]:
        """Text [B, N, D] and image tokens [B, M, D], or the text alone."""
        sources = super().prepare(text, image)
        if image is None:
            return sources
        return *sources, Source(self._keys(self.k_img(image), self.norm_k_img), self._heads(self.v_img(image)))


class ImageEmbedding(nn.Module):
    """CLIP features to the transformer's width: norm, linear, GELU, linear, norm; for two images with positions."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        # The norms keep PyTorch's default epsilon, unlike those of the blocks.
        self.proj = nn.Sequential(
            LayerNorm(spec.image_dim, 1e-5), Linear(spec.image_dim, spec.image_dim), nn.GELU(),
            Linear(spec.image_dim, spec.dim), LayerNorm(spec.dim, 1e-5))
        self.emb_pos = None
        if spec.model_type == "flf2v":
            self.emb_pos = nn.Parameter(torch.zeros(1, spec.image_tokens, spec.image_dim))

    def forward(self, features: Tensor) -> Tensor:
        """features [B, N, image_dim] -> tokens [B, N, dim] in the weights' dtype.

        Raises ValueError for another width, or more tokens than there are positions.
        """
        first = self.proj[1]
        if features.ndim != 3 or features.shape[2] != first.in_features:
            raise ValueError(f"CLIP vision features have shape {list(features.shape)}; this model takes [batch, "
                             f"tokens, {first.in_features}]. Use the CLIP vision model that belongs to it.")
        features = features.to(first.device).float()
        if self.emb_pos is not None:
            count, known = features.shape[1], self.emb_pos.shape[1]
            if count > known:
                raise ValueError(f"{count} CLIP vision tokens were given; the model has positions for {known}, which "
                                 "are a start and an end image.")
            features = features + self.emb_pos[:, :count].float()
        h = F.gelu(self.proj[1](self.proj[0](features)))
        return self.proj[4](self.proj[3](h)).to(first.dtype)
