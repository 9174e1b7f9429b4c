"""The Wan video diffusion transformer.

A latent video is cut into 1x2x2 patches; blocks of self-attention, cross-attention to the text and a feed-forward
network, each modulated by the timestep, predict the flow velocity. Parameter names are those of the released
checkpoints, so a file's tensors are assigned as they are (Wan2.1 `wan/modules/model.py`, Wan2.2 the same).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import TransformerSpec
from .attention import check_backend
from .layers import (
    CrossAttention,
    Float32Linear,
    LayerNorm,
    Linear,
    SelfAttention,
    add_residual,
    modulated_norm,
)
from .rope import rope_table

# Highest position on any axis that the released models' rotary tables know.
MAX_POSITION = 1024


@dataclass(frozen=True)
class TextTokens:
    """Text as the blocks see it: embedded tokens [B, N, dim] and a bias [N] for their attention logits, or None.

    Officially a text is zero-padded to 512 tokens which all take part in attention. The padding rows are all alike, and
    n equal keys weigh as much as one key whose logit is raised by log(n): so one row stands for all of them.
    """

    tokens: Tensor
    bias: Tensor | None


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward network, the first and last scaled and gated by time."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.self_attn = SelfAttention(spec.dim, spec.num_heads, spec.eps)
        self.norm3 = LayerNorm(spec.dim, spec.eps)
        self.cross_attn = CrossAttention(spec.dim, spec.num_heads, spec.eps)
        self.ffn = nn.Sequential(Linear(spec.dim, spec.ffn_dim), nn.GELU(approximate="tanh"),
                                 Linear(spec.ffn_dim, spec.dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, spec.dim) / spec.dim ** 0.5)

    def forward(self, x: Tensor, time: Tensor, rope: Tensor, text: TextTokens, backend: str) -> Tensor:
        """x [B, L, D] float32, time [B, 6, D] float32 -> [B, L, D] float32."""
        dtype = self.ffn[0].weight.dtype
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = (self.modulation.float() + time).split(1, dim=1)
        h = modulated_norm(x, shift_sa, scale_sa, self.eps).to(dtype)
        x = add_residual(x, self.self_attn(h, rope, backend), gate_sa)
        x = add_residual(x, self.cross_attn(self.norm3(x).to(dtype), text.tokens, text.bias, backend))
        h = modulated_norm(x, shift_ffn, scale_ffn, self.eps).to(dtype)
        return add_residual(x, self.ffn[2](self.ffn[0](h, gelu=True)), gate_ffn)


class Head(nn.Module):
    """Modulated norm and projection of each token to its patch, in float32."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.head = Float32Linear(spec.dim, spec.out_dim * math.prod(spec.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, spec.dim) / spec.dim ** 0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time [B, D] -> [B, L, patch volume * out_dim]."""
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).split(1, dim=1)
        return self.head(modulated_norm(x, shift, scale, self.eps))


class WanTransformer(nn.Module):
    """Predicts the flow velocity of a noisy latent video.

    Build it on the meta device and assign weights, or call `init_weights` to train from nothing.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        if spec.model_type != "t2v":
            raise ValueError(f"this version runs text-to-video transformers; {spec.model_type!r} is not supported yet.")
        self.spec = spec
        self.patch_embedding = nn.Conv3d(spec.in_dim, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.text_embedding = nn.Sequential(Linear(spec.text_dim, spec.dim), nn.GELU(approximate="tanh"),
                                            Linear(spec.dim, spec.dim))
        self.time_embedding = nn.Sequential(Float32Linear(spec.freq_dim, spec.dim), nn.SiLU(),
                                            Float32Linear(spec.dim, spec.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(spec.dim, spec.dim * 6))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.head = Head(spec)

    def forward(self, latents: Tensor, timestep: Tensor, text: TextTokens, *, backend: str = "sdpa",
                on_block: Callable[[int], None] | None = None) -> Tensor:
        """Velocity [B, out_dim, T, H, W] (float32) of normalised `latents` [B, in_dim, T, H, W].

        `timestep` [B] is in 0..1000 (1000 * sigma). `text` comes from `prepare_text`. `on_block(i)` is called before
        block i and may raise to stop. Raises ValueError for sizes off the patch grid or an unknown backend.
        """
        check_backend(backend)
        grid = self._grid(latents)
        x = self._embed_patches(latents)
        time = self.time_embedding(sinusoidal_embedding(timestep, self.spec.freq_dim))
        block_time = self.time_projection(time).unflatten(1, (6, -1))
        rope = rope_table(grid, self.spec.dim // self.spec.num_heads, x.device)
        for index, block in enumerate(self.blocks):
            if on_block:
                on_block(index)
            x = block(x, block_time, rope, text, backend)
        return self._assemble_patches(self.head(x, time), grid)

    def prepare_text(self, context: Tensor) -> TextTokens:
        """Embed text [B, L, text_dim], zero rows at the end being padding; once per prompt, not per step.

        Rows past L count as padding up to the `text_len` of the spec. Raises ValueError for another width.
        """
        if context.ndim != 3 or context.shape[2] != self.spec.text_dim:
            raise ValueError(f"text embedding has shape {list(context.shape)}; this model takes [batch, tokens, "
                             f"{self.spec.text_dim}]. Use the text encoder that belongs to the model.")
        used = context.ne(0).any(-1).any(0).nonzero()
        length = int(used.max()) + 1 if used.numel() else 0
        padding = max(self.spec.text_len, context.shape[1]) - length
        weight = self.text_embedding[0].weight
        rows = F.pad(context[:, :length].to(weight.device, weight.dtype), (0, 0, 0, min(padding, 1)))
        bias = None
        if padding > 1:
            bias = torch.zeros(length + 1, device=rows.device)
            bias[-1] = math.log(padding)
        return TextTokens(self.text_embedding(rows), bias)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise for training from nothing: Xavier matrices, normal embeddings, a head that predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for layer in (embedding[0], embedding[2]):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        if latents.ndim != 5 or latents.shape[1] != self.spec.in_dim:
            raise ValueError(f"latents have shape {list(latents.shape)}; this model takes [batch, {self.spec.in_dim}, "
                             "frames, height, width].")
        sizes = latents.shape[2:]
        if any(size % patch for size, patch in zip(sizes, self.spec.patch_size)):
            raise ValueError(f"latents are {sizes[2]}x{sizes[1]}; width and height must be even "
                             "(the video's sizes multiples of 16 pixels).")
        grid = tuple(size // patch for size, patch in zip(sizes, self.spec.patch_size))
        if max(grid) > MAX_POSITION or 0 in grid:
            raise ValueError(f"a grid of {grid[0]}x{grid[1]}x{grid[2]} tokens (time, height, width); the model knows "
                             f"1 to {MAX_POSITION} positions on each axis.")
        return grid

    def _embed_patches(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> float32 tokens [B, L, dim]. A convolution that steps by its own size is a linear layer."""
        weight = self.patch_embedding.weight
        t, h, w = self.spec.patch_size
        patches = latents.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B C F t H h W w
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias).float()

    def _assemble_patches(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, t * h * w * C] with the channel innermost -> [B, C, T, H, W]."""
        patches = tokens.unflatten(2, (*self.spec.patch_size, self.spec.out_dim)).unflatten(1, grid)  # B F H W t h w C
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[B] -> [B, dim]: cosines, then sines, of timestep * 10000^(-i / (dim / 2)), in float64, returned as float32."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = torch.outer(timestep.double(), frequencies)
    return torch.cat([angles.cos(), angles.sin()], -1).float()
