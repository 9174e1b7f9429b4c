"""Radial attention: sparse self-attention for long clips, the sparser the further apart two frames are.

A token sees all of its own frame, and of a frame d further only what lies near its own place, in a window that halves
each time d doubles; where windows would be narrower than a block of tokens, frames are skipped instead. The first frame
is seen by all. What is computed grows with n log n, not n^2. Reference: Li et al. 2025, arXiv:2506.19852, section 4.

The mask has blocks of 128 tokens: a block of keys is seen whole by a block of queries if the rule keeps any of their
pairs. FlexAttention runs it on a GPU; elsewhere each block of queries attends to its keys, put side by side.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .backend import Case
from .dispatch import attention, run_or_warn
from .flex import flex, why_not_flex

# Tokens in a block, which is also the narrowest window: that of the kernels.
BLOCK = 128

# Segments whose distances to all others are looked at together.
_ROWS = 512


@dataclass(frozen=True)
class Radial:
    """When radial attention is used, and how sparse it is.

    Noise levels (sigma) above `start` and the first `dense_blocks` blocks keep dense attention. In the frames next to
    its own a token sees `decay` times a frame's tokens to either side: 1 is the paper's rule, 0.5 about what its code
    has for Wan by default. 0.94 is where 12 of 50 steps are done at shift 5, as in the paper; longer clips have 2 dense
    steps there (0.99) and 2 dense blocks. Raises ValueError for values out of range.
    """

    decay: float = 0.5
    start: float = 0.94
    dense_blocks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise ValueError(f"radial attention is to begin at sigma {self.start}; expected 0 to 1.")
        if self.dense_blocks < 0:
            raise ValueError(f"{self.dense_blocks} blocks are to keep dense attention; expected 0 or more.")
        if not 0 < self.decay < math.inf:
            raise ValueError(f"the decay of radial attention is {self.decay}; expected a number above 0, 1 for the "
                             "published rule.")


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which blocks of keys each block of queries sees: `kept` [blocks, blocks] bool on the host, of `length` tokens.

    A number for each pair of blocks is 21 MB for 20 seconds at 720p, whose q alone is 3 GB.
    """

    kept: Tensor
    length: int
    device: torch.device

    @staticmethod
    def radial(grid: tuple[int, int, int], decay: float, device: torch.device) -> "BlockPattern":
        """The pattern for a grid of T x H x W tokens, time slowest, to be used on `device`; see `Radial`."""
        frames, frame = grid[0], grid[1] * grid[2]
        return BlockPattern(_kept(frames, frame, decay, BLOCK), frames * frame, device)

    @property
    def density(self) -> float:
        """The share of dense attention that is computed, 0 to 1."""
        return float(self.kept.float().mean())

    @cached_property
    def block_mask(self) -> object:
        """The pattern for FlexAttention (`BlockMask`, of PyTorch 2.6 or later)."""
        from torch.nn.attention.flex_attention import BlockMask

        counts, order = self.kept.sum(1), self.kept.int().argsort(dim=1, descending=True, stable=True)
        counts, order = (part.int().to(self.device)[None, None] for part in (counts, order))
        return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=BLOCK, seq_lengths=(self.length, self.length))

    @cached_property
    def runs(self) -> list[list[tuple[int, int]]]:
        """For each block of queries, where the keys that it sees begin and end, neighbouring blocks together."""
        edges = torch.diff(self.kept.int(), dim=1, prepend=torch.zeros(len(self.kept), 1, dtype=torch.int32),
                           append=torch.zeros(len(self.kept), 1, dtype=torch.int32))
        runs = []
        for row in edges:
            starts, stops = ((row == sign).nonzero().flatten().mul(BLOCK).tolist() for sign in (1, -1))
            runs.append([(start, min(stop, self.length)) for start, stop in zip(starts, stops)])
        return runs


@lru_cache(maxsize=2)
def _kept(frames: int, frame: int, decay: float, size: int) -> Tensor:
    """The pattern for `frames` of `frame` tokens each in blocks of `size`: [blocks, blocks] bool."""
    length = frames * frame
    # Blocks, cut where frames end: each segment lies in one frame.
    cuts = torch.cat([torch.arange(0, length, size), torch.arange(0, length, frame)]).unique()
    ends = torch.cat([cuts[1:], torch.tensor([length])])
    segments = torch.stack([cuts // frame, cuts % frame, (ends - 1) % frame]).int()
    blocks = cuts // size
    count = -(-length // size)
    kept = torch.zeros(count, count, dtype=torch.bool)
    for rows, own in zip(segments.split(_ROWS, 1), blocks.split(_ROWS)):
        seen = _sees(rows.unsqueeze(2), segments.unsqueeze(1), frame, decay, size)
        # Into blocks: keys first, then queries.
        by_key = torch.zeros(len(own), count, dtype=torch.int32).index_add_(1, blocks, seen.int())
        kept |= torch.zeros(count, count, dtype=torch.int32).index_add_(0, own, by_key).bool()
    return kept


def _sees(query: Tensor, key: Tensor, frame: int, decay: float, size: int) -> Tensor:
    """Whether any token of each segment `query` [3, Q, 1] sees any of `key` [3, 1, K]: [Q, K] bool.

    Segments are (frame, first place, last place); a frame has `frame` tokens, and windows have `size` at least.
    """
    (time, first, last), (other, from_, to) = query, key
    distance = (time - other).abs()
    # floor(log2(d)) of whole numbers, exactly; 0 for d = 0, too.
    band = torch.frexp(distance.clamp(min=1).float()).exponent - 1
    width = decay * frame * torch.exp2(-band.float())
    every = (size / width).clamp(min=1).ceil()
    nearest = torch.maximum(from_ - last, first - to).clamp(min=0)
    near = (nearest + 1 <= width.clamp(min=size)) & (distance % every == 0)
    return near | (distance == 0) | (other == 0)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, backend: str) -> Tensor:
    """Attention of q, k, v [B, L, heads, head_dim] where `pattern` keeps pairs of blocks -> [B, L, heads * head_dim].

    By FlexAttention on a GPU, elsewhere by `by_blocks`; where the former cannot run, one warning says why.
    """
    found = None
    if q.device.type != "cpu":
        found = run_or_warn(lambda: by_flex(q, k, v, pattern), why_not_flex(Case.of(q, k)),
                            "Radial attention by FlexAttention", "a slower way to compute the same")
    return by_blocks(q, k, v, pattern, backend) if found is None else found


def by_flex(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Tensor:
    """`sparse_attention` by one kernel, which skips what is not kept."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return flex()(q, k, v, block_mask=pattern.block_mask).transpose(1, 2).flatten(2)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, backend: str = "sdpa") -> Tensor:
    """`sparse_attention` by dense attention of each block of queries to the keys that it sees, put side by side."""
    parts = []
    for queries, runs in zip(q.split(BLOCK, 1), pattern.runs):
        keys, values = (torch.cat([tensor[:, start:stop] for start, stop in runs], 1) for tensor in (k, v))
        parts.append(attention(queries, keys, values, backend=backend))
    return torch.cat(parts, 1)
