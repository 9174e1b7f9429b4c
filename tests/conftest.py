"""Fixtures for tests of whole models, and one thread for each of the processes that the tests run in."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before PyTorch is imported: threads of processes that share cores wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.small_models import write_text_encoder, write_transformer, write_vae  # noqa: E402


@dataclass(frozen=True)
class Files:
    """Paths of one checkpoint of each kind."""

    vae: Path
    text_encoder: Path
    model: Path
    high: Path
    low: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    """Checkpoints of the nano architectures with random weights: for tests that need no trained ones."""
    folder = tmp_path_factory.mktemp("models")
    return Files(vae=write_vae(folder / "vae.safetensors"),
                 text_encoder=write_text_encoder(folder / "text_encoder.safetensors"),
                 model=write_transformer(folder / "model.safetensors"),
                 high=write_transformer(folder / "high.safetensors", seed=1),
                 low=write_transformer(folder / "low.safetensors", seed=2))
