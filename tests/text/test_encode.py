"""encode_prompts: padding, the shortened run, and weights."""

import pytest
import torch

from wan_core.presets import TextEncoderSpec
from wan_core.text import UMT5Encoder, encode_pieces, encode_prompts, weighted_pieces

PROMPTS = ["A red circle, moving left on a black background", "", "green square"]


def test_equals_the_full_length_run(encoder, tokenizer):
    """Running only the longest prompt's columns equals the 512-column run within 1e-5; the rest is exactly zero."""
    ids, mask = tokenizer.encode(PROMPTS, 512)
    with torch.no_grad():
        full = encoder(ids, mask)
    embeddings = encode_prompts(encoder, tokenizer, PROMPTS)
    assert embeddings.shape == (3, 512, 32)
    torch.testing.assert_close(embeddings[mask], full[mask], atol=1e-5, rtol=0)
    assert not embeddings[~mask].any() and embeddings[mask].any(-1).all()


def test_batch_equals_single_prompts(encoder, tokenizer):
    """A prompt's embedding does not depend on the prompts beside it."""
    together = encode_prompts(encoder, tokenizer, PROMPTS, text_len=32)
    alone = torch.cat([encode_prompts(encoder, tokenizer, [prompt], text_len=32) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_empty_prompt_is_one_row(encoder, tokenizer):
    """The empty prompt gives the end token's embedding, then zeros; blanks count as empty."""
    empty = encode_prompts(encoder, tokenizer, ["", " \n"], text_len=8)
    assert empty[:, 0].any() and not empty[:, 1:].any()
    torch.testing.assert_close(empty[0], empty[1], atol=1e-5, rtol=0)


def test_prompts_are_cleaned(encoder, tokenizer):
    """Entities and white space are cleaned before tokenizing."""
    clean = encode_prompts(encoder, tokenizer, ["red, 'fine' circle"], text_len=32)
    assert torch.equal(encode_prompts(encoder, tokenizer, [" red, &amp;#39;fine&#39;\n circle"], text_len=32), clean)


def test_unit_weights_are_exactly_plain(encoder, tokenizer):
    """Weights of 1 give the very embedding of the prompt without them, also beside a weighted prompt."""
    plain = encode_prompts(encoder, tokenizer, ["A red circle"], text_len=16)
    assert torch.equal(encode_prompts(encoder, tokenizer, ["A (red:1.0) (circle:1)"], text_len=16), plain)
    assert torch.equal(encode_prompts(encoder, tokenizer, ["A red circle"], text_len=16, weights=False), plain)
    both = encode_prompts(encoder, tokenizer, ["A red circle", "A (red:2) circle"], text_len=16)
    torch.testing.assert_close(both[:1], plain, atol=1e-5, rtol=0)
    assert not torch.equal(both[0], both[1])


def test_weights_interpolate_from_the_empty_prompt(encoder, tokenizer):
    """A token of weight w is moved to empty + w * (token - empty); the others stay exactly as they are."""
    prompt, weighted = "A red circle", "(A:0.5) (red:1.5) circle"
    plain = encode_prompts(encoder, tokenizer, [prompt], text_len=16)[0]
    empty = encode_prompts(encoder, tokenizer, [""], text_len=16)[0]
    out = encode_prompts(encoder, tokenizer, [weighted], text_len=16)[0]
    first, second = len(tokenizer.pieces("A")), len(tokenizer.pieces("A red"))
    torch.testing.assert_close(out[:first], empty[:first] + 0.5 * (plain[:first] - empty[:first]))
    torch.testing.assert_close(out[first:second], 1.5 * plain[first:second])
    assert torch.equal(out[second:], plain[second:])
    assert empty[0].any() and plain[second:].any()


def test_weight_zero_is_the_empty_prompt(encoder, tokenizer):
    """Weight 0 puts a row where the empty prompt has it."""
    out = encode_prompts(encoder, tokenizer, ["(A red circle:0)"], text_len=16)
    pieces = len(tokenizer.pieces("A red circle"))
    empty = encode_prompts(encoder, tokenizer, [""], text_len=16)
    torch.testing.assert_close(out[:, :pieces], empty[:, :pieces], atol=1e-6, rtol=0)


def test_weights_off_reads_parentheses_as_text(encoder, tokenizer):
    """With weights=False the notation itself is tokenized."""
    out = encode_prompts(encoder, tokenizer, ["(red:1.5)"], text_len=16, weights=False)[0]
    assert int(out.any(-1).sum()) == len(tokenizer.pieces("(red:1.5)")) + 1


def test_long_weighted_prompt_is_cut(encoder, tokenizer):
    """Beyond text_len a weighted prompt is cut; its last row is the end token with weight 1."""
    prompt = "red circle moving left on a black background"
    plain = encode_prompts(encoder, tokenizer, [prompt], text_len=6)
    out = encode_prompts(encoder, tokenizer, [f"({prompt}:2)"], text_len=6)
    torch.testing.assert_close(out[:, 1:5], 2 * plain[:, 1:5])
    assert torch.equal(out[:, 5], plain[:, 5])


def test_on_block_is_passed_on(encoder, tokenizer):
    """on_block reaches the encoder."""
    seen = []
    encode_prompts(encoder, tokenizer, ["red"], text_len=8, on_block=seen.append)
    assert seen == [0, 1]


def test_bad_prompts_are_refused(encoder, tokenizer):
    """A bare string, a non-string or no prompt at all is a ValueError."""
    for prompts, message in (("red", "list"), ([None], "string"), ([], "prompt")):
        with pytest.raises(ValueError, match=message):
            encode_prompts(encoder, tokenizer, prompts)


def test_foreign_tokenizer_is_refused(tokenizer):
    """A tokenizer with more pieces than the encoder has embeddings is a ValueError before any encoding."""
    small = UMT5Encoder(TextEncoderSpec(vocab_size=tokenizer.vocab_size - 1, dim=8, dim_attn=8, dim_ffn=8, num_heads=1,
                                        num_layers=1))
    with pytest.raises(ValueError, match="tokenizer"):
        encode_prompts(small, tokenizer, [""])


def test_pieces_are_the_two_halves_of_encoding(encoder, tokenizer):
    """Tokenizing with weights and encoding the rows afterwards equals doing both at once, without weights, too."""
    prompts = ["a (red:1.4) circle", "((plain))"]
    rows = [weighted_pieces(tokenizer, prompt) for prompt in prompts]
    assert {weight for _, weight in rows[0]} == {1.0, 1.4}
    assert torch.equal(encode_pieces(encoder, rows, 32), encode_prompts(encoder, tokenizer, prompts, text_len=32))
    unweighted = [weighted_pieces(tokenizer, prompt, weights=False) for prompt in prompts]
    assert torch.equal(encode_pieces(encoder, unweighted, 32),
                       encode_prompts(encoder, tokenizer, prompts, text_len=32, weights=False))
