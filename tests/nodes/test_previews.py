"""Tiny VAEs: which files make previews of which model, what the loader opens, and for whose latents."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture
def tiny_file(module):
    """Writes a tiny VAE of little width in half precision to a path, and returns it."""
    def write(path, name="taew2_1"):
        torch.manual_seed(0)
        presets, vae = module("wan_core.presets"), module("wan_core.vae")
        spec = replace(presets.TINY_VAES[name], widths=(4, 4, 4, 4), encoder_width=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = vae.TinyVAE(spec).half().state_dict()
        if path.suffix == ".pth":
            torch.save(state, path)
        else:
            module("wan_core.weights").save_weights(path, state)
        return path

    return write


def test_the_loader_opens_tiny_vaes(pack, workspace, tiny_file, call):
    """Promise: files for Wan in models/vae_approx are listed behind the VAEs, and decode and encode as a VAE does."""
    for name in ("taew2_1.pth", "taehv.pth"):
        tiny_file(workspace / "models" / "vae_approx" / name)
    names = pack.NODE_CLASS_MAPPINGS["WanCoreVAELoader"].INPUT_TYPES()["required"]["vae"][0]
    assert [name for name in names if "approx" in name] == ["vae_approx/taew2_1.pth"]
    vae, = call("WanCoreVAELoader", vae="vae_approx/taew2_1.pth")
    frames, = call("WanCoreDecode", samples={"samples": torch.randn(1, 16, 3, 2, 4), "wan_vae": "wan21_vae"},
                   vae=vae)
    assert frames.shape == (9, 16, 32, 3) and 0 <= frames.min() < frames.max() <= 1
    assert vae.encode(frames).shape == (1, 16, 3, 2, 4)
    with pytest.raises(ValueError, match="there is no '../../secret'"):
        call("WanCoreVAELoader", vae="vae_approx/../../secret")


def test_tiny_vaes_know_the_latents_of_one_family(call):
    """Promise: the bundled tiny VAE decodes latents of nano models, and no latents of released ones."""
    tiny, = call("WanCoreVAELoader", vae="nano/wan_nano_tiny_vae.safetensors")
    call("WanCoreDecode", samples={"samples": torch.zeros(1, 16, 1, 2, 2), "wan_vae": "nano_vae"}, vae=tiny)
    with pytest.raises(ValueError, match="not the VAE of the model that made this latent"):
        call("WanCoreDecode", samples={"samples": torch.zeros(1, 16, 1, 2, 2), "wan_vae": "wan21_vae"}, vae=tiny)


def test_pictures_come_from_the_first_file_that_fits(tmp_path, tiny_file, module, caplog):
    """Promise: files for other latents and damaged ones are passed over; without a file there are no pictures."""
    previews, vaes = module("nodes.previews"), module("wan_core.presets").VAES
    other, fitting = tiny_file(tmp_path / "taew2_2.safetensors", "taew2_2"), tiny_file(tmp_path / "taew2_1.safetensors")
    damaged = tmp_path / "taew2_0.safetensors"
    damaged.write_bytes(b"no weights")
    cpu, latents = torch.device("cpu"), torch.randn(1, 16, 4, 3, 5)
    assert previews.picture_of(vaes["wan21_vae"], [other], cpu) is None
    picture = previews.picture_of(vaes["wan21_vae"], [damaged, other, fitting], cpu)(latents)
    assert picture.shape == (24, 40, 3) and -1 <= picture.min() < picture.max() <= 1
    assert "taew2_0.safetensors" in caplog.text
    large = previews.picture_of(vaes["wan21_vae"], [fitting], cpu)(torch.randn(1, 16, 1, 2, 64))
    assert large.shape == (8, 256, 3), "half the size of large pictures"


@pytest.mark.parametrize(("name", "channels", "side"), [("nano_vae", 16, 16), ("nano_vae22", 48, 32)])
def test_nano_models_have_previews_of_their_own(module, name, channels, side):
    """Promise: both families of nano models get a decoded picture without any file installed."""
    spec = module("wan_core.presets").VAES[name]
    picture = module("nodes.previews").picture_of(spec, [], torch.device("cpu"))
    assert picture(torch.zeros(1, channels, 3, 2, 2)).shape == (side, side, 3)
