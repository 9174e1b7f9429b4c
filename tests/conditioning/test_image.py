"""Pictures as a clip's known frames: which frames of the mask are set, what the channels hold, refusals."""

import pytest
import torch

from wan_core.conditioning import ImageChannels, ImageTokens, KnownFrames, encode_known_frames
from wan_core.dit import ModelInputs, WanTransformer
from wan_core.presets import TRANSFORMERS, VAES, TransformerSpec
from wan_core.vae import LatentStats

STATS = LatentStats.of(VAES["wan21_vae"])
I2V = TRANSFORMERS["wan21_i2v_14b"]
SHAPE = (1, 16, 3, 2, 4)


class Recorder:
    """An encoder that remembers the clip: every latent frame holds the mean of the frames that it stands for."""

    def __init__(self):
        self.clip = None

    def __call__(self, video):
        self.clip = video
        frames = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2).mean((1, 3, 4))
        means = frames.unflatten(1, (-1, 4)).mean(-1)
        return means[:, None, :, None, None].expand(1, 16, -1, video.shape[3] // 8, video.shape[4] // 8)


def pictures(count: int, level: float = 1.0) -> torch.Tensor:
    return torch.full((count, 3, 16, 32), level)


@pytest.mark.parametrize(("start", "end", "known"), [
    (1, 0, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
    (0, 1, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
    (1, 1, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]),
    (6, 0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]),
    (3, 2, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]),
    (5, 4, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
])
def test_mask_of_known_frames(start, end, known):
    """The first frame counts four times and every other once, in the order of time; the rest of the clip is grey."""
    encode = Recorder()
    result = encode_known_frames(encode, 9, pictures(start) if start else None, pictures(end, -0.5) if end else None)
    assert encode.clip.shape == (1, 3, 9, 16, 32) and result.mask.shape == (1, 4, 3, 2, 4)
    assert result.mask[0, :, :, 0, 0].t().tolist() == known
    assert result.mask.amin((3, 4)).equal(result.mask.amax((3, 4)))
    levels = [1.0] * start + [0.0] * (9 - start - end) + [-0.5] * end
    assert encode.clip[0, 0, :, 0, 0].tolist() == levels


def test_a_clip_of_one_frame():
    """A single frame that is given is known four times over."""
    result = encode_known_frames(Recorder(), 1, pictures(1), None)
    assert torch.equal(result.mask, torch.ones(1, 4, 1, 2, 4))


@pytest.mark.parametrize(("start", "end", "message"), [
    (None, None, "neither a start nor an end image"),
    (pictures(5), pictures(5), "5 start and 5 end frames do not fit into a clip of 9 frames"),
    (pictures(10), None, "10 start frames do not fit into a clip of 9"),
    (pictures(1), torch.zeros(1, 3, 16, 16), r"of one size, got \[1, 3, 16, 32\] and \[1, 3, 16, 16\]"),
    (torch.zeros(3, 16, 32), None, r"must be \[frames, 3, height, width\].*got \[3, 16, 32\]"),
    (torch.zeros(1, 4, 16, 32), None, r"got \[1, 4, 16, 32\]"),
])
def test_known_frames_that_do_not_fit(start, end, message):
    """No picture, too many, or of another size: refused before anything is encoded."""
    encode = Recorder()
    with pytest.raises(ValueError, match=message):
        encode_known_frames(encode, 9, start, end)
    assert encode.clip is None


def test_channels_are_mask_and_normalised_latents():
    """Four channels of mask, 1 where known, then the latents in the model's range; for every video of a batch."""
    latents, mask = torch.randn(2, *SHAPE[1:]), torch.zeros(1, 4, *SHAPE[2:])
    mask[:, :, 0] = 1
    channels = ImageChannels.of(KnownFrames(latents, mask), STATS).channels
    assert torch.equal(channels[:, :4], mask.expand(2, -1, -1, -1, -1))
    assert torch.equal(channels[:, 4:], STATS.normalise(latents))
    nothing = ImageChannels.nothing_known(I2V, SHAPE)
    assert torch.equal(nothing.channels, torch.zeros(1, 20, *SHAPE[2:]))
    nothing.check(I2V, SHAPE)


@pytest.mark.parametrize("shape", [(1, 4, 2, 2, 4), (1, 4, 3, 4, 4), (1, 1, 3, 2, 4)])
def test_a_mask_of_another_size_is_refused(shape):
    """The mask has four channels and the latents' frames, height and width, or the error shows both."""
    with pytest.raises(ValueError, match=r"has shape \[1, .*expected \[batch, 4, 3, 2, 4\]"):
        ImageChannels.of(KnownFrames(torch.zeros(SHAPE), torch.zeros(shape)), STATS)


def test_channels_go_behind_the_latents():
    """One condition serves a batch without being copied into it beforehand."""
    condition = ImageChannels(torch.randn(1, 20, *SHAPE[2:]))
    sample = torch.randn(2, *SHAPE[1:])
    inputs = condition.add(ModelInputs(sample, torch.zeros(2), None), condition.prepare(None, sample), 0.5)
    assert torch.equal(inputs.latents[:, :16], sample)
    assert torch.equal(inputs.latents[1, 16:], condition.channels[0])


@pytest.mark.parametrize(("spec", "channels", "message"), [
    ("wan21_t2v_14b", (1, 20, 3, 2, 4), "takes none through its channels. Use an image-to-video model"),
    ("wan22_ti2v_5b", (1, 20, 3, 2, 4), "Wan Image Latent"),
    ("wan21_i2v_14b", (1, 20, 2, 2, 4), r"\[1, 20, 2, 2, 4\]; this model .* \[batch, 20, 3, 2, 4\]"),
    ("wan21_i2v_14b", (1, 36, 3, 2, 4), r"\[1, 36, 3, 2, 4\]; this model .* \[batch, 20, 3, 2, 4\]"),
    ("wan22_i2v_a14b", (2, 20, 3, 2, 4), "is a batch of 2 and the latents are a batch of 1"),
])
def test_channels_that_do_not_suit_the_model(spec, channels, message):
    """A model that takes no picture, a clip of another size, another batch: the error says what to use."""
    shape = (1, TRANSFORMERS[spec].out_dim, *SHAPE[2:])
    with pytest.raises(ValueError, match=message):
        ImageChannels(torch.zeros(channels)).check(TRANSFORMERS[spec], shape)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_numbers_are_refused(value):
    """Channels or features that hold NaN or infinity would spread to the whole video, and are an error."""
    for condition in (ImageChannels(torch.full((1, 20, *SHAPE[2:]), value)),
                      ImageTokens(torch.full((1, 257, 1280), value))):
        with pytest.raises(ValueError, match="holds NaN or infinite values"):
            condition.check(I2V, SHAPE)


def test_tokens_that_do_not_suit_the_model():
    """CLIP features: none where there is no place for them, of the right width, and of at most two images."""
    ImageTokens(torch.zeros(1, 257, 1280)).check(I2V, SHAPE)
    ImageTokens(torch.zeros(1, 514, 1280)).check(TRANSFORMERS["wan21_flf2v_14b"], SHAPE)
    for spec, shape, message in (
            ("wan22_i2v_a14b", (1, 257, 1280), "this model takes none. Leave them away"),
            ("wan21_i2v_14b", (1, 257, 1024), r"shape \[1, 257, 1024\].*\[batch, tokens, 1280\]"),
            ("wan21_i2v_14b", (257, 1280), r"shape \[257, 1280\]"),
            ("wan21_flf2v_14b", (1, 771, 1280), "771 CLIP vision tokens.*takes 514"),
            ("wan21_i2v_14b", (3, 257, 1280), "is a batch of 3")):
        with pytest.raises(ValueError, match=message):
            ImageTokens(torch.zeros(shape)).check(TRANSFORMERS[spec], SHAPE)


def test_tokens_are_embedded_by_the_model():
    """Features become the model's image tokens, once for the whole batch of a run."""
    spec = TransformerSpec(model_type="i2v", dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=16, in_dim=36,
                           image_dim=24, image_tokens=5)
    torch.manual_seed(0)
    model, features = WanTransformer(spec).eval(), torch.randn(1, 5, 24)
    condition, sample = ImageTokens(features), torch.randn(2, 16, 1, 2, 2)
    prepared = condition.prepare(model, sample)
    assert torch.equal(prepared, model.prepare_image(features.expand(2, -1, -1)))
    assert condition.add(ModelInputs(sample, torch.zeros(2), None), prepared, 0.5).image is prepared
