"""The tokenizer in a GGUF header against the SentencePiece model that it was made of, and what is refused."""

import logging
import math

import pytest
import sentencepiece

from tests.vocabulary import write_gguf
from wan_core import nano
from wan_core.text import Tokenizer
from wan_core.text.gguf_vocabulary import MAX_ITEMS, MAX_PIECE
from wan_core.weights import open_weights

from .conftest import SENTENCES

TEXTS = [
    *SENTENCES, "", " ", "x", "a red circle moving left, slowly.", "  A  RED   circle\t\n on\u00a0blue ", "a" * 300,
    "日本語 red 日本", "一只红色的圆形向左移动,背景是黑色。", "ｒｅｄ　ｃｉｒｃｌｅ！", "ｶﾀｶﾅ カタカナ", "한국어 문장",
    "ﬁne ﬂow ½ ² №5 ™ Å", "cafe\u0301 café naïve", "“curly” – dashes… ‘quotes’", "red\u200bcircle \ufeffx \u00adsoft",
    "😀 👩\u200d👩\u200d👧 🇩🇪 a red 🔴", "مرحبا بالعالم", "שלום", "ไทย ภาษา", "हिन्दी",
    "\u2581red \u2581\u2581 x", "</s> <pad> <unk> <0x41> [PAD3]", "\x00\x01\x7f", "\U0001d400\U0001f600",
    "".join(map(chr, range(0x20, 0x250))), "".join(map(chr, range(0xff01, 0xffef)))]


@pytest.fixture(scope="module")
def original() -> bytes:
    """The bundled tokenizer: pieces for bytes, and a table of normalisation."""
    with open_weights(nano.TEXT_ENCODER) as file:
        return file["spiece_model"].numpy().tobytes()


@pytest.fixture(scope="module")
def values(original, tmp_path_factory):
    """The header of a GGUF file with the bundled tokenizer and 50 filling pieces."""
    path = tmp_path_factory.mktemp("vocabulary") / "x.gguf"
    return open_weights(write_gguf(path, {}, original, pads=50)).header_values


@pytest.mark.parametrize("trained", [True, False])
def test_ids_are_those_of_the_original_model(original, spiece_model, trained, tmp_path, caplog):
    """Promise: in every script, and with bytes or without, ids equal those of the `spiece.model`; nothing is said."""
    model = original if trained else spiece_model
    file = open_weights(write_gguf(tmp_path / "x.gguf", {}, model, pads=50))
    with caplog.at_level(logging.WARNING):
        rebuilt = Tokenizer.from_gguf(file.header_values)
    expected = Tokenizer.from_bytes(model)
    for text in TEXTS:
        assert rebuilt.pieces(text) == expected.pieces(text), text
    assert rebuilt.vocab_size == expected.vocab_size + 50 and not caplog.records
    assert len({tuple(expected.pieces(text)) for text in TEXTS}) > len(TEXTS) - 9


def test_scores_and_types_are_those_of_the_original_model(original, values):
    """Promise: every piece keeps its text, its score to the last bit and its type; the fillers are never used."""
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=Tokenizer.from_gguf(values).to_bytes())
    model = sentencepiece.SentencePieceProcessor(model_proto=original)
    for index in range(model.get_piece_size()):
        for ask in ("id_to_piece", "get_score", "is_unknown", "is_control", "is_unused", "is_byte"):
            assert getattr(rebuilt, ask)(index) == getattr(model, ask)(index)
    assert all(map(rebuilt.is_unused, range(model.get_piece_size(), rebuilt.get_piece_size())))
    assert (rebuilt.unk_id(), rebuilt.bos_id()) == (2, -1)


def test_a_missing_table_of_normalisation_is_said(original, tmp_path, caplog):
    """Promise: plain text has the same ids, full-width text has not, and a warning names the file."""
    values = open_weights(write_gguf(tmp_path / "x.gguf", {}, original, charsmap=False)).header_values
    with caplog.at_level(logging.WARNING):
        rebuilt = Tokenizer.from_gguf(values, "x.gguf")
    assert len(caplog.records) == 1 and "x.gguf holds a tokenizer without its table" in caplog.text
    expected = Tokenizer.from_bytes(original)
    assert rebuilt.pieces("a  red circle ") == expected.pieces("a red circle")
    assert rebuilt.pieces("ｒｅｄ") != expected.pieces("ｒｅｄ")


