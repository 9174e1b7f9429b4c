"""Prompts to the zero-padded embeddings that the transformer takes as context.

As in the official code, an embedding is cut at its prompt's real length and the rest of the 512 rows are zeros, which
the transformer attends to like any other row (they are not masked there). Prompt weights act as in ComfyUI: each
token's embedding is moved along the line from the empty prompt's embedding in the same row, to `weight` times the
distance; the empty prompt is zero beyond its single end-of-sequence token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .clean import clean_prompt
from .tokenizer import Tokenizer, batch
from .umt5 import UMT5Encoder
from .weighting import parse_weights


@torch.no_grad()
def encode_prompts(encoder: UMT5Encoder, tokenizer: Tokenizer, prompts: Sequence[str], text_len: int = 512,
                   weights: bool = True, on_block: Callable[[int], None] | None = None) -> Tensor:
    """Encode prompts on the encoder's device.

    prompts: any strings; an empty one is legal (it is ComfyUI's usual negative prompt, though the official code puts a
    preset's default negative prompt in its place) and gives the end-of-sequence token's embedding in the first row.
    weights: read ComfyUI's "(text:1.2)" notation; if False, parentheses are ordinary text.
    on_block: see UMT5Encoder.forward.
    Returns [B, text_len, dim] float32, zero beyond each prompt's tokens. Prompts above text_len tokens are cut.
    Raises ValueError if there is no prompt, one is not a string, or tokenizer and encoder do not belong together.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; expected a list of strings, such as [prompt]")
    if tokenizer.vocab_size > encoder.spec.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces but the text encoder only "
                         f"{encoder.spec.vocab_size} embeddings; use the tokenizer that came with the encoder")
    return encode_pieces(encoder, [weighted_pieces(tokenizer, prompt, weights) for prompt in prompts], text_len,
                         on_block)


def weighted_pieces(tokenizer: Tokenizer, prompt: str, weights: bool = True) -> list[tuple[int, float]]:
    """The cleaned prompt as (token id, weight) pairs, without end-of-sequence token, padding or limit."""
    cleaned = clean_prompt(prompt)
    sections = parse_weights(cleaned) if weights else [(cleaned, 1.0)]
    # Like ComfyUI, each section is tokenized on its own, so that no token straddles two weights.
    return [(piece, weight) for text, weight in sections for piece in tokenizer.pieces(text)]


@torch.no_grad()
def encode_pieces(encoder: UMT5Encoder, rows: Sequence[Sequence[tuple[int, float]]], text_len: int = 512,
                  on_block: Callable[[int], None] | None = None) -> Tensor:
    """Encode rows of (token id, weight), as `weighted_pieces` gives them; result and limits as in `encode_prompts`."""
    ids, mask = batch([[piece for piece, _ in row] for row in rows], text_len)
    row_weights = [[weight for _, weight in row] for row in rows]
    embeddings = _encode_ids(encoder, ids, mask, on_block)
    if any(weight != 1.0 for row in row_weights for weight in row):
        empty = _encode_ids(encoder, *batch([[]], text_len), on_block)
        embeddings = _apply_weights(embeddings, empty, row_weights)
    return embeddings


def _encode_ids(encoder: UMT5Encoder, ids: Tensor, mask: Tensor, on_block: Callable[[int], None] | None) -> Tensor:
    """Embeddings [B, text_len, dim], zero where mask is False.

    The encoder sees only as many columns as the longest prompt has tokens: padding is masked in its attention, so the
    result is that of the whole text_len, at a fraction of the work.
    """
    device = encoder.device
    longest = int(mask.sum(1).max())
    embeddings = encoder(ids[:, :longest], mask[:, :longest], on_block)
    padded = embeddings.new_zeros(*ids.shape, embeddings.shape[-1])
    padded[:, :longest] = embeddings * mask[:, :longest, None].to(device)
    return padded


def _apply_weights(embeddings: Tensor, empty: Tensor, row_weights: Sequence[Sequence[float]]) -> Tensor:
    """Scale each row's distance from the empty prompt [1, L, dim] by its token's weight; weight 1 changes nothing."""
    factors = torch.ones(embeddings.shape[:2])
    for i, row in enumerate(row_weights):
        kept = row[:embeddings.shape[1] - 1]
        factors[i, :len(kept)] = torch.tensor(kept)
    factors = factors[..., None].to(embeddings.device)
    return torch.where(factors == 1.0, embeddings, empty + (embeddings - empty) * factors)
