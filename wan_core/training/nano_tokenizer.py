"""A small SentencePiece tokenizer for the nano text encoder, of the same kind as UMT5's.

Unigram model (Kudo 2018, https://arxiv.org/abs/1804.10959) with T5's ids, normalisation and leading-space convention.
Characters that the training text lacks fall back to their UTF-8 bytes, so every prompt can be encoded.
"""

import io
from collections.abc import Iterable

import sentencepiece


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> bytes:
    """Train on sentences and return the serialised model; the same input always gives the same bytes.

    vocab_size is an upper limit: pad 0, end of sequence 1, unknown 2, 256 bytes, then characters, words and parts of
    words as far as the text supplies them. Raises ValueError if there is no text, or if the limit is too low for the
    bytes and characters.
    """
    lines = [line for line in (" ".join(sentence.split()) for sentence in sentences) if line]
    if not lines:
        raise ValueError("no sentence to train a tokenizer on; expected at least one that is not blank")
    # SentencePiece considers only strings that occur in at least two distinct words. Repeating each word before
    # punctuation makes whole words candidates, where a small vocabulary would otherwise be cut into letters.
    words = sorted({word.rstrip(",.") for line in lines for word in line.split()} - {""})
    lines += [f"{word}, {word}." for word in words]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            # One thread: sums in another order would give other scores in the last digit.
            num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"cannot train a tokenizer of at most {vocab_size} pieces on {len(lines)} lines; 259 are "
                         f"fixed and every character needs one: give a larger vocab_size ({error})") from error
    return model.getvalue()
