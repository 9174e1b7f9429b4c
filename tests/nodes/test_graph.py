"""Nodes joined to graphs, on the bundled nano models and without ComfyUI."""

import pytest
import torch

from wan_core.video import read_metadata, read_video

SMALL = {"width": 32, "height": 32, "length": 5}
QUICK = {"steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def latent(call, nano):
    """A quick sampler run on a small empty latent; keyword arguments change widgets and inputs."""
    def run(model="model", **changes):
        inputs = {"model": nano[model], "positive": nano["positive"], "negative": nano["negative"], **QUICK, **changes}
        if "latent" not in inputs:
            inputs["latent"], = call("WanCoreEmptyLatent", **SMALL)
        return call("WanCoreSampler", **inputs)[0]

    return run


@pytest.fixture(scope="module")
def whole(latent):
    return latent()["samples"]


@pytest.mark.parametrize("model", ["model", "pair"])
def test_graph_makes_a_video_file(call, nano, latent, workspace, model):
    """Promise: loaders, encode, sampler, decode and save make an MP4 of the asked size that holds the graph."""
    images, = call("WanCoreDecode", samples=latent(model), vae=nano["vae"])
    assert images.shape == (5, 32, 32, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    prompt, workflow = {"1": {"class_type": "WanCoreSampler", "inputs": {}}}, {"version": 0.4, "nodes": []}
    result = call("WanCoreSaveVideo", images=images, fps=8.0, prompt=prompt, extra_pnginfo={"workflow": workflow})
    shown, = result["ui"]["images"]
    assert shown == {"filename": "Wan_00001_.mp4", "subfolder": "video", "type": "output"}
    assert result["ui"]["animated"] == (True,)
    file = workspace / "output" / "video" / "Wan_00001_.mp4"
    assert read_video(file).shape == (5, 32, 32, 3)
    assert read_metadata(file) == {"prompt": prompt, "workflow": workflow}
    again = call("WanCoreSaveVideo", images=images)
    assert again["ui"]["images"][0]["filename"] == "Wan_00002_.mp4"


def test_nodes_equal_the_engine(call, nano, module):
    """Promise: the nodes give what `generate` gives, to a level of 8 bits."""
    pipeline, models = module("wan_core.pipeline"), module("wan_core.models")
    prompt = "a red circle moving left"
    expected = pipeline.generate(prompt, model=models.load_model(), width=32, height=32, frames=5, **QUICK)
    empty, = call("WanCoreEmptyLatent", **SMALL)
    samples, = call("WanCoreSampler", model=nano["model"], positive=nano["positive"], negative=nano["negative"],
                    latent=empty, **QUICK)
    images, = call("WanCoreDecode", samples=samples, vae=nano["vae"])
    assert (images * 255 - expected.frames).abs().max() <= 1


@pytest.mark.parametrize("solver", ["euler", "lcm"])
def test_split_run_equals_the_whole(latent, solver):
    """Promise: a run that stops early hands its noise over; a second sampler goes on as if it had not been split."""
    whole = latent(solver=solver, steps=4)
    first = latent(solver=solver, steps=4, end_step=2)
    second = latent(solver=solver, steps=4, start_step=2, add_noise=False, latent=first)
    torch.testing.assert_close(second["samples"], whole["samples"], atol=2e-4, rtol=0)
    assert (first["samples"] - whole["samples"]).abs().max() > 0.1


def test_sigmas_take_the_place_of_steps(latent):
    """Promise: SIGMAS decide the noise levels, whatever steps, shift and denoise say."""
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.0])
    samples = latent(sigmas=sigmas, solver="euler")["samples"]
    assert torch.equal(samples, latent(sigmas=sigmas, solver="euler", steps=9, shift=2.0, denoise=0.5)["samples"])
    assert not torch.equal(samples, latent(sigmas=sigmas.square(), solver="euler")["samples"])


