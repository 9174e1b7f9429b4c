"""Begin a small transformer from the blocks of the trained text-to-video one.

A model that starts from one that already moves shapes about needs a fraction of the steps; the released image-to-video
models began from the text-to-video ones, too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..dit import WanTransformer


@torch.no_grad()
def begin_from(transformer: WanTransformer, t2v: Mapping[str, Tensor], blocks: Sequence[int]) -> None:
    """Copy from `t2v` what fits: block `blocks[i]` becomes block i, and every other tensor of the same shape.

    In a block with a narrower feed-forward layer the hidden units that carry most are kept.
    """
    own = transformer.state_dict()
    for index, block in enumerate(blocks):
        t2v = {**t2v, **_block(t2v, f"blocks.{block}.", f"blocks.{index}.", transformer.spec.ffn_dim)}
    for name, target in own.items():
        if name in t2v and t2v[name].shape == target.shape:
            target.copy_(t2v[name])


def _block(t2v: Mapping[str, Tensor], source: str, target: str, ffn_dim: int) -> dict[str, Tensor]:
    """The tensors of one block under another name, its feed-forward layer cut to `ffn_dim` units."""
    block = {name.removeprefix(source): tensor for name, tensor in t2v.items() if name.startswith(source)}
    into, out = block["ffn.0.weight"], block["ffn.2.weight"]
    kept = (into.norm(dim=1) * out.norm(dim=0)).topk(ffn_dim).indices.sort().values
    cut = {"ffn.0.weight": into[kept], "ffn.0.bias": block["ffn.0.bias"][kept], "ffn.2.weight": out[:, kept]}
    return {target + name: tensor for name, tensor in {**block, **cut}.items()}
