"""The step-cache nodes: what they put on a model, what they leave alone, what they refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

NODES = ("WanCoreStepCache", "WanCoreTeaCache", "WanCoreMagCache", "WanCoreEasyCache")


@pytest.fixture
def released(module, nano):
    """A model with the preset of a released one; its weights do not matter here."""
    return lambda name: replace(nano["model"], preset=module("wan_core.presets").PRESETS[name])


@pytest.fixture
def calibration(module, tmp_path, monkeypatch):
    """The name of a file that was measured on the nano model, in the user's folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "output" / "wan-calibrations"
    folder.mkdir(parents=True)
    cache = module("wan_core.cache")
    polynomial = cache.Polynomial("low", "e0", (1.0, 0.0), (0.1, 1.0))
    measured = cache.Calibration("nano_t2v", (1.0, 0.99, 0.98), (), (polynomial,))
    cache.write_calibration(measured, folder / "a.json")
    return "a.json"


def test_defaults_are_published(call, module, released):
    """Promise: a new node takes what its authors published for the model, and the model that goes in stays as it is."""
    cache = module("wan_core.cache")
    model = released("wan21_t2v_14b")
    expected = (cache.AutoCache("balanced"), cache.TeaCache(0.15), cache.MagCache(0.12, 4), cache.EasyCache(0.05))
    for node, wanted in zip(NODES, expected, strict=True):
        assert call(node, model=model)[0].cache == wanted and model.cache is None
    assert call("WanCoreMagCache", model=released("wan22_i2v_a14b"))[0].cache == cache.MagCache(0.06, 2, 0.1, False)


def test_every_widget_acts(call, module, released, nano, calibration):
    """Promise: quality and range count always, numbers of one's own with quality custom only."""
    cache, model = module("wan_core.cache"), released("wan21_t2v_14b")
    numbers = {"WanCoreTeaCache": {"threshold": 0.3}, "WanCoreEasyCache": {"threshold": 0.3, "warm_up": 0.1},
               "WanCoreMagCache": {"threshold": 0.3, "longest": 3, "retention": 0.5}}
    for node, own in numbers.items():
        span = {"start_sigma": 0.9, "end_sigma": 0.1}
        plain, = call(node, model=model, quality="fast", **span)
        assert call(node, model=model, quality="fast", **span, **own)[0].cache == plain.cache
        custom = call(node, model=model, quality="custom", **span, **own)[0].cache
        assert custom == replace(plain.cache, **own) and (custom.start, custom.end) == (0.9, 0.1)
    assert call("WanCoreTeaCache", model=model, retention="no")[0].cache == cache.TeaCache(0.15, False)
    auto, = call("WanCoreStepCache", model=model, quality="fast")
    assert auto.cache.quality == "fast" and call("WanCoreStepCache", model=auto, cache="off")[0].cache is None
    for node in ("WanCoreTeaCache", "WanCoreMagCache"):
        assert call(node, model=nano["model"], calibration=calibration)[0].cache.measured.preset == "nano_t2v"


def test_what_is_refused(call, nano, released, calibration):
    """Promise: a model without numbers, another model's calibration and a missing file are refused, with what to do."""
    for node in ("WanCoreTeaCache", "WanCoreMagCache"):
        with pytest.raises(ValueError, match="for nano_i2v. Choose EasyCache"):
            call(node, model=released("nano_i2v"))
        with pytest.raises(ValueError, match="measured on nano_t2v, and this model is wan21_t2v_14b"):
            call(node, model=released("wan21_t2v_14b"), calibration=calibration)
        with pytest.raises(ValueError, match="none.json cannot be read"):
            call(node, model=nano["model"], calibration="none.json")
        with pytest.raises(ValueError, match="no calibration '../a.json'"):
            call(node, model=nano["model"], calibration="../a.json")
    with pytest.raises(ValueError, match="from sigma 0.1 to 0.5"):
        call("WanCoreEasyCache", model=nano["model"], start_sigma=0.1, end_sigma=0.5)


def test_calibrations_of_the_user_are_offered(pack, calibration):
    """Promise: the list has what was measured, behind the published numbers, and nothing from elsewhere."""
    for name in ("WanCoreTeaCache", "WanCoreMagCache"):
        inputs = pack.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
        assert inputs["required"]["calibration"][0] == ["published", "a.json"]


def test_a_changed_calibration_is_read_again(pack, calibration):
    """Promise: ComfyUI keeps the output of a node only as long as its calibration file stays the same."""
    for name in ("WanCoreTeaCache", "WanCoreMagCache"):
        changed = pack.NODE_CLASS_MAPPINGS[name].IS_CHANGED
        before = changed(calibration=calibration, quality="fast")
        with Path("output", "wan-calibrations", calibration).open("a", encoding="utf-8") as file:
            file.write(" ")
        assert changed(calibration=calibration) != before and changed(calibration="none.json") == "missing"


def test_in_the_sampler(call, nano):
    """Promise: the sampler runs a model with a cache, which changes the video, the less the better its quality."""
    def sample(model) -> torch.Tensor:
        return call("WanCoreSampler", model=model, positive=nano["positive"], negative=nano["negative"], steps=12,
                    seed=4, latent={"samples": torch.zeros(1, 16, 1, 4, 4)})[0]["samples"]

    full = sample(nano["model"])
    fast, fine = (sample(call("WanCoreEasyCache", model=nano["model"], quality=quality)[0]) - full
                  for quality in ("fast", "quality"))
    assert 0.5 * full.norm() > fast.norm() > 1.5 * fine.norm()
    assert torch.equal(sample(call("WanCoreStepCache", model=nano["model"], cache="off")[0]), full)
