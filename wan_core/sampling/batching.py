"""Both prompts through the transformer in one call: the weights are read once, and small videos fill a GPU better."""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import Condition, TextCondition


def joined(positive: TextCondition, negative: TextCondition, batch: int) -> TextCondition | None:
    """One condition for a sample that is twice a batch, its first half for `positive`, its second for `negative`.

    None where they differ in more than the text, or where what is beside them is not the same for all of the batch.
    Texts of different length are padded with zero rows, which is what padding is (see `WanTransformer.prepare_text`).
    """
    if len(positive.beside) != len(negative.beside) or not all(map(_is_same, positive.beside, negative.beside)):
        return None
    length = max(positive.context.shape[1], negative.context.shape[1])
    contexts = [F.pad(prompt.context, (0, 0, 0, length - prompt.context.shape[1])).expand(batch, -1, -1)
                for prompt in (positive, negative)]
    return TextCondition(torch.cat(contexts), beside=positive.beside)


def _is_same(one: Condition, other: Condition) -> bool:
    """Whether two conditions, which are dataclasses, say the same and say it for any batch."""
    if type(one) is not type(other):
        return False
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            if a.shape[0] != 1 or not (a is b or torch.equal(a, b)):
                return False
        elif a != b:
            return False
    return True
