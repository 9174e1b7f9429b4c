"""Where there is no ComfyUI: model lists, file fingerprints, and files that are opened again when replaced."""

import os

import pytest
import torch

from wan_core.weights import save_weights


def test_nano_models_are_always_listed_first(pack, workspace):
    """Promise: the bundled models head every list under names that stay, then come the folder's files."""
    folder = workspace / "models" / "vae"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.safetensors", "sub/a.safetensors", "notes.txt", "c.gguf"):
        (folder / name).touch()

    def names(node, widget):
        return pack.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["required"][widget][0]

    assert names("WanCoreVAELoader", "vae") == [
        "nano/wan_nano_vae.safetensors", "nano/wan_nano_vae22.safetensors", "nano/wan_nano_tiny_vae.safetensors",
        "b.safetensors", "sub/a.safetensors"]
    assert names("WanCoreTextEncoderLoader", "text_encoder") == ["nano/wan_nano_umt5.safetensors"]
    assert names("WanCoreModelLoader", "model")[:3] == [
        "nano/wan_nano_t2v.safetensors", "nano/wan_nano_t2v_high_noise.safetensors",
        "nano/wan_nano_t2v_low_noise.safetensors"]


def test_files_of_every_format_are_listed(pack, workspace, module, call):
    """Promise: lists of transformers and text encoders hold GGUF files and indexes of models in several files, too, and
    a name from outside of the folder is refused."""
    folder = workspace / "models" / "diffusion_models"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "split.safetensors.index.json").touch()
    (folder / "config.json").touch()
    weights = module("wan_core.weights")
    file, _ = weights.open_model(module("wan_core.nano").T2V, "transformer")
    weights.write_quantised(file, "q8_0", folder / "small.gguf", lambda done, of: None)
    (folder / "small.gguf").rename(folder / "Small.GGUF")
    names = pack.NODE_CLASS_MAPPINGS["WanCoreModelLoader"].INPUT_TYPES()["required"]["model"][0]
    assert [name for name in names if not name.startswith("nano/")] == ["Small.GGUF",
                                                                        "sub/split.safetensors.index.json"]
    model, = call("WanCoreModelLoader", model="Small.GGUF")
    assert model.low.file.format == "gguf" and "Q8_0" in model.low.file.quantised.values()
    (folder / "Small.GGUF").rename(workspace / "outside.gguf")
    with pytest.raises(ValueError, match="there is no '../../outside.gguf' among the model files"):
        call("WanCoreModelLoader", model="../../outside.gguf")


def test_replaced_file_is_opened_again(pack, workspace):
    """Promise: IS_CHANGED is the same as long as a file is, changes when it is replaced, and survives its loss."""
    loader = pack.NODE_CLASS_MAPPINGS["WanCoreVAELoader"]
    file = workspace / "models" / "vae" / "mine.safetensors"
    file.parent.mkdir(parents=True)
    save_weights(file, {"tensor": torch.zeros(2)})
    before = loader.IS_CHANGED(vae=file.name, precision="auto", tile_size=0, tile_overlap=64)
    assert loader.IS_CHANGED(vae=file.name) == before
    save_weights(file, {"tensor": torch.zeros(3)})
    bigger = loader.IS_CHANGED(vae=file.name)
    os.utime(file, ns=(1, 1))
    older = loader.IS_CHANGED(vae=file.name)
    file.unlink()
    assert len({before, bigger, older, loader.IS_CHANGED(vae=file.name)}) == 4


def test_loaders_read_headers_only(call):
    """Promise: opening models places no weights."""
    model, = call("WanCoreModelLoader")
    vae, = call("WanCoreVAELoader")
    clip, = call("WanCoreTextEncoderLoader")
    assert [handle.placement._held for handle in (model, vae.vae, clip.encoder)] == [None] * 3


def test_second_run_reuses_what_is_placed(call, nano):
    """Promise: a handle's module is built once, however often it is used."""
    first = nano["vae"].vae.module()
    nano["vae"].decode(torch.zeros(1, 16, 1, 2, 2))
    assert nano["vae"].vae.module() is first
