"""The TAEHV format: the released shapes, the parallel pass written from the format's description, and streaming."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.vae.small import randn
from wan_core.presets import TINY_VAES, recognise
from wan_core.vae import LatentStats, Tiling, TinyVAE
from wan_core.vae.layers import Stream
from wan_core.weights import expected_shapes

SMALL = {name: replace(TINY_VAES[name], widths=(6, 5, 4, 3), encoder_width=4) for name in ("taew2_1", "taew2_2")}


@pytest.fixture(scope="module", params=SMALL)
def tiny(request):
    torch.manual_seed(0)
    module = TinyVAE(SMALL[request.param]).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.mul_(1.5)
    return module


def shifted(x):
    """Every frame of x [T, C, H, W] replaced by the one before, zeros before the first."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def memory_block(weights, name, x):
    h = torch.cat([x, shifted(x)], 1)
    for index in (0, 2, 4):
        h = F.conv2d(h, weights[f"{name}.conv.{index}.weight"], weights[f"{name}.conv.{index}.bias"], padding=1)
        h = F.relu(h) if index < 4 else h
    return F.relu(h + x)


def parallel_decode(weights, z, patch):
    """All frames of normalised latents [T, z, h, w] at once, layer by layer as the format has them, 4T frames."""
    x = 3 * torch.tanh(z / 3)
    x = F.relu(F.conv2d(x, weights["decoder.1.weight"], weights["decoder.1.bias"], padding=1))
    for first, frames in ((3, 1), (9, 2), (15, 2)):
        for index in range(first, first + 3):
            x = memory_block(weights, f"decoder.{index}", x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.conv2d(x, weights[f"decoder.{first + 4}.conv.weight"])
        x = x.reshape(x.shape[0] * frames, x.shape[1] // frames, *x.shape[2:])
        x = F.conv2d(x, weights[f"decoder.{first + 5}.weight"], padding=1)
    x = F.conv2d(F.relu(x), weights["decoder.22.weight"], weights["decoder.22.bias"], padding=1)
    return F.pixel_shuffle(x, patch)


def parallel_encode(weights, frames, patch):
    """All frames [4T, 3, H, W] in 0..1 at once to T normalised latents."""
    x = F.pixel_unshuffle(frames, patch)
    x = F.relu(F.conv2d(x, weights["encoder.0.weight"], weights["encoder.0.bias"], padding=1))
    for first, joined in ((2, 2), (7, 2), (12, 1)):
        x = F.conv2d(x.reshape(x.shape[0] // joined, x.shape[1] * joined, *x.shape[2:]),
                     weights[f"encoder.{first}.conv.weight"])
        x = F.conv2d(x, weights[f"encoder.{first + 1}.weight"], stride=2, padding=1)
        for index in range(first + 2, first + 5):
            x = memory_block(weights, f"encoder.{index}", x)
    return F.conv2d(x, weights["encoder.17.weight"], weights["encoder.17.bias"], padding=1)


def test_the_released_files_have_these_tensors():
    """128 tensors under the released names, 11,315,539 and 11,418,108 numbers, recognised as what they are."""
    for name, numbers in (("taew2_1", 11_315_539), ("taew2_2", 11_418_108)):
        shapes = expected_shapes(TINY_VAES[name])
        assert len(shapes) == 128 and sum(torch.Size(shape).numel() for shape in shapes.values()) == numbers
        found = recognise(shapes)
        assert (found.kind, found.names, found.spec) == ("vae", (name,), TINY_VAES[name])
    colours = 12
    assert shapes["encoder.0.weight"] == (64, colours, 3, 3) and shapes["decoder.22.bias"] == (colours,)
    assert shapes["encoder.2.conv.weight"] == shapes["encoder.7.conv.weight"] == (64, 128, 1, 1)
    assert shapes["encoder.12.conv.weight"] == (64, 64, 1, 1) and shapes["encoder.17.weight"] == (48, 64, 3, 3)
    assert shapes["decoder.1.weight"] == (256, 48, 3, 3) and shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert [shapes[f"decoder.{i}.conv.weight"][0] for i in (7, 13, 19)] == [256, 256, 128]


@pytest.mark.parametrize(("change", "message"), [
    ({"decoder.1.weight": (256, 32, 3, 3)}, "32 latent channels"), ({"decoder.1.weight": None}, "super"),
    ({"encoder.0.weight": None}, "'encoder.0.weight' is missing")])
def test_other_files_of_the_format_are_told_apart(change, message):
    """Preview VAEs of other models, of the larger kind, and halves are named and not run."""
    shapes = {**expected_shapes(TINY_VAES["taew2_1"]), **change}
    found = recognise({name: shape for name, shape in shapes.items() if shape})
    assert found.kind.endswith("vae") and found.spec is None and message in found.reason


def test_decode_equals_the_parallel_pass(tiny):
    """Streamed one latent frame at a time: the format's parallel pass without its first three frames, clamped."""
    spec = tiny.spec
    normal = 2 * randn(1, spec.z_dim, 4, 3, 2)
    expected = parallel_decode(tiny.state_dict(), normal[0].movedim(1, 0), spec.patch)[3:].movedim(0, 1)[None]
    video = tiny.decode(LatentStats.of(spec).restore(normal))
    assert video.shape == (1, 3, 13, 3 * spec.spatial_stride, 2 * spec.spatial_stride)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.3 and expected.diff(dim=2).abs().mean() > 1e-4
    torch.testing.assert_close(video, expected.clamp(0, 1) * 2 - 1, atol=1e-5, rtol=0)


def test_encode_equals_the_parallel_pass(tiny):
    """Streamed four frames at a time, the last frame repeated to whole fours: the format's parallel pass."""
    spec = tiny.spec
    video = randn(1, 3, 9, 3 * spec.spatial_stride, 2 * spec.spatial_stride).clamp(-1, 1)
    frames = (torch.cat([video, video[:, :, -1:].expand(-1, -1, 3, -1, -1)], 2)[0].movedim(1, 0) + 1) / 2
    expected = parallel_encode(tiny.state_dict(), frames, spec.patch).movedim(0, 1)[None]
    latents = LatentStats.of(spec).normalise(tiny.encode(video))
    assert latents.shape == (1, spec.z_dim, 3, 3, 2) and latents.diff(dim=2).abs().mean() > 1e-4
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


def test_a_stream_keeps_one_frame_per_block(tiny):
    """What is remembered between pieces does not grow with their length, and pieces of any length give the same."""
    spec = tiny.spec
    latents, kept, pixels = randn(2, spec.z_dim, 5, 2, 3), [], []
    for cuts in ((1, 1, 1, 1, 1), (1, 4), (5,)):
        stream = Stream()
        pixels.append(torch.cat([tiny.decode_piece(part, stream) for part in latents.split(cuts, 2)], 2))
        kept.append(sum(frames.numel() for frames in stream._history.values()))
    assert kept[0] == kept[1] == kept[2] > 0
    for other in pixels[1:]:
        torch.testing.assert_close(other, pixels[0], atol=1e-5, rtol=0)


def test_tiles_of_a_preview_vae_agree_where_nothing_is_cut(tiny):
    """Away from tiles' borders a tiled decode is the whole one: nothing in it sees whole frames."""
    spec = tiny.spec
    latents, stride = randn(1, spec.z_dim, 2, 4, 40), spec.spatial_stride
    tiled = tiny.decode(latents, tiling=Tiling(4 * stride, 28 * stride, 2 * stride))
    whole = tiny.decode(latents)
    torch.testing.assert_close(tiled[..., :8 * stride], whole[..., :8 * stride], atol=1e-4, rtol=0)
    assert not torch.equal(tiled, whole)
