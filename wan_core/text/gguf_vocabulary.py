"""The SentencePiece model of a GGUF text encoder, put together again from the values in the file's header.

llama.cpp's converter takes a `spiece.model` apart into three lists, of pieces, scores and types, the table by which
text is normalised, and a few switches (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer"). Here
they become a SentencePiece model again, message by message in protobuf's encoding
(https://protobuf.dev/programming-guides/encoding), which is less than a library would cost. The field numbers are those
of SentencePiece's `sentencepiece_model.proto`. The values come from a download and are trusted in nothing.
"""

import logging
import struct
from collections.abc import Callable, Mapping

_PREFIX = "tokenizer.ggml."
GGUF_PIECES = _PREFIX + "tokens"

# UMT5 has 256,384 pieces, none of which is longer than 48 bytes, and a normalisation table of 240 kB.
MAX_ITEMS = 1 << 20
MAX_PIECE = 1024

# SentencePiece's types; its Unigram model is number 1.
_UNKNOWN, _BYTE, _LAST_TYPE = 2, 6, 6
_UNIGRAM = 1

_ADVICE = "Download the file again, or give google/umt5-xxl's spiece.model."

logger = logging.getLogger(__name__)


def sentencepiece_model(values: Mapping[str, object], source: str = "GGUF header") -> bytes:
    """The serialised SentencePiece model of a T5 vocabulary.

    values: the header's, by their full names, arrays as lists. `source` names the file in messages. Without a table of
    normalisation (`precompiled_charsmap`) there is a warning, because text is then taken as it is typed.
    Raises ValueError for another kind of vocabulary, and for values that are missing, of a wrong type or size, or
    contradict each other.
    """
    kind = values.get(_PREFIX + "model")
    if kind != "t5":
        raise ValueError(f"{source} holds a tokenizer of the kind {kind!r}; expected 't5', UMT5's. {_ADVICE}")
    pieces = _items(values, source, "tokens", "texts", lambda item: type(item) is str)
    # Compared like this, NaN is refused, too.
    scores = _items(values, source, "scores", "float32 numbers", lambda item: type(item) is float and abs(item) < 3e38)
    types = _items(values, source, "token_type", f"whole numbers from 1 to {_LAST_TYPE}",
                   lambda item: type(item) is int and 1 <= item <= _LAST_TYPE)
    if not len(pieces) == len(scores) == len(types):
        raise ValueError(f"{source} holds {len(pieces)} pieces, {len(scores)} scores and {len(types)} types; expected "
                         f"as many of each. {_ADVICE}")
    texts = _piece_texts(pieces, source)
    charsmap = b""
    if _PREFIX + "precompiled_charsmap" in values:
        charsmap = bytes(_items(values, source, "precompiled_charsmap", "bytes",
                                lambda item: type(item) is int and 0 <= item <= 255))
    else:
        logger.warning("%s holds a tokenizer without its table of normalisation: full-width letters, ligatures and "
                       "combined accents become other tokens than with google/umt5-xxl's spiece.model", source)
    model = [_message(1, _message(1, text) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
             for text, score, kind in zip(texts, scores, types, strict=True)]
    return b"".join([*model, _message(2, _trainer(values, source, texts, types)),
                     _message(3, _normaliser(values, source, charsmap))])


def _trainer(values: Mapping[str, object], source: str, texts: list[bytes], types: list[int]) -> bytes:
    """TrainerSpec. SentencePiece finds the special pieces by the texts that stand here, not by their ids."""
    if types.count(_UNKNOWN) != 1:
        raise ValueError(f"{source} holds {types.count(_UNKNOWN)} pieces for unknown text; expected one. {_ADVICE}")
    unknown = types.index(_UNKNOWN)
    end, pad = _id(values, source, "eos_token_id", 1, texts), _id(values, source, "padding_token_id", 0, texts)
    # Fields 40 to 43 are the ids and 45 to 48 the texts; there is no piece for the beginning.
    return b"".join([
        _number(3, _UNIGRAM), _number(4, len(texts)), _number(35, _BYTE in types), _number(40, unknown),
        _number(41, -1), _number(42, end), _number(43, pad), _message(45, texts[unknown]), _message(47, texts[end]),
        _message(48, texts[pad])])


def _normaliser(values: Mapping[str, object], source: str, charsmap: bytes) -> bytes:
    """NormalizerSpec."""
    return b"".join([
        _message(1, b"user_defined" if charsmap else b"identity"), _message(2, charsmap),
        _number(3, _switch(values, source, "add_space_prefix")),
        _number(4, _switch(values, source, "remove_extra_whitespaces"))])


def _items(values: Mapping[str, object], source: str, name: str, what: str, sound: Callable[[object], bool]) -> list:
    """A list of the header. `what` says in words of what it must be."""
    items = values.get(_PREFIX + name)
    if type(items) is not list or not 0 < len(items) <= MAX_ITEMS:
        found = f"a list of {len(items)} items" if type(items) is list else type(items).__name__
        raise ValueError(f"{source}: {_PREFIX + name} is {'missing' if items is None else found}; expected a list of "
                         f"1 to {MAX_ITEMS} {what}. {_ADVICE}")
    for index, item in enumerate(items):
        if not sound(item):
            raise ValueError(f"{source}: {_PREFIX + name} has {str(item)[:40]!r} in place {index}; expected {what}. "
                             f"{_ADVICE}")
    return items


def _piece_texts(pieces: list[str], source: str) -> list[bytes]:
    texts = [piece.encode() for piece in pieces]
    for index, text in enumerate(texts):
        if not 0 < len(text) <= MAX_PIECE or b"\0" in text:
            raise ValueError(f"{source}: piece {index} is {pieces[index][:40]!r} of {len(text)} bytes; expected 1 to "
                             f"{MAX_PIECE} bytes, none of them zero. {_ADVICE}")
    if len(set(texts)) < len(texts):
        raise ValueError(f"{source} holds {len(texts)} pieces and only {len(set(texts))} different ones. {_ADVICE}")
    return texts


def _id(values: Mapping[str, object], source: str, name: str, default: int, texts: list[bytes]) -> int:
    number = values.get(_PREFIX + name, default)
    if type(number) is not int or not 0 <= number < len(texts):
        raise ValueError(f"{source}: {_PREFIX + name} is {str(number)[:40]!r}; expected the number of one of its "
                         f"{len(texts)} pieces. {_ADVICE}")
    return number


def _switch(values: Mapping[str, object], source: str, name: str) -> bool:
    value = values.get(_PREFIX + name, True)
    if type(value) is not bool:
        raise ValueError(f"{source}: {_PREFIX + name} is {str(value)[:40]!r}; expected true or false. {_ADVICE}")
    return value


def _number(field: int, value: int) -> bytes:
    """A field that is a whole number. Negative ones are written in 64 bits."""
    return _varint(field << 3) + _varint(value & (1 << 64) - 1)


def _message(field: int, content: bytes) -> bytes:
    """A field that is a text, bytes or a message."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    if value < 128:
        return bytes((value,))
    return bytes((value & 127 | 128,)) + _varint(value >> 7)
