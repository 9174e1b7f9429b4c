"""MagCache against the published decisions, and against diffusers' hook where that has the same rule."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import MagCacheConfig, apply_mag_cache

from tests.cache.runs import run_of, steps_in, where
from wan_core.cache import Calibration, MagCache
from wan_core.cache.magcache import magcache_skips, published_ratios

# preset, first frame given, steps, high-noise steps, threshold, K, retention, reused by the positive branch, by the
# negative one if otherwise. Worked out from the authors' code and their tables, by other code than this pack's.
DECISIONS = [
    ("wan21_t2v_1_3b", False, 50, 0, 0.12, 2, 0.2,
     "10-11 13-14 16-17 19-20 22-23 25-26 28-29 31-32 34-35 37-38 40-41 43 45 47", None),
    ("wan21_t2v_1_3b", False, 50, 0, 0.12, 4, 0.2, "10-13 15-18 20-23 25-28 30-33 35-37 39-40 42-43 45 47", None),
    ("wan21_t2v_1_3b", False, 30, 0, 0.12, 4, 0.2, "6-9 11-14 16-19 21-23 25-26 28", None),
    ("wan21_t2v_14b", False, 50, 0, 0.24, 6, 0.2, "10-15 17-22 24-29 31-35 37-40 42-43 45-46 48", None),
    ("wan21_t2v_14b", False, 30, 0, 0.24, 6, 0.2, "6-11 13-18 20-23 25-26 28", None),
    ("wan21_i2v_14b_480p", False, 40, 0, 0.24, 6, 0.2, "8-13 15-19 21-24 26-29 31-33 35-36 38", None),
    ("wan21_i2v_14b_720p", False, 40, 0, 0.24, 6, 0.2, "8-13 15-20 22-26 28-31 33-34 36-37 39", None),
    ("wan21_vace_1_3b", False, 50, 0, 0.02, 3, 0.2,
     "10-12 14-16 18-20 22-23 25-26 28-29 31-32 34 36 38 40", None),
    ("wan22_ti2v_5b", False, 50, 0, 0.06, 2, 0.2,
     "10-11 13-14 16-17 19-20 22-23 25-26 28-29 31-32 34-35 37 39 41 43 45 47 49", None),
    ("wan22_ti2v_5b", True, 50, 0, 0.06, 2, 0.2,
     "10-11 13-14 16-17 19-20 22-23 25-26 28-29 31-32 34-35 37 39 41 43 45 49", None),
    ("wan22_t2v_a14b", False, 40, 26, 0.06, 2, 0.4, "10-11 13-14 16-17 19-20 22-23 25 32 34 36", None),
    ("wan22_i2v_a14b", False, 40, 15, 0.06, 2, 0.1, "18-19 21-22 24-25 27 29 31 33",
     "17-18 20-21 23-24 26-27 29 31 33"),
]


@pytest.mark.parametrize("case", DECISIONS, ids=lambda case: f"{case[0]}-{case[2]}-{case[5]}")
def test_published_decisions(case):
    """Promise: with the published tables and settings exactly the steps of the published code are reused."""
    preset, known, steps, high, threshold, longest, retention, positive, negative = case
    run = run_of(steps, preset, high, known_frames=known)
    cache = MagCache(threshold, longest, retention, high_noise=preset != "wan22_i2v_a14b")
    plans = [cache.plan(run, expert) for expert in ("high", "low")]
    for branch, expected in (("positive", positive), ("negative", negative or positive)):
        reused = [any(flags) for flags in zip(*(plan[branch] for plan in plans))]
        assert where(reused) == steps_in(expected)
    if preset.startswith("wan22"):
        assert cache == MagCache.for_preset(preset)


def test_the_tables():
    """Promise: nine tables, for each branch a number for each published step, falling below 1 at the end."""
    tables = published_ratios()
    assert len(tables) == 9
    for name, table in tables.items():
        count = 40 if "i2v_14b" in name or "a14b" in name else 50
        assert len(table.positive) == len(table.negative) == count
        assert table.positive[0] == table.negative[0] == 1.0 and table.positive[-1] < 0.98


@pytest.mark.parametrize("branch", [0, 1])
def test_the_switch_is_not_passed(branch):
    """Promise: the ratio at the switch, 0.65, enters no decision: nothing of the high-noise expert is left there."""
    name = ("positive", "negative")[branch]
    table = published_ratios()["wan22_t2v_a14b"]
    plan = MagCache(0.06, 2, 0.0).plan(run_of(40, "wan22_t2v_a14b", 26), "low")
    low = table.ratios(name, 40)[26:]
    # As a run of its own the low-noise expert would decide the same.
    alone = magcache_skips(low, [index > 0 for index in range(14)], 0.06, 2)
    assert plan[name][26:] == alone and any(alone)


def published_rule(ratios: list[float], threshold: float, longest: int, retention: float) -> list[tuple[bool, bool]]:
    """What the authors' code does, call by call: `ratios` have one for each call, the branches taking turns."""
    product, count, error, skips = [1.0, 1.0], [0, 0], [0.0, 0.0], []
    for call, ratio in enumerate(ratios):
        side, skip = call % 2, False
        if call >= int(len(ratios) * retention):
            product[side] = product[side] * ratio
            count[side] += 1
            error[side] += abs(1 - product[side])
            skip = error[side] < threshold and count[side] <= longest
            if not skip:
                product[side], count[side], error[side] = 1.0, 0, 0.0
        skips.append(skip)
    return list(zip(skips[::2], skips[1::2]))


