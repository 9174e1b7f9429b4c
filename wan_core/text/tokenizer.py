"""SentencePiece tokenizer with T5's conventions: pad 0, end-of-sequence 1, no start token.

The model is read from a ``spiece.model`` file, from the ``spiece_model`` byte tensor that repackaged text-encoder
checkpoints carry, or from the header of a GGUF file, so no tokenizer folder is needed. Ids agree with Hugging Face's T5
tokenizer for the same model, but for two things that SentencePiece itself (and so ComfyUI) decides: a character outside
the vocabulary becomes its UTF-8 bytes where the model has pieces for them, not one unknown token; and a prompt that
spells a special token ("</s>", "<extra_id_0>") is ordinary text. Reference: Kudo & Richardson 2018,
https://arxiv.org/abs/1808.06226.
"""

import logging
import os
from collections.abc import Mapping, Sequence

import sentencepiece
import torch
from torch import Tensor

from .gguf_vocabulary import sentencepiece_model

PAD_ID = 0
EOS_ID = 1

logger = logging.getLogger(__name__)


class Tokenizer:
    """Text to ids. Made with from_file, from_bytes, from_tensor or from_gguf."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        """Wrap a loaded processor; ValueError if its pad and end-of-sequence ids are not T5's (0 and 1)."""
        if processor.pad_id() != PAD_ID or processor.eos_id() != EOS_ID:
            raise ValueError(f"SentencePiece model has pad id {processor.pad_id()} and eos id {processor.eos_id()}; "
                             f"expected {PAD_ID} and {EOS_ID} as in T5/UMT5: this is another model's tokenizer")
        self._processor = processor

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a SentencePiece model file. ValueError if it is missing, cut short or something else."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ValueError(f"cannot read tokenizer {os.fspath(path)}: {error.strerror}; expected a SentencePiece "
                             "model such as google/umt5-xxl's spiece.model") from error
        return cls.from_bytes(data, source=os.fspath(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "tokenizer data") -> "Tokenizer":
        """Read a serialised SentencePiece model. `source` names the data in errors. ValueError if it is not one."""
        advice = "; expected a whole SentencePiece model: fetch the file again, or give google/umt5-xxl's spiece.model"
        # SentencePiece takes empty input for an empty model and fails only at the first use.
        if not data:
            raise ValueError(f"{source} is empty{advice}")
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(bytes(data))
        except RuntimeError as error:
            raise ValueError(f"{source} ({len(data)} bytes) is not a readable SentencePiece model{advice}") from error
        return cls(processor)

    @classmethod
    def from_tensor(cls, spiece_model: Tensor) -> "Tokenizer":
        """Read the one-dimensional uint8 tensor `spiece_model` of a repackaged text-encoder checkpoint."""
        if spiece_model.dtype != torch.uint8 or spiece_model.ndim != 1:
            raise ValueError(f"spiece_model is {spiece_model.dtype} of shape {tuple(spiece_model.shape)}; expected a "
                             "one-dimensional uint8 tensor holding a SentencePiece model")
        return cls.from_bytes(spiece_model.cpu().numpy().tobytes(), source="tensor spiece_model")

    @classmethod
    def from_gguf(cls, values: Mapping[str, object], source: str = "GGUF header") -> "Tokenizer":
        """Read the vocabulary among a GGUF header's values; see `sentencepiece_model`. ValueError if it is unsound."""
        return cls.from_bytes(sentencepiece_model(values, source), source=f"the vocabulary of {source}")

    @property
    def vocab_size(self) -> int:
        """Number of pieces; the encoder's embedding may have more rows (padding, extra ids), never fewer."""
        return self._processor.get_piece_size()

    def to_bytes(self) -> bytes:
        """The serialised model, for storing as `spiece_model` beside encoder weights."""
        return self._processor.serialized_model_proto()

    def pieces(self, text: str) -> list[int]:
        """Ids of a text, without end-of-sequence token, padding or limit."""
        return self._processor.encode(text, add_bos=False, add_eos=False)

    def encode(self, texts: Sequence[str], text_len: int = 512) -> tuple[Tensor, Tensor]:
        """Tokenize a batch: ids [B, text_len] int64, mask [B, text_len] bool (True on text and end of sequence).

        Every row ends its text with id 1 and is padded with 0. A longer text keeps its first text_len - 1 pieces.
        """
        return batch([self.pieces(text) for text in texts], text_len)


def batch(rows: Sequence[Sequence[int]], text_len: int) -> tuple[Tensor, Tensor]:
    """Cut, end and pad rows of ids: ids [B, text_len] int64 and mask [B, text_len] bool; see Tokenizer.encode."""
    if text_len < 1:
        raise ValueError(f"text_len is {text_len}; expected at least 1, for the end-of-sequence token")
    if not rows:
        raise ValueError("no text to tokenize; give at least one prompt (an empty string counts)")
    ids = torch.full((len(rows), text_len), PAD_ID, dtype=torch.int64)
    mask = torch.zeros((len(rows), text_len), dtype=torch.bool)
    for i, row in enumerate(rows):
        if len(row) >= text_len:
            logger.warning("prompt %d has %d tokens; only the first %d are used", i + 1, len(row), text_len - 1)
        kept = [*row[:text_len - 1], EOS_ID]
        ids[i, :len(kept)] = torch.tensor(kept, dtype=torch.int64)
        mask[i, :len(kept)] = True
    return ids, mask
