"""The Wan video diffusion transformer.

A latent video is cut into 1x2x2 patches; blocks of self-attention, cross-attention to the text and a feed-forward
network, each modulated by the timestep, predict the flow velocity. Parameter names are those of the released
checkpoints, so a file's tensors are assigned as they are (Wan2.1 `wan/modules/model.py`, Wan2.2 the same).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..presets import TransformerSpec
from .attention import BlockPattern, Radial, attention, check_backend, sparse_attention
from .compiled import Compiled, Piece, Run, at_once
from .image import ImageCrossAttention, ImageEmbedding
from .inputs import ModelInputs, TextTokens
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
from .stream import add_and_modulate, add_gated, add_gated_and_norm, modulated
from .time import TimeRows, sinusoidal_embedding, time_rows

# Highest position on any axis that the released models' rotary tables know.
MAX_POSITION = 1024


# What this class runs; branches with blocks of their own are subclasses.
MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")


OnChunk = Callable[[Tensor, TimeRows, int], Tensor]


@dataclass(frozen=True, eq=False)
class Shared:
    """What all blocks of a call are given: time [B, 6, D] for each run of tokens, rope, text and image tokens.

    `chunk` is how many tokens are worked on at a time where they do not need each other, None for all: less memory for
    the same result, but for the rounding of matrix products of another size. It counts only without gradients.
    """

    time: TimeRows
    rope: Tensor
    text: TextTokens
    image: Tensor | None
    backend: str
    chunk: int | None = None
    run: Run = at_once
    pattern: BlockPattern | None = None
    dense_blocks: int = 0

    def at(self, index: int) -> "Shared":
        """What block `index` is given: the first `dense_blocks` know of no `pattern`."""
        return replace(self, pattern=None) if self.pattern and index < self.dense_blocks else self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of q, k, v [B, L, heads, head_dim] -> [B, L, D]; with a `pattern`, of what that keeps."""
        if self.pattern is None:
            return attention(q, k, v, backend=self.backend)
        return sparse_attention(q, k, v, self.pattern, self.backend)

    def each_chunk(self, function: OnChunk, x: Tensor, time: TimeRows) -> list[Tensor]:
        """function(tokens, their runs, where they begin) of x [B, L, D], chunk by chunk.

        Compiled code takes one run at a time, so that neither their number nor their lengths are part of it.
        """
        length = x.shape[1]
        starts = set(range(0, length, self.chunk or length))
        if self.run is not at_once:
            starts.update(accumulate(time.lengths[:-1]))
        if len(starts) == 1 or torch.is_grad_enabled():
            return [function(x, time, 0)]
        return [function(x[:, start:stop], time.part(start, stop), start)
                for start, stop in pairwise((*sorted(starts), length))]

    def in_chunks(self, function: OnChunk, x: Tensor, time: TimeRows) -> Tensor:
        """`each_chunk` of a function that, without gradients, changes its tokens in place."""
        results = self.each_chunk(function, x, time)
        return results[0] if len(results) == 1 else x


class Shortcut(Protocol):
    """A way around the blocks of one call: what they added to the tokens of an earlier one."""

    def reused(self) -> Tensor | None:
        """What is added [B, L, D] in place of running the blocks; None to run them."""

    def keep(self, added: Callable[[], Tensor]) -> None:
        """Offers what the blocks have added, [B, L, D] in the type that they compute in; nothing is computed before it
        is called, and it can be called now only."""


