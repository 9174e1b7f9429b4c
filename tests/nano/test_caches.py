"""What step caches save on the nano models, and what they cost."""

import json

import pytest

from wan_core import load_experts, load_model, load_text_encoder, load_vae, nano
from wan_core.training.evaluate import evaluate_caches

SCORES = ("colour", "direction", "shape")


@pytest.mark.parametrize("load", [load_model, pytest.param(load_experts, marks=pytest.mark.slow)])
def test_balanced_caches_make_nearly_the_same_videos(load):
    """Promise: at 30 steps every balanced cache reuses 40 % of the passes or more, and the clips stay within 25 dB of
    those of the whole run."""
    rows = dict(evaluate_caches(load(), load_vae(), load_text_encoder(), prompts=2, qualities=("balanced",)))
    assert rows.pop("none").reused == 0 and len(rows) == 3
    assert all(row.reused >= 40 and row.psnr_db >= 25 for row in rows.values()), rows


def test_recorded_caches_keep_the_promises():
    """Promise: on 128 prompts every balanced cache reuses 40 % of the passes or more at 30 steps, scores within two
    points of the whole run, and stays within 25 dB of it; a cache of less quality reuses as much or more."""
    figures = json.loads((nano.VAE.parent / "caches.json").read_text())
    assert set(figures) == {"nano_t2v", "nano_t2v_a"}
    for rows in figures.values():
        whole = rows["none"]
        assert all(row["prompts"] == 128 and row["steps"] == 30 for row in rows.values()) and whole["reused"] == 0
        for cache in ("TeaCache", "MagCache", "EasyCache"):
            fine, balanced, fast = (rows[f"{cache}, {quality}"] for quality in ("quality", "balanced", "fast"))
            assert balanced["reused"] >= 40 and balanced["psnr_db"] >= 25
            assert all(balanced[part] >= whole[part] - 2 for part in SCORES)
            assert fine["reused"] <= balanced["reused"] <= fast["reused"]