def test_seed_and_settings_decide(latent, whole):
    """Promise: the same seed gives the same latent bit for bit; every widget of the sampler changes it."""
    assert torch.equal(latent()["samples"], whole)
    changes = [{"seed": 8}, {"steps": 4}, {"solver": "dpm++"}, {"shift": 8.0}, {"guidance": 2.0}, {"end_step": 2},
               {"start_step": 1}]
    for change in changes:
        assert not torch.equal(latent(**change)["samples"], whole), change


def test_zero_means_the_official_value(latent, whole, nano):
    """Promise: shift and guidance of 0 are the preset's, and guidance_low of 0 follows guidance."""
    official = nano["model"].preset.sampling
    assert torch.equal(latent(shift=official.shift, guidance=official.guidance_low)["samples"], whole)
    pair = latent("pair", guidance=2.0, guidance_low=2.0)["samples"]
    assert torch.equal(latent("pair", guidance=2.0)["samples"], pair)
    assert not torch.equal(latent("pair", guidance=2.0, guidance_low=3.0)["samples"], pair)


def test_denoise_keeps_what_is_given(call, nano, latent):
    """Promise: denoise below 1 starts from the given latent, and the less of it is made anew the more is kept."""
    given = call("WanCoreEmptyLatent", **SMALL)[0]
    given["samples"] = nano["vae"].encode(torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0)))
    distances = [(latent(latent=given, denoise=denoise)["samples"] - given["samples"]).abs().mean().item()
                 for denoise in (0.1, 0.5, 1.0)]
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[2]


def test_batch(call, nano, latent):
    """Promise: a batch makes one video each, from different noise, and decodes to all their frames in order."""
    empty, = call("WanCoreEmptyLatent", **SMALL, batch_size=2)
    samples = latent(latent=empty)
    assert samples["samples"].shape == (2, 16, 2, 4, 4)
    assert not torch.equal(samples["samples"][0], samples["samples"][1])
    images, = call("WanCoreDecode", samples=samples, vae=nano["vae"])
    alone, = call("WanCoreDecode", samples={"samples": samples["samples"][1:]}, vae=nano["vae"])
    assert images.shape[0] == 10
    torch.testing.assert_close(images[5:], alone, atol=1e-4, rtol=0)


def test_latent_passes_through(call, latent):
    """Promise: the given LATENT is not written to, and entries of other nodes in it are kept."""
    empty, = call("WanCoreEmptyLatent", **SMALL)
    given = {**empty, "another": "entry"}
    result = latent(latent=given)
    assert result["another"] == "entry" and result["samples"] is not given["samples"]
    assert given.keys() == {"samples", "another"} and not given["samples"].any()


def test_equal_prompts_combined_are_one(latent, whole, nano):
    """Promise: combined prompts are averaged by strength, so two equal ones of any strength are as good as one."""
    (embedding, options), = nano["positive"]
    positive = [[embedding, options], [embedding, {**options, "strength": 3.0}]]
    torch.testing.assert_close(latent(positive=positive)["samples"], whole, atol=1e-4, rtol=0)


def test_prompt_ranges(latent, call, nano):
    """Promise: a prompt that is active in part of the run acts in that part alone."""
    (first, _), = nano["positive"]
    (second, _), = call("WanCoreTextEncode", clip=nano["clip"], positive="a blue square moving up")[0]
    halves = [[first, {"start_percent": 0.0, "end_percent": 0.5}], [second, {"start_percent": 0.5, "end_percent": 1.0}]]
    settings = {"steps": 4, "solver": "euler", "shift": 1.0, "guidance": 1.0}
    split = latent(positive=halves, **settings)["samples"]
    start = latent(positive=[[first, {}]], **settings, end_step=2)
    end = latent(positive=[[second, {}]], **settings, start_step=3, add_noise=False,
                 latent=latent(positive=halves, **settings, end_step=3))["samples"]
    torch.testing.assert_close(latent(positive=halves, **settings, end_step=2)["samples"], start["samples"])
    torch.testing.assert_close(split, end, atol=2e-4, rtol=0)
