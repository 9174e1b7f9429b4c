"""Nodes that show a model pictures, on small models with random weights and without ComfyUI."""

import pytest
import torch
import torch.nn.functional as F

SMALL = {"width": 32, "height": 32, "length": 9}
QUICK = {"steps": 2, "seed": 7, "solver": "euler", "guidance": 2.0}


def frames(count: int, seed: int = 0) -> torch.Tensor:
    """IMAGE of as many smooth pictures, [count, 32, 32, 3] in 0..1."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (32, 32), mode="bilinear").movedim(1, -1)


@pytest.fixture
def shown(call, nano):
    """What Wan Image to Video gives for the nano prompts and VAE."""
    def run(**changes):
        inputs = {"positive": nano["positive"], "negative": nano["negative"], "vae": nano["vae"], **SMALL, **changes}
        return call("WanCoreImageToVideo", **inputs)

    return run


@pytest.mark.parametrize(("start", "end", "known"), [
    (1, 0, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
    (0, 1, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
    (6, 2, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]]),
])
def test_pictures_beside_the_prompts(shown, nano, start, end, known):
    """Promise: start, end or both, each of one frame or several, as the core's options: raw latents of a clip that is
    grey elsewhere, and a mask that is 0 where it is known; both prompts get them and what was given is untouched."""
    clip = torch.cat([frames(start), torch.full((9 - start - end, 32, 32, 3), 0.5), frames(end, 1)])
    positive, negative, latent = shown(start_image=frames(start) if start else None,
                                       end_image=frames(end, 1) if end else None, batch_size=2)
    for given, (entry,) in ((nano["positive"], positive), (nano["negative"], negative)):
        assert entry[0] is given[0][0] and entry[1].keys() - given[0][1].keys() == {"concat_latent_image",
                                                                                    "concat_mask"}
        torch.testing.assert_close(entry[1]["concat_latent_image"], nano["vae"].encode(clip), atol=1e-4, rtol=0)
        assert entry[1]["concat_mask"].shape == (1, 4, 3, 4, 4)
        assert (1 - entry[1]["concat_mask"][0, :, :, 0, 0]).t().tolist() == known
    assert latent["samples"].shape == (2, 16, 3, 4, 4) and not latent["samples"].any()


def test_all_combined_prompts_get_the_picture(shown, nano):
    """Promise: every entry of a combined conditioning is given the picture, with its own options kept."""
    (embedding, options), = nano["positive"]
    positive, _, _ = shown(positive=[[embedding, options], [embedding, {**options, "strength": 0.5}]],
                           start_image=frames(1))
    assert [entry[1].get("strength") for entry in positive] == [None, 0.5]
    assert all("concat_latent_image" in entry[1] for entry in positive)


def test_pictures_are_brought_to_the_size(shown, nano):
    """Promise: crop keeps the middle of a wide picture and stretch all of it; alpha is dropped."""
    wide = torch.zeros(1, 32, 96, 4)
    wide[:, :, 32:64] = 1
    whole = {how: shown(start_image=wide, fit=how)[0][0][1]["concat_latent_image"] for how in ("crop", "stretch")}
    middle, squashed = torch.ones(1, 32, 32, 3), F.interpolate(wide[..., :3].movedim(-1, 1), (32, 32), mode="bicubic")
    for how, picture in (("crop", middle), ("stretch", squashed.clamp(0, 1).movedim(1, -1))):
        expected = shown(start_image=picture)[0][0][1]["concat_latent_image"]
        torch.testing.assert_close(whole[how], expected, atol=1e-3, rtol=0)


def test_clip_vision_sees_the_outer_pictures(shown, listed):
    """Promise: the first start and the last end image, at their own size and uncropped, one after the other."""
    clip_vision = listed("clip_vision")
    start, end = F.pad(frames(2), (0, 0, 8, 8)), frames(3, 1)
    positive, negative, _ = shown(start_image=start, end_image=end, clip_vision=clip_vision)
    tokens = [clip_vision.encode_image(picture, crop=False).penultimate_hidden_states
              for picture in (start[:1], end[-1:])]
    for entry, in (positive, negative):
        assert torch.equal(entry[1]["clip_vision_output"].penultimate_hidden_states, torch.cat(tokens, 1))
    alone, = shown(end_image=end, clip_vision=clip_vision)[0]
    assert torch.equal(alone[1]["clip_vision_output"].penultimate_hidden_states, tokens[1])
    given = clip_vision.encode_image(start[:1])
    assert shown(start_image=start, clip_vision_output=given)[0][0][1]["clip_vision_output"] is given
    with pytest.raises(ValueError, match="both clip_vision and clip_vision_output are connected"):
        shown(start_image=start, clip_vision=clip_vision, clip_vision_output=given)


def test_a_run_from_a_picture(call, nano, shown, listed):
    """Promise: the sampler's result depends on picture and CLIP features, and conditioning as the core's own node makes
    it (one mask channel, for whole latent frames) gives the same bit for bit."""
    model, clip_vision = listed("model"), listed("clip_vision")

    def sample(positive, negative, latent):
        return call("WanCoreSampler", model=model, positive=positive, negative=negative, latent=latent,
                    **QUICK)[0]["samples"]

    ours = sample(*shown(start_image=frames(1), clip_vision=clip_vision))
    latents = nano["vae"].encode(torch.cat([frames(1), torch.full((8, 32, 32, 3), 0.5)]))
    mask = torch.ones(1, 1, 3, 4, 4)
    mask[:, :, 0] = 0
    cores = {"concat_latent_image": latents, "concat_mask": mask,
             "clip_vision_output": clip_vision.encode_image(frames(1), crop=False)}
    beside = [[[embedding, {**options, **cores}] for embedding, options in nano[name]]
              for name in ("positive", "negative")]
    torch.testing.assert_close(sample(*beside, {"samples": torch.zeros(1, 16, 3, 4, 4)}), ours, atol=1e-4, rtol=0)
    assert ours.isfinite().all()
    assert not torch.equal(sample(*shown(start_image=frames(1, 1), clip_vision=clip_vision)), ours)
    assert not torch.equal(sample(*shown(start_image=frames(1))), ours)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 1), (5, 2)])
def test_latent_with_known_frames(call, nano, count, kept):
    """Promise: the given frames' latents with a noise mask of 0, for each video; the rest zero when normalised."""
    latent, = call("WanCoreImageLatent", vae=nano["vae"], start_image=frames(count), batch_size=2, **SMALL)
    samples, stats = latent["samples"], nano["model"].latent_stats
    assert samples.shape == (2, 16, 3, 4, 4) and latent["noise_mask"].shape == (2, 1, 3, 4, 4)
    assert latent["noise_mask"][1, 0, :, 0, 0].tolist() == [0] * kept + [1] * (3 - kept)
    known = nano["vae"].encode(frames(count)[:1 + (kept - 1) * 4])
    torch.testing.assert_close(samples[1:, :, :kept], known, atol=1e-4, rtol=0)
    assert stats.normalise(samples)[:, :, kept:].abs().max() < 1e-5
    empty, = call("WanCoreImageLatent", vae=nano["vae"], **SMALL)
    assert empty.keys() == {"samples"} and not empty["samples"].any()