def test_random_tables():
    """Promise: for any ratios, above 1 too, and any settings the decisions are those of the published rule."""
    torch.manual_seed(0)
    seen = set()
    for trial in range(60):
        steps = int(torch.randint(2, 60, ()))
        ratios = (1 + 0.05 * torch.randn(2 * steps).double()).tolist()
        threshold, longest = float(torch.rand(())) * 0.3 + 0.001, 1 + trial % 7
        retention = (0.1, 0.25, 0.4)[trial % 3]
        if int(2 * steps * retention) < 2:
            continue
        measured = Calibration("x", tuple(ratios[::2]), tuple(ratios[1::2]))
        plan = MagCache(threshold, longest, retention, measured=measured).plan(run_of(steps, "x"), "low")
        expected = published_rule(ratios, threshold, longest, retention)
        assert list(zip(plan["positive"], plan["negative"])) == expected
        seen |= set(expected)
    assert len(seen) == 4


@pytest.mark.parametrize("steps, threshold, longest", [(30, 0.12, 4), (20, 0.05, 2)])
def test_as_diffusers(steps, threshold, longest):
    """Promise: diffusers' hook skips the same steps where its rule is the same: one list, no error right at the
    threshold (where it skips), a whole number of retention steps (it rounds, the authors cut), and no table index
    halfway between two."""
    table = published_ratios()["wan21_t2v_1_3b"].positive
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=2, out_channels=2, text_dim=4, freq_dim=8,
        ffn_dim=12, num_layers=2, rope_max_seq_len=8)
    apply_mag_cache(model, MagCacheConfig(threshold=threshold, max_skip_steps=longest, retention_ratio=0.2,
                                          num_inference_steps=steps, mag_ratios=list(table)))
    computed: list[int] = []
    model.blocks[1].attn1.register_forward_hook(lambda *_arguments: computed.append(index))
    with torch.no_grad(), model.cache_context("cond"):
        for index in range(steps):
            model(torch.randn(1, 2, 1, 2, 2), torch.tensor([1000.0 - index]), torch.randn(1, 3, 4))
    run = run_of(steps, "wan21_t2v_1_3b", branches=(("positive",),) * steps)
    plan = MagCache(threshold, longest, 0.2).plan(run, "low")["positive"]
    assert sorted({*range(steps)} - {*where(plan)}) == computed and any(plan)
