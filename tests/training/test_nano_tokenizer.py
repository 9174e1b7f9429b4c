"""The nano tokenizer: deterministic, T5-style, whole words, any text."""

import pytest
import sentencepiece

from wan_core.text import Tokenizer
from wan_core.training.nano_tokenizer import train_tokenizer

SENTENCES = [f"a {colour} {shape} moving {way}." for colour in ("red", "green", "blue")
             for shape in ("circle", "square", "triangle") for way in ("left", "right", "up", "down")]


def test_same_input_gives_same_bytes():
    """Training is deterministic, also from an iterator."""
    model = train_tokenizer(SENTENCES, 400)
    assert train_tokenizer(iter(SENTENCES), 400) == model
    assert train_tokenizer(SENTENCES + ["a yellow star."], 400) != model


def test_words_are_single_pieces():
    """Words of the training text are one piece each, with the leading-space mark, also before punctuation."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(SENTENCES, 400))
    assert processor.encode("a red circle, moving left.", out_type=str) == [
        "▁a", "▁red", "▁circle", ",", "▁moving", "▁left", "."]


def test_ids_are_t5s_and_any_text_encodes():
    """Pad 0, end 1, unknown 2, no start token; unseen characters become bytes and decode back."""
    data = train_tokenizer(SENTENCES, 400)
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    assert processor.get_piece_size() <= 400
    text = "ROT 日本 😀 é"
    pieces = Tokenizer.from_bytes(data).pieces(text)
    assert 2 not in pieces and processor.decode(pieces) == text
    assert Tokenizer.from_bytes(data).pieces("ｒｅｄ") == Tokenizer.from_bytes(data).pieces("red")


def test_bad_input_is_refused():
    """No text, or a limit below the fixed pieces, is a ValueError."""
    with pytest.raises(ValueError, match="no sentence"):
        train_tokenizer([" ", ""], 400)
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(SENTENCES, 260)
