"""Tokenizer against transformers, its sources, its limits and its refusals."""

import logging

import pytest
import sentencepiece
import torch
from transformers import T5Tokenizer

from tests.vocabulary import protobuf_fields
from wan_core.text import Tokenizer
from wan_core.training.nano_tokenizer import train_tokenizer

TEXTS = ["", "A red circle", "A RED  circle ", "a green square, moving up.", "ｒｅｄ ﬁne", "日本語 red 日本", "x", ".",
         "a" * 50, "“blue”", "red\u200bcircle", "cafe\u0301 naïve 😀", "a\tred\ncircle"]


@pytest.fixture(scope="module")
def oracle(spiece_model) -> T5Tokenizer:
    """transformers' T5 tokenizer with the same pieces, scores and normalisation table."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model)
    normaliser = dict(protobuf_fields(dict(protobuf_fields(spiece_model))[3]))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    return T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=normaliser[2], extra_ids=0)


@pytest.mark.parametrize("text_len", [64, 5, 1])
def test_equals_transformers(tokenizer, oracle, text_len):
    """Ids and mask, padded and cut to text_len, are those of transformers' T5 tokenizer."""
    theirs = oracle(TEXTS, max_length=text_len, padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = tokenizer.encode(TEXTS, text_len)
    assert torch.equal(ids, theirs["input_ids"])
    assert torch.equal(mask, theirs["attention_mask"].bool())


def test_rows_end_and_pad(tokenizer):
    """A row is its pieces, then id 1, then zeros; the mask covers the pieces and the 1."""
    ids, mask = tokenizer.encode(["", "red circle"], 12)
    pieces = tokenizer.pieces("red circle")
    assert len(pieces) > 1
    assert ids.tolist() == [[1] + [0] * 11, pieces + [1] + [0] * (11 - len(pieces))]
    assert mask.sum(1).tolist() == [1, len(pieces) + 1]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_truncation_keeps_the_end_token(tokenizer, caplog):
    """A long prompt keeps its first text_len - 1 pieces and id 1, and says so; one that just fits says nothing."""
    text = "red circle moving left"
    pieces = tokenizer.pieces(text)
    with caplog.at_level(logging.WARNING):
        fitting, _ = tokenizer.encode([text], len(pieces) + 1)
    assert fitting.tolist() == [pieces + [1]] and not caplog.records
    with caplog.at_level(logging.WARNING):
        cut, mask = tokenizer.encode([text], len(pieces))
    assert cut.tolist() == [pieces[:-1] + [1]] and mask.all() and len(caplog.records) == 1


def test_all_sources_are_equal(spiece_model, tokenizer, tmp_path):
    """File, bytes, tensor and written-back bytes make the same tokenizer."""
    path = tmp_path / "spiece.model"
    path.write_bytes(spiece_model)
    tensor = torch.tensor(list(spiece_model), dtype=torch.uint8)
    for other in (Tokenizer.from_file(path), Tokenizer.from_tensor(tensor), Tokenizer.from_bytes(tokenizer.to_bytes())):
        assert torch.equal(other.encode(TEXTS)[0], tokenizer.encode(TEXTS)[0])
    assert tokenizer.to_bytes() == spiece_model


@pytest.mark.parametrize("spoil", [
    lambda data: b"", lambda data: data[:50], lambda data: data[:len(data) // 2], lambda data: data[:-3],
    lambda data: b"not a model", lambda data: b'{"model": "json"}', lambda data: bytes(64)])
def test_broken_bytes_are_refused(spiece_model, spoil):
    """Empty, truncated or foreign bytes are a ValueError that says what was expected."""
    with pytest.raises(ValueError, match="SentencePiece model"):
        Tokenizer.from_bytes(spoil(spiece_model))


def test_broken_file_is_named(tmp_path):
    """A missing or foreign file is a ValueError with its path."""
    with pytest.raises(ValueError, match="absent.model"):
        Tokenizer.from_file(tmp_path / "absent.model")
    path = tmp_path / "foreign.model"
    path.write_bytes(b"PK\x03\x04 zip")
    with pytest.raises(ValueError, match="foreign.model"):
        Tokenizer.from_file(path)


def test_model_with_other_ids_is_refused(tmp_path):
    """A SentencePiece model that is not T5-style (Llama's ids: no pad, eos 2) is a ValueError naming the ids."""
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a red circle", "a blue circle"]), vocab_size=40,
                                             model_prefix=str(prefix), hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(ValueError, match="pad id -1 and eos id 2"):
        Tokenizer.from_file(prefix.with_suffix(".model"))


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)])
def test_tensor_of_another_kind_is_refused(tensor):
    """spiece_model must be one-dimensional uint8."""
    with pytest.raises(ValueError, match="uint8"):
        Tokenizer.from_tensor(tensor)


def test_nothing_to_encode_is_refused(tokenizer):
    """No text, or no room for the end token, is a ValueError."""
    with pytest.raises(ValueError, match="no text"):
        tokenizer.encode([])
    with pytest.raises(ValueError, match="text_len is 0"):
        tokenizer.encode(["red"], 0)


def test_byte_pieces_encode_any_text():
    """A model with byte pieces turns unseen characters into their bytes, never into the unknown id 2."""
    tokenizer = Tokenizer.from_bytes(train_tokenizer(["a red circle", "a blue circle"], 300))
    assert 2 not in tokenizer.pieces("日本 😀 é")
