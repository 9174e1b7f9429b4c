"""A tiny tokenizer and encoder that fit each other, made on the spot."""

import io

import pytest
import sentencepiece
import torch

from wan_core.presets import TextEncoderSpec
from wan_core.text import Tokenizer, UMT5Encoder

SENTENCES = [f"A {colour} {shape}, moving {way} (fast) on a {ground} background: 1.5 “fine”."
             for colour in ("red", "green", "blue") for shape in ("circle", "square", "triangle")
             for way in ("left", "right", "up", "down") for ground in ("black", "white")]


@pytest.fixture(scope="session")
def spiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=100, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer(spiece_model) -> Tokenizer:
    return Tokenizer.from_bytes(spiece_model)


@pytest.fixture(scope="session")
def encoder(tokenizer) -> UMT5Encoder:
    torch.manual_seed(0)
    return UMT5Encoder(TextEncoderSpec(vocab_size=tokenizer.vocab_size, dim=32, dim_attn=24, dim_ffn=40, num_heads=3,
                                       num_layers=2))