class SideBranch(Protocol):
    """Something that runs beside the blocks of one call and adds to their tokens."""

    def after_block(self, index: int, x: Tensor) -> Tensor:
        """Tokens x [B, L, D] behind block `index`, with what this branch adds there."""


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward network, the first and last scaled and gated by time."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.self_attn = SelfAttention(spec.dim, spec.num_heads, spec.eps)
        self.norm3 = LayerNorm(spec.dim, spec.eps)
        cross_attention = ImageCrossAttention if spec.image_dim else CrossAttention
        self.cross_attn = cross_attention(spec.dim, spec.num_heads, spec.eps)
        self.ffn = nn.Sequential(Linear(spec.dim, spec.ffn_dim), nn.GELU(approximate="tanh"),
                                 Linear(spec.ffn_dim, spec.dim))
        self.modulation = _random_rows(6, spec.dim)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """x [B, L, D] float32 -> [B, L, D] float32, the same tensor unless gradients are recorded."""
        time = shared.time.map(lambda row: self.modulation.float() + row)
        attended = shared.attend(*self._projected(x, time, shared))
        sources = self.cross_attn.prepare(shared.text, shared.image)

        def finish(part: Tensor, own: TimeRows, start: int) -> Tensor:
            """What comes behind self-attention sees each token alone."""
            part, q = shared.run(self.QUERY, self, part, own, attended[:, start:start + part.shape[1]])
            attended_to = [self.cross_attn.attend(q, sources, shared.backend)]
            del q
            return shared.run(self.FINISH, self, part, own, attended_to)

        return shared.in_chunks(finish, x, time)

    def _projected(self, x: Tensor, time: TimeRows, shared: Shared) -> list[Tensor]:
        """Queries, keys and values of self-attention, [B, L, heads, head_dim] each."""
        made: list[Tensor] = []

        def project(part: Tensor, own: TimeRows, start: int) -> None:
            stop = start + part.shape[1]
            projected = shared.run(self.PROJECT, self, part, own, shared.rope[start:stop])
            if part.shape[1] == x.shape[1]:
                made.extend(projected)
                return
            if not made:
                made.extend(one.new_empty(one.shape[0], x.shape[1], *one.shape[2:]) for one in projected)
            for whole, one in zip(made, projected):
                whole[:, start:stop] = one

        shared.each_chunk(project, x, time)
        return made

    def _project(self, x: Tensor, time: TimeRows, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention for the tokens x [B, L, D] at positions `rope`."""
        return self.self_attn.project(modulated(x, time, 0, self.eps, self.ffn[0].dtype), rope)

    def _query(self, x: Tensor, time: TimeRows, attended: Tensor) -> tuple[Tensor, Tensor]:
        """x with what self-attention has `attended` to, and queries of cross-attention."""
        x, h = add_gated_and_norm(x, self.self_attn.o(attended), time, 2, self.norm3, self.ffn[0].dtype)
        return x, self.cross_attn.query(h)

    def _finish(self, x: Tensor, time: TimeRows, attended: list[Tensor]) -> Tensor:
        """x with what cross-attention has `attended` to, and with the feed-forward network's result.

        `attended` is alone in a list, from which it is taken: so nobody holds it any more when the network runs.
        """
        update = self.cross_attn.o(attended.pop())
        x, h = add_and_modulate(x, update, time, 3, self.eps, self.ffn[0].dtype)
        del update
        h = self.ffn[0](h, gelu=True)
        h = self.ffn[2](h)
        return add_gated(x, h, time, 5)

    # What there is between attentions, each with the layers whose weights it needs.
    PROJECT = Piece(_project, ("self_attn.q", "self_attn.k", "self_attn.v"), changes=False)
    QUERY = Piece(_query, ("self_attn.o", "cross_attn.q"))
    FINISH = Piece(_finish, ("cross_attn.o", "ffn.0", "ffn.2"))


class Head(nn.Module):
    """Modulated norm and projection of each token to its patch, in float32."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.head = Float32Linear(spec.dim, spec.out_dim * math.prod(spec.patch_size))
        self.modulation = _random_rows(2, spec.dim)

    def forward(self, x: Tensor, time: TimeRows) -> Tensor:
        """x [B, L, D], time [B, D] for each run -> [B, L, patch volume * out_dim]."""
        def project(part: Tensor, row: Tensor) -> Tensor:
            shift, scale = (self.modulation.float() + row.unsqueeze(1)).split(1, dim=1)
            return self.head(modulated_norm(part, shift, scale, self.eps))

        return time.per_run(project, x)


class WanTransformer(nn.Module):
    """Predicts the flow velocity of a noisy latent video.

    Build it on the meta device and assign weights, or call `init_weights` to train from nothing.
    """

    model_types = MODEL_TYPES

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        if spec.model_type not in self.model_types:
            raise ValueError(f"{type(self).__name__} runs transformers of type {', '.join(self.model_types)}; "
                             f"{spec.model_type!r} is not supported.")
        self.spec = spec
        self.patch_embedding = nn.Conv3d(spec.in_dim, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.text_embedding = nn.Sequential(Linear(spec.text_dim, spec.dim), nn.GELU(approximate="tanh"),
                                            Linear(spec.dim, spec.dim))
        self.time_embedding = nn.Sequential(Float32Linear(spec.freq_dim, spec.dim), nn.SiLU(),
                                            Float32Linear(spec.dim, spec.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(spec.dim, spec.dim * 6))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.head = Head(spec)
        self.compiled: Compiled | None = None
        if spec.image_dim:
            self.img_emb = ImageEmbedding(spec)

    def forward(self, inputs: ModelInputs, *, backend: str = "sdpa", chunk: int | None = None,
                on_block: Callable[[int], None] | None = None, shortcut: Shortcut | None = None,
                without: Collection[int] = (), radial: Radial | None = None) -> Tensor:
        """Velocity [B, out_dim, T, H, W] (float32) of a noisy video.

        `chunk` bounds the tokens that are worked on at a time (see `Shared`). `on_block(i)` is called before block i
        and may raise to stop. `shortcut` may take the place of all blocks; it is for calls without gradients. The
        blocks `without` are left out; what runs beside them still does. With `radial`, self-attention is sparse. Raises
        ValueError for sizes off the patch grid, inputs that this model does not have, batches that differ, or an
        unknown backend.
        """
        check_backend(backend)
        grid = self._grid(inputs.latents)
        # Which tokens share a timestep decides what is computed, so it is looked at on the host.
        time = time_rows(inputs.timestep.cpu(), grid[0], grid[1] * grid[2])
        self._check(inputs)
        x = self._embed_patches(inputs.latents, self.patch_embedding)
        time = time.map(lambda row: self.time_embedding(
            sinusoidal_embedding(row, self.spec.freq_dim).to(x.device, non_blocking=True)))
        shared = Shared(time.map(lambda row: self.time_projection(row).unflatten(1, (6, -1))),
                        rope_table(grid, self.spec.dim // self.spec.num_heads, x.device), inputs.text, inputs.image,
                        backend, chunk, run=self.compiled or at_once)
        if self.compiled:
            self.compiled.begin()
        if radial:
            shared = replace(shared, pattern=BlockPattern.radial(grid, radial.decay, x.device),
                             dense_blocks=radial.dense_blocks)
        reused = shortcut.reused() if shortcut else None
        if reused is None:
            x = self._run_blocks(x, inputs, shared, on_block, without)
            if shortcut:
                shortcut.keep(lambda: self._added(x, inputs.latents))
        else:
            x = add_residual(x, reused.to(x.device))
        tokens = shared.each_chunk(lambda part, own, start: self.head(part, own), x, time)
        return self._assemble_patches(torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0], grid)

    def time_signals(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The embedded `timesteps` [N] of 0..1000, [N, D], and what the blocks are modulated by, [N, 6, D]; float32."""
        device = self.patch_embedding.weight.device
        embedded = self.time_embedding(sinusoidal_embedding(timesteps.cpu(), self.spec.freq_dim).to(device))
        return embedded, self.time_projection(embedded).unflatten(1, (6, -1))

    def _run_blocks(self, x: Tensor, inputs: ModelInputs, shared: Shared,
                    on_block: Callable[[int], None] | None, without: Collection[int]) -> Tensor:
        branches = self._side_branches(inputs, shared)
        for index, block in enumerate(self.blocks):
            if on_block:
                on_block(index)
            if index not in without:
                x = block(x, shared.at(index))
            for branch in branches:
                x = branch.after_block(index, x)
        return x

    def _added(self, x: Tensor, latents: Tensor) -> Tensor:
        """What the blocks have added to the tokens x [B, L, D] of `latents`, which are embedded anew: that is cheaper
        than to keep them while the blocks run."""
        embedded = self._embed_patches(latents, self.patch_embedding)
        return torch.sub(x, embedded, out=embedded).to(self.patch_embedding.weight.dtype)

    def _side_branches(self, inputs: ModelInputs, shared: Shared) -> list[SideBranch]:
        """What runs beside the blocks, made from `inputs`."""
        return []

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
        first = self.text_embedding[0]
        rows = F.pad(context[:, :length].to(first.device, first.dtype), (0, 0, 0, min(padding, 1)))
        bias = None
        if padding > 1:
            bias = torch.zeros(length + 1, device=rows.device)
            bias[-1] = math.log(padding)
        return TextTokens(self.text_embedding(rows), bias)

    def prepare_image(self, features: Tensor) -> Tensor:
        """Embed CLIP features [B, N, image_dim] of one or more images, their tokens one after the other; once a run.

        Raises ValueError for another width, for more tokens than the model has positions for, and for a model without
        image tokens.
        """
        if not self.spec.image_dim:
            raise ValueError("CLIP vision features were given, and this model takes none: pictures enter it through "
                             "its latent channels alone.")
        return self.img_emb(features)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise for training from nothing: Xavier matrices, normal embeddings, a head that predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
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

    def _check(self, inputs: ModelInputs) -> None:
        """Raise ValueError where the parts belong to batches of different sizes, or to another kind of model."""
        batch = inputs.latents.shape[0]
        parts = {"timesteps": inputs.timestep, "text": inputs.text.tokens, "image": inputs.image,
                 "negative text": inputs.text.away and inputs.text.away.text.tokens,
                 **{"VACE control": control.latents for control in inputs.controls}}
        for name, part in parts.items():
            if part is not None and part.shape[0] != batch:
                raise ValueError(f"{name}: a batch of {part.shape[0]}, and the latents are a batch of {batch}; "
                                 "they must be equal.")
        if inputs.image is not None and not self.spec.image_dim:
            raise ValueError("image tokens were given, and this model has no layers for them: pictures enter it "
                             "through its latent channels alone.")
        self._check_controls(inputs)

    def _check_controls(self, inputs: ModelInputs) -> None:
        """Raise ValueError for VACE controls that do not fit the model or the latents."""
        if inputs.controls:
            raise ValueError(f"a VACE control was given, and a transformer of type {self.spec.model_type} has no VACE "
                             "blocks. Use a VACE model, or add a VACE module to this one.")

    def _embed_patches(self, latents: Tensor, embedding: nn.Conv3d) -> Tensor:
        """[B, C, T, H, W] -> float32 tokens [B, L, dim]. A convolution that steps by its own size is a linear layer."""
        weight = embedding.weight
        t, h, w = self.spec.patch_size
        patches = latents.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B C F t H h W w
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches.to(weight.dtype), weight.flatten(1), embedding.bias).float()

    def _assemble_patches(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, t * h * w * C] with the channel innermost -> [B, C, T, H, W]."""
        patches = tokens.unflatten(2, (*self.spec.patch_size, self.spec.out_dim)).unflatten(1, grid)  # B F H W t h w C
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _random_rows(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(1, count, dim), std=dim ** -0.5))
