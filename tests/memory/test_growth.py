"""Memory of the host over many runs."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan_core import generate, load_experts, load_model, load_text_encoder, load_vae
from wan_core.memory import Layout, OneAtATime, Plan

STATM = Path("/proc/self/statm")


def private_bytes() -> int:
    """Memory of this process that is not a view of files."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * 4096


def alive() -> int:
    gc.collect()
    # Asking a thing whether it is one would wake lazy modules, which warn.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not STATM.exists(), reason="the system does not say memory in Linux's way")
@pytest.mark.parametrize("load", [load_model, pytest.param(load_experts, marks=pytest.mark.slow)],
                         ids=["single", "experts"])
def test_twenty_runs_do_not_grow(load):
    """Promise: from the fourth to the twentieth run, with blocks that come and go, memory grows by less than a frame
    buffer, and no tensor is left over."""
    placement = OneAtATime("cpu")
    parts = {"model": replace(load(placement=placement), plan=Plan(Layout(6, 2), 16)),
             "vae": load_vae(placement=placement), "text_encoder": load_text_encoder(placement=placement)}
    tensors, nbytes = [], []
    for seed in range(20):
        generate("a red circle moving left", **parts, width=32, height=32, frames=5, steps=2, seed=seed)
        tensors.append(alive())
        nbytes.append(private_bytes())
    assert len(set(tensors[1:])) == 1
    assert nbytes[-1] - nbytes[3] < 3 << 20
