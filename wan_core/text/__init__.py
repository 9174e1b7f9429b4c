"""Text conditioning: prompt cleaning and weighting, the SentencePiece tokenizer and the UMT5 encoder."""

from .clean import clean_prompt
from .encode import encode_pieces, encode_prompts, weighted_pieces
from .gguf_vocabulary import GGUF_PIECES
from .tokenizer import Tokenizer
from .umt5 import UMT5Encoder
from .weighting import parse_weights

__all__ = [
    "GGUF_PIECES", "Tokenizer", "UMT5Encoder", "clean_prompt", "encode_pieces", "encode_prompts", "parse_weights",
    "weighted_pieces",
]
