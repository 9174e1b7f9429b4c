"""Our text encoder, CLIP vision model and VAE as ComfyUI's CLIP, CLIP_VISION and VAE objects."""

import pytest
import torch

from tests.small_models import write_clip_vision, write_vae


@pytest.fixture
def clip_vision(call, workspace):
    """What the loader node gives for a CLIP vision model of the nano size."""
    folder = workspace / "models" / "clip_vision"
    folder.mkdir(parents=True)
    write_clip_vision(folder / "small.safetensors")
    return call("WanCoreCLIPVisionLoader", clip_vision="small.safetensors")[0]


def test_clip_encodes_as_the_engine(nano, module):
    """Promise: tokenize and encode_from_tokens_scheduled give the engine's embeddings, weights included."""
    clip, text = nano["clip"], "a (red:1.3) circle moving left"
    (embedding, options), = clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict={"key": 1})
    assert torch.equal(embedding, clip.encoder.encode([text]))
    assert options == {"pooled_output": None, "key": 1}
    plain, = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle moving left"))
    assert not torch.equal(embedding, plain[0])


def test_clip_tokens_are_comfyuis(nano):
    """Promise: tokens are rows of (id, weight) under the core's name, end token last; added padding is ignored."""
    clip = nano["clip"]
    tokens = clip.tokenize("(red:1.5) circle")
    row, = tokens["umt5xxl"]
    assert row[-1] == (1, 1.0) and {weight for _, weight in row} == {1.5, 1.0}
    padded = {"umt5xxl": [row + [(0, 1.0)] * 20]}
    assert torch.equal(clip.encode_from_tokens(padded), clip.encode("(red:1.5) circle"))


def test_clip_return_forms(nano):
    """Promise: older encode nodes get the forms that they ask for."""
    clip = nano["clip"].clone()
    tokens = clip.tokenize("red")
    embedding, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    assert pooled is None and torch.equal(embedding, clip.encode("red"))
    assert clip.encode_from_tokens(tokens, return_dict=True).keys() == {"cond", "pooled_output"}


@pytest.mark.parametrize("name", ["add_patches", "patcher", "clip_layer"])
def test_clip_patching_is_refused(nano, name):
    """Promise: nodes that patch a CLIP model get an error that says what to do."""
    with pytest.raises(AttributeError, match=f"without '{name}'.*Load CLIP"):
        getattr(nano["clip"], name)
    assert not hasattr(nano["clip"], name)


def test_clip_vision_encodes_as_the_engine(clip_vision):
    """Promise: encode_image takes IMAGE in 0..1, drops alpha, crops or squashes as it is asked, and gives the engine's
    tokens."""
    image = torch.rand(2, 40, 90, 4, generator=torch.Generator().manual_seed(0))
    pictures = image[..., :3].movedim(-1, 1) * 2 - 1
    for crop, name in ((True, "center"), (False, "none")):
        tokens = clip_vision.encode_image(image, crop=crop).penultimate_hidden_states
        assert tokens.shape == (2, 17, 64) and torch.equal(tokens, clip_vision.encoder.encode(pictures, name))
    assert torch.equal(clip_vision.encode_image(image)["penultimate_hidden_states"],
                       clip_vision.encoder.encode(pictures, "center"))


def test_clip_vision_output_is_the_cores(clip_vision):
    """Promise: the entries of ComfyUI's CLIP_VISION_OUTPUT, as attributes and by key, none of them with gradients."""
    output = clip_vision.encode_image(torch.rand(1, 64, 64, 3))
    shapes = {"penultimate_hidden_states": (1, 17, 64), "last_hidden_state": (1, 17, 64), "image_embeds": (1, 64)}
    for name, shape in shapes.items():
        assert output[name] is getattr(output, name) and output[name].shape == shape
        assert output[name].dtype == torch.float32 and not output[name].requires_grad
    assert output.mm_projected is None


def test_clip_vision_refuses_other_images(clip_vision):
    """Promise: a mask or a video in place of pictures is an error that says what was expected."""
    for shape in ((1, 64, 64), (1, 64, 64, 1), (1, 2, 64, 64, 3)):
        with pytest.raises(ValueError, match=r"expected pictures \[batch, height, width, 3\]"):
            clip_vision.encode_image(torch.zeros(shape))


