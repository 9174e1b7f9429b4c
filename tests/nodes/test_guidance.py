"""Wan Guidance, Wan NAG, Wan Skip Layers: what they set, that each leaves the others alone, what they refuse."""

import pytest
import torch


@pytest.fixture
def sample(call, nano):
    """Two steps of a nano model on a small latent."""
    def run(model, guidance=3.0):
        return call("WanCoreSampler", model=model, positive=nano["positive"], negative=nano["negative"], steps=2,
                    guidance=guidance, seed=4, latent={"samples": torch.zeros(1, 16, 1, 4, 4)})[0]["samples"]

    return run


def test_as_they_are_placed(call, sample):
    """Promise: Wan Guidance changes no bit and leaves no trace, NAG and skipped blocks do; the model they got stays."""
    model, = call("WanCoreModelLoader")
    neutral, = call("WanCoreGuidance", model=model)
    assert neutral.guidance.record() == {} and torch.equal(sample(neutral), sample(model))
    for other in (call("WanCoreNAG", model=model)[0], call("WanCoreSkipLayers", model=model, blocks="2")[0]):
        assert not torch.equal(sample(other), sample(model))
    assert model.guidance.record() == {}


def test_nag_works_at_guidance_one_and_scale_one_is_off(call, sample):
    """Promise: NAG changes the video where there is no guidance; at scale 1 not a bit, and again after a chain."""
    model, = call("WanCoreModelLoader")
    on, off = (call("WanCoreNAG", model=model, scale=scale)[0] for scale in (5.0, 1.0))
    assert not torch.equal(sample(on, 1.0), sample(model, 1.0))
    assert torch.equal(sample(off, 1.0), sample(model, 1.0))
    assert call("WanCoreNAG", model=on, scale=1.0)[0].guidance.nag is None


def test_every_widget_arrives(call):
    """Promise: chained in any order, the three nodes set what their widgets say and nothing of each other."""
    widgets = {
        "WanCoreGuidance": {"start_sigma": 0.9, "end_sigma": 0.1, "scales": "6*2, 1", "cfg_zero_star": True,
                            "zero_steps": 2, "apg": True, "apg_eta": 0.5, "apg_momentum": 0.25, "apg_threshold": 55.0,
                            "apg_unit": "whole tensor", "batched": "off"},
        "WanCoreNAG": {"scale": 6.0, "tau": 3.5, "alpha": 0.5, "end_sigma": 0.75},
        "WanCoreSkipLayers": {"blocks": "1-2", "start_sigma": 0.8, "end_sigma": 0.2, "scale": 3.0}}
    models = []
    for order in (list(widgets), list(widgets)[::-1]):
        model, = call("WanCoreModelLoader")
        for name in order:
            model, = call(name, model=model, **widgets[name])
        models.append(model)
    assert models[0].guidance == models[1].guidance
    assert models[0].guidance.record() == {
        "sigmas": {"start": 0.9, "end": 0.1}, "scales": [6.0, 6.0, 1.0], "zero_star": True, "zero_steps": 2,
        "projection": {"eta": 0.5, "momentum": 0.25, "threshold": 55.0, "per_element": False},
        "skipped": {"blocks": [1, 2], "scale": 3.0, "sigmas": {"start": 0.8, "end": 0.2}},
        "nag": {"scale": 6.0, "tau": 3.5, "alpha": 0.5}, "nag_end": 0.75, "batched": "off"}


@pytest.mark.parametrize(("node", "widgets", "said"), [
    ("WanCoreGuidance", {"scales": "strong"}, "'strong' is not a guidance scale"),
    ("WanCoreGuidance", {"start_sigma": 0.1, "end_sigma": 0.9}, "high to low"),
    ("WanCoreSkipLayers", {"blocks": "9"}, "the model has blocks 0 to 5"),
    ("WanCoreSkipLayers", {"blocks": ""}, "no block is named")])
def test_what_cannot_be_meant_is_refused(call, node, widgets, said):
    """Promise: the node itself says what is wrong, before a sampler runs."""
    model, = call("WanCoreModelLoader")
    with pytest.raises(ValueError, match=said):
        call(node, model=model, **widgets)