@pytest.mark.parametrize("kind", ["ti2v", "t2v"])
def test_a_run_from_known_frames(call, nano, listed, small, kind):
    """Promise: TI2V and, by inpainting, a text-to-video model keep the given first frame and make the others."""
    vae = listed("vae22") if kind == "ti2v" else nano["vae"]
    size = {**SMALL, "width": 64, "height": 64}
    latent, = call("WanCoreImageLatent", vae=vae, start_image=frames(1), **size)
    model = small(kind)
    results = [call("WanCoreSampler", model=model, positive=nano["positive"], negative=nano["negative"], latent=latent,
                    **{**QUICK, "seed": seed})[0] for seed in (1, 2)]
    first, second = (result["samples"] for result in results)
    assert "noise_mask" in results[0]
    torch.testing.assert_close(first[:, :, 0], latent["samples"][:, :, 0], atol=1e-4, rtol=0)
    assert torch.equal(first[:, :, 0], second[:, :, 0]) and not torch.equal(first[:, :, 1], second[:, :, 1])


def test_the_vae_decides_on_the_grid(call, listed):
    """Promise: with the VAE of TI2V a latent pixel is 16 pixels wide, with 48 channels, on a grid of 32."""
    latent, = call("WanCoreImageLatent", vae=listed("vae22"), width=64, height=96, length=5)
    assert latent["samples"].shape == (1, 48, 2, 6, 4)
    with pytest.raises(ValueError, match="width is 80 pixels; it must be a multiple of 32"):
        call("WanCoreImageLatent", vae=listed("vae22"), width=80, height=96, length=5)


@pytest.mark.parametrize(("picture", "area", "size"), [
    ((1080, 1920), "480p", (832, 464)), ((1920, 1080), "720p", (720, 1280)), ((700, 700), "480p", (624, 624)),
    ((704, 1280), "704p (5B)", (1280, 704)), ((1280, 704), "704p (5B)", (704, 1280)),
    ((50, 100), "nano", (80, 32)), ((300, 300), "nano 5B", (128, 128))])
def test_sizes_for_pictures(call, picture, area, size):
    """Promise: the official size for a picture's aspect ratio, as width and height."""
    assert call("WanCoreVideoSize", image=torch.zeros(1, *picture, 3), area=area) == size