def test_vae_decodes_to_images(nano):
    """Promise: decode gives the engine's pixels as [B, F, H, W, 3] in 0..1."""
    latents = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    images = nano["vae"].decode(latents)
    expected = nano["vae"].vae.decode(latents).movedim(1, -1) / 2 + 0.5
    assert images.shape == (2, 5, 32, 32, 3) and images.is_contiguous()
    torch.testing.assert_close(images, expected)


def test_vae_tiles(nano):
    """Promise: sizes of VAEDecodeTiled and VAEEncodeTiled reach the engine as tiles, whatever the overlap."""
    latents = torch.randn(1, 16, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    vae = nano["vae"]
    images = vae.decode(latents)
    covering = vae.decode_tiled(latents, tile_x=12, tile_y=8, overlap=0, tile_t=16, overlap_t=2)
    torch.testing.assert_close(covering, images)
    tiled = vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2)
    assert tiled.shape == images.shape and not torch.equal(tiled, images)
    pixels = torch.rand(5, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.encode_tiled(pixels, tile_x=96, tile_y=64, overlap=0), vae.encode(pixels))


def test_vae_encodes_images(nano):
    """Promise: a clip in 0..1 becomes raw latents; alpha is dropped; off the grid it is cut as the core cuts it."""
    vae = nano["vae"]
    clip = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(clip)
    assert latents.shape == (1, 16, 2, 4, 4)
    torch.testing.assert_close(latents, vae.vae.encode(clip.movedim(-1, 0)[None] * 2 - 1))
    assert torch.equal(vae.encode(torch.cat([clip, torch.rand(5, 32, 32, 1)], -1)), latents)
    wider = torch.nn.functional.pad(clip, (0, 0, 2, 2, 1, 1, 0, 3), value=0.5)
    assert torch.equal(vae.encode(wider), latents)
    clips = torch.stack([clip, clip.flip(0)])
    assert torch.equal(vae.encode(clips), vae.vae.encode(clips.movedim(-1, 1) * 2 - 1))


def test_vae_describes_itself(nano):
    """Promise: what core nodes ask of a VAE before they use it."""
    vae = nano["vae"]
    assert (vae.latent_channels, vae.latent_dim) == (16, 3)
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (8, 8)
    assert vae.temporal_compression_decode() == 4
    assert "decoder.head.0.gamma" in vae.get_sd()


@pytest.fixture(scope="module")
def vae22(module, tmp_path_factory):
    """The VAE socket on a nano Wan 2.2 VAE with random weights."""
    path = write_vae(tmp_path_factory.mktemp("vae") / "vae22.safetensors", name="nano_vae22")
    return module("nodes.sockets").ComfyVAE(module("wan_core.models").load_vae(path))


def test_a_wan22_vae_describes_itself(vae22):
    """Promise: a Wan 2.2 VAE tells the core its own channels and strides."""
    assert (vae22.latent_channels, vae22.latent_dim) == (48, 3)
    assert (vae22.spacial_compression_decode(), vae22.spacial_compression_encode()) == (16, 16)
    assert vae22.temporal_compression_decode() == 4


def test_a_wan22_vae_converts_as_the_engine(vae22):
    """Promise: 48 channels and 16 pixels a side, both ways, in tiles too; off its grid a clip is cut to it."""
    latents = torch.randn(1, 48, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    images = vae22.decode(latents)
    assert images.shape == (1, 5, 48, 80, 3)
    torch.testing.assert_close(images, vae22.vae.decode(latents).movedim(1, -1) / 2 + 0.5)
    torch.testing.assert_close(vae22.decode_tiled(latents, tile_x=5, tile_y=3, overlap=1), images)
    clip = images[0]
    encoded = vae22.encode(clip)
    assert encoded.shape == latents.shape
    torch.testing.assert_close(vae22.encode_tiled(clip, tile_x=80, tile_y=48, overlap=16), encoded)
    wider = torch.nn.functional.pad(clip, (0, 0, 4, 4, 0, 1), value=0.5)
    assert torch.equal(vae22.encode(wider), encoded)
    with pytest.raises(ValueError, match=r"decodes \[batch, 48, frames"):
        vae22.decode(latents[:, :16])