def test_switches_of_the_header_count(values):
    """Promise: a vocabulary without space prefix, and one that keeps spaces, tokenize so."""
    usual = Tokenizer.from_gguf(values)
    bare = Tokenizer.from_gguf({**values, "tokenizer.ggml.add_space_prefix": False})
    assert bare.pieces("red") != usual.pieces("red") and bare.pieces(" red") != usual.pieces(" red")
    spaced = Tokenizer.from_gguf({**values, "tokenizer.ggml.remove_extra_whitespaces": False})
    assert len(spaced.pieces("red  circle")) == len(usual.pieces("red  circle")) + 1
    left_out = {name: value for name, value in values.items() if "space" not in name and "_id" not in name}
    assert Tokenizer.from_gguf(left_out).to_bytes() == usual.to_bytes()


def with_item(items, item, index=5):
    return [*items[:index], item, *items[index + 1:]]


@pytest.mark.parametrize(("name", "spoil", "message"), [
    ("model", lambda value: "llama", "holds a tokenizer of the kind 'llama'; expected 't5'"),
    ("model", lambda value: None, "of the kind None"),
    ("model", lambda value: ["t5"], r"of the kind \['t5'\]"),
    ("tokens", lambda value: None, "tokens is missing; expected a list of 1 to 1048576 texts"),
    ("tokens", lambda value: "red", "tokens is str; expected a list"),
    ("tokens", lambda value: [], "a list of 0 items; expected a list of 1"),
    ("tokens", lambda value: [*value, *["x"] * MAX_ITEMS], "items; expected a list of 1 to 1048576"),
    ("tokens", lambda value: with_item(value, 7), "tokens has '7' in place 5; expected texts"),
    ("tokens", lambda value: with_item(value, ""), "piece 5 is '' of 0 bytes"),
    ("tokens", lambda value: with_item(value, "a\0b"), "none of them zero"),
    ("tokens", lambda value: with_item(value, "é" * MAX_PIECE), f"of {2 * MAX_PIECE} bytes; expected 1 to {MAX_PIECE}"),
    ("tokens", lambda value: with_item(value, value[6]), "only [0-9]+ different ones"),
    ("tokens", lambda value: value[:-1], "pieces, .* scores and .* types; expected as many of each"),
    ("scores", lambda value: value[:-1], "expected as many of each"),
    ("scores", lambda value: with_item(value, math.nan), "scores has 'nan' in place 5"),
    ("scores", lambda value: with_item(value, 1e300), "scores has '1e.300' in place 5"),
    ("scores", lambda value: with_item(value, 1), "scores has '1' in place 5; expected float32 numbers"),
    ("token_type", lambda value: value[:-1], "expected as many of each"),
    ("token_type", lambda value: with_item(value, 7), "expected whole numbers from 1 to 6"),
    ("token_type", lambda value: with_item(value, True), "token_type has 'True'"),
    ("token_type", lambda value: with_item(value, 2), "2 pieces for unknown text; expected one"),
    ("token_type", lambda value: with_item(value, 1), "vocabulary of x.gguf .* is not a readable SentencePiece model"),
    ("token_type", lambda value: with_item(value, 1, 0), "pad id -1 and eos id 1"),
    ("precompiled_charsmap", lambda value: "table", "precompiled_charsmap is str; expected a list"),
    ("precompiled_charsmap", lambda value: with_item(value, 256), "has '256' in place 5; expected bytes"),
    ("precompiled_charsmap", lambda value: value[:99], "is not a readable SentencePiece model"),
    ("add_space_prefix", lambda value: 1, "add_space_prefix is '1'; expected true or false"),
    ("remove_extra_whitespaces", lambda value: [True], "expected true or false"),
    ("eos_token_id", lambda value: 10**9, "eos_token_id is '1000000000'; expected the number of one of its"),
    ("padding_token_id", lambda value: -1, "padding_token_id is '-1'"),
    ("padding_token_id", lambda value: 1, "pad id 1 and eos id 1"),
    ("eos_token_id", lambda value: 1.0, "eos_token_id is '1.0'"),
])
def test_unsound_values_are_refused(values, name, spoil, message):
    """Promise: whatever a header says, the error names the file and what is wrong, before SentencePiece can fail."""
    key = f"tokenizer.ggml.{name}"
    spoilt = spoil(values[key])
    changed = {other: value for other, value in values.items() if other != key or spoilt is not None}
    if spoilt is not None:
        changed[key] = spoilt
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_gguf(changed, "x.gguf")
    assert "x.gguf" in str(caught.value) or "expected 0 and 1 as in T5" in str(caught.value)
