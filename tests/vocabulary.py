"""SentencePiece models taken apart as llama.cpp's converter stores them, and small GGUF files that hold them."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import sentencepiece
from torch import Tensor

from wan_core.weights import open_weights
from wan_core.weights.dialects import UMT5_GGUF
from wan_core.weights.dialects.names import translate


def protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Length-delimited fields of a protobuf message (the others are skipped)."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            varint()
        elif kind == 5:
            position += 4
        else:
            assert kind == 2
            size = varint()
            yield field, data[position:position + size]
            position += size


def piece_type(processor: sentencepiece.SentencePieceProcessor, index: int) -> gguf.TokenType:
    """As llama.cpp's converter tells them."""
    for name in ("unknown", "control", "unused", "byte"):
        if getattr(processor, f"is_{name}")(index):
            return gguf.TokenType[name.upper()]
    return gguf.TokenType.NORMAL


def add_vocabulary(writer: gguf.GGUFWriter, model: bytes, pads: int = 0, charsmap: bool = True) -> None:
    """Give a GGUF file a SentencePiece model, with `pads` unused pieces after its own; `charsmap` False: as T5's
    converters did at first, without the table of normalisation."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    count = processor.get_piece_size()
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i) for i in range(count)] + [f"[PAD{i}]" for i in range(pads)])
    writer.add_token_scores([processor.get_score(i) for i in range(count)] + [-10000.0] * pads)
    writer.add_token_types([piece_type(processor, i) for i in range(count)] + [gguf.TokenType.UNUSED] * pads)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    if charsmap:
        writer.add_precompiled_charsmap(dict(protobuf_fields(dict(protobuf_fields(model))[3]))[2])
    writer.add_unk_token_id(processor.unk_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_pad_token_id(processor.pad_id())


def write_gguf(path: Path, tensors: dict[str, Tensor], model: bytes | None, pads: int = 0, charsmap: bool = True,
               ) -> Path:
    """A file of the architecture "t5encoder" with these tensors, in float32, and this SentencePiece model."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    if model is not None:
        add_vocabulary(writer, model, pads, charsmap)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf_text_encoder(path: Path, source: Path, *, tokenizer: bool = True) -> Path:
    """The text encoder of a safetensors file with a tokenizer inside, as a GGUF file."""
    with open_weights(source) as file:
        names = {official: stored for stored, official in UMT5_GGUF.items()}
        model = file["spiece_model"].numpy().tobytes()
        tensors = {translate(name, names): file[name] for name in file if name != "spiece_model"}
        rows = len(file["token_embedding.weight"])
    pads = rows - sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return write_gguf(path, tensors, model if tokenizer else None, pads)
