"""Nodes for VACE, on the bundled text-to-video model with random VACE blocks and without ComfyUI."""

import pytest
import torch

from tests.small_models import write_halves
from wan_core.presets import TRANSFORMERS

SMALL = {"width": 32, "height": 32, "length": 9}
QUICK = {"steps": 2, "seed": 7, "solver": "euler", "guidance": 2.0}


def video(count: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 32, 32, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def control(call, nano):
    """What Wan VACE gives for the nano prompts and VAE."""
    def run(**changes):
        inputs = {"positive": nano["positive"], "negative": nano["negative"], "vae": nano["vae"], **SMALL, **changes}
        return call("WanCoreVace", **inputs)

    return run


@pytest.fixture
def model(call, nano, workspace):
    """The bundled model with a module of random VACE blocks."""
    folder = workspace / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    write_halves(workspace / "unused.safetensors", folder / "module.safetensors", TRANSFORMERS["nano_vace"])
    return call("WanCoreVaceModule", model=nano["model"], module="module.safetensors")[0]


@pytest.fixture
def sample(call, nano, model):
    def run(positive=None, negative=None, latent=None, **changes):
        inputs = {"model": model, "positive": positive or nano["positive"], "negative": negative or nano["negative"],
                  "latent": latent or {"samples": torch.zeros(1, 16, 3, 4, 4)}, **QUICK, **changes}
        return call("WanCoreSampler", **inputs)[0]["samples"]

    return run


def by_hand(vae, clip: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Frames of a control as the core's node makes them: IMAGE [9, 32, 32, 3], grey where the mask [9, 32, 32] is 0
    (the reactive part) or 1 (the inactive one)."""
    mask = mask[..., None]
    return torch.cat([vae.encode((clip - 0.5) * part + 0.5) for part in (1 - mask, mask)], 1)


def test_control_beside_the_prompts(control, nano):
    """Promise: the core's options under the core's names, in lists, for both prompts; what was given is untouched."""
    mask = torch.zeros(9, 32, 32)
    mask[:, :, :16] = 1
    positive, negative, latent, trim = control(control_video=video(), control_masks=mask, strength=0.7,
                                               start_percent=0.1, end_percent=0.6)
    for given, (entry,) in ((nano["positive"], positive), (nano["negative"], negative)):
        options = entry[1]
        assert entry[0] is given[0][0] and "vace_frames" not in given[0][1]
        torch.testing.assert_close(options["vace_frames"][0], by_hand(nano["vae"], video(), mask), atol=1e-4, rtol=0)
        assert options["vace_mask"][0].shape == (1, 64, 3, 4, 4)
        assert options["vace_mask"][0][0, 0, 0, 0].tolist() == [1, 1, 0, 0]
        assert options["vace_strength"] == [0.7] and options["wan_vace_percents"] == [(0.1, 0.6)]
    assert latent["samples"].shape == (1, 16, 3, 4, 4) and not latent["samples"].any() and trim == 0


@pytest.mark.parametrize(("given", "expected"), [
    (None, [1] * 9), (torch.zeros(32, 32), [0] * 9), (torch.zeros(1, 32, 32), [0] * 9),
    (torch.zeros(3, 32, 32), [0] * 3 + [1] * 6), (torch.zeros(3, 64, 48), [0] * 3 + [1] * 6),
    (torch.zeros(20, 32, 32), [0] * 9)])
def test_masks_of_a_control(control, nano, given, expected):
    """Promise: no mask makes everything anew, one holds for all frames, missing ones are ones, any size is fitted."""
    options = control(control_video=video(), control_masks=given)[0][0][1]
    mask = torch.tensor(expected, dtype=torch.float32)[:, None, None].expand(9, 32, 32)
    torch.testing.assert_close(options["vace_frames"][0], by_hand(nano["vae"], video(), mask), atol=1e-4, rtol=0)
    assert options["vace_mask"][0][0, 0, :, 0, 0].tolist() == [expected[1], expected[4], expected[7]]


def test_short_control_videos_end_in_grey(control, nano):
    """Promise: frames without control are grey, surplus ones are left away, and no control is all grey."""
    grey = torch.full((9, 32, 32, 3), 0.5)
    for given, clip in ((video(4), torch.cat([video(4), grey[4:]])), (video(12), video(12)[:9]), (None, grey)):
        frames = control(control_video=given)[0][0][1]["vace_frames"][0]
        torch.testing.assert_close(frames, by_hand(nano["vae"], clip, torch.ones(9, 32, 32)), atol=1e-4, rtol=0)


def test_reference_images(call, control, nano, sample):
    """Promise: each reference takes a latent frame in front, the latent has room for it, and Wan Decode trims it."""
    positive, negative, latent, trim = control(reference_image=video(2, seed=1), batch_size=1)
    frames, mask = (positive[0][1][name][0] for name in ("vace_frames", "vace_mask"))
    assert trim == 2 and frames.shape == (1, 32, 5, 4, 4) and latent["samples"].shape == (1, 16, 5, 4, 4)
    torch.testing.assert_close(frames[:, :16, 1:2], nano["vae"].encode(video(2, seed=1)[1:]), atol=1e-4, rtol=0)
    assert nano["model"].latent_stats.normalise(frames[:, 16:])[:, :, :2].abs().max() < 1e-5
    assert mask[0, :, :2].eq(0).all() and mask[0, :, 2:].eq(1).all()
    result = sample(positive, negative, latent)
    images, = call("WanCoreDecode", samples={"samples": result}, vae=nano["vae"], trim_latent=trim)
    assert images.shape == (9, 32, 32, 3)
    torch.testing.assert_close(images, nano["vae"].decode(result[:, :, 2:])[0], atol=1e-5, rtol=0)


def test_controls_of_other_nodes_in_the_chain(control):
    """Promise: a control of the core's node before or behind ours keeps its place and holds for the whole run."""
    def cores(conditioning):
        entries = {"vace_frames": torch.zeros(1, 32, 3, 4, 4), "vace_mask": torch.ones(1, 64, 3, 4, 4),
                   "vace_strength": 2.0}
        return [[embedding, {**options, **{name: [*options.get(name, []), value] for name, value in entries.items()}}]
                for embedding, options in conditioning]

    before = control(positive=cores(control()[0]), strength=0.5, end_percent=0.5)[0][0][1]
    assert before["vace_strength"] == [1.0, 2.0, 0.5]
    assert before["wan_vace_percents"] == [(0.0, 1.0), (0.0, 1.0), (0.0, 0.5)]
    first = control(positive=cores([[torch.zeros(1, 1, 96), {}]]), end_percent=0.5)[0][0][1]
    assert first["wan_vace_percents"] == [(0.0, 1.0), (0.0, 0.5)] and len(first["vace_frames"]) == 2


def test_strength_and_range_reach_the_run(control, sample):
    """Promise: the control changes the result; strength 0, or a range that holds no step, is as good as none; a chain
    of the same control twice at half strength is that control, and half a range is something else again."""
    def run(**changes):
        positive, negative, latent, _ = control(control_video=video(), **changes)
        return sample(positive, negative, latent, steps=4)

    free, full = sample(steps=4), run()
    assert (full - free).abs().max() > 0.1
    assert torch.equal(run(strength=0.0), free)
    assert torch.equal(run(start_percent=1.0, end_percent=1.0), free)
    half = run(end_percent=0.5)
    assert not torch.equal(half, full) and not torch.equal(half, free)
    halves = control(control_video=video(), strength=0.5)
    chained = control(positive=halves[0], negative=halves[1], control_video=video(), strength=0.5)
    torch.testing.assert_close(sample(*chained[:3], steps=4), full, atol=1e-3, rtol=0)


def test_conditioning_of_the_cores_node(control, sample, nano):
    """Promise: controls without our ranges, as WanVaceToVideo makes them, give the same as ours."""
    positive, negative, latent, _ = control(control_video=video())
    cores = [[[embedding, {name: value for name, value in options.items() if name != "wan_vace_percents"}]
              for embedding, options in conditioning] for conditioning in (positive, negative)]
    assert torch.equal(sample(*cores, latent), sample(positive, negative, latent))


def test_module_node(call, pack, nano, model, workspace):
    """Promise: the node gives a changed copy and leaves the model it was given; a replaced file is noticed."""
    assert model.spec.model_type == "vace" and nano["model"].spec.model_type == "t2v"
    pair, = call("WanCoreVaceModule", model=nano["pair"], module="module.safetensors", module_low="module.safetensors")
    assert pair.high.spec == pair.low.spec == model.spec and pair.boundary == nano["pair"].boundary
    file, node = workspace / "models" / "diffusion_models" / "module.safetensors", pack.NODE_CLASS_MAPPINGS
    changed = node["WanCoreVaceModule"].IS_CHANGED
    before = [changed(module=file.name, module_low=low, model=None) for low in ("same", file.name)]
    file.write_bytes(file.read_bytes() + b" ")
    after = [changed(module=file.name, module_low=low, model=None) for low in ("same", file.name)]
    assert all(old != new for old, new in zip(before, after))
