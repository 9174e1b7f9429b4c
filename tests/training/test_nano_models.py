"""The trainings of the nano transformers: they run, learn, go on where they stopped, and begin from trained blocks."""

from dataclasses import replace

import pytest
import torch

from wan_core import load_model, load_text_encoder, load_vae, nano
from wan_core.dit import WanTransformer
from wan_core.presets import TRANSFORMERS
from wan_core.training.begin import begin_from
from wan_core.training.clips import Clips
from wan_core.training.loop import NanoTraining
from wan_core.training.nano_i2v import KnownClips, train_i2v
from wan_core.training.nano_ti2v import train_ti2v
from wan_core.training.nano_vace import ControlledClips, train_vace
from wan_core.training.nano_vae import channels_read

TRAINING = NanoTraining(steps=2, clips=12, batch=2)


@pytest.fixture(scope="module")
def t2v():
    return {name: tensor.float() for name, tensor in load_model().low.file.items()}


@pytest.fixture(scope="module")
def text_encoder():
    return load_text_encoder()


def run_i2v(options, text_encoder, t2v, run):
    vae = load_vae().module()
    clips = Clips(vae, text_encoder.tokenizer, options, run / "latents.pt")
    known = KnownClips(vae, clips, options, run / "known.pt")
    return train_i2v(options, clips, known, text_encoder.module(), t2v, run).state_dict()


def run_ti2v(options, text_encoder, t2v, run):
    vae = load_vae(nano.VAE22).module()
    clips = Clips(vae, text_encoder.tokenizer, options, run / "latents.pt")
    return train_ti2v(options, clips, channels_read(vae), text_encoder.module(), t2v, run).state_dict()


def run_vace(options, text_encoder, t2v, run):
    vae = load_vae().module()
    clips = Clips(vae, text_encoder.tokenizer, options, run / "latents.pt")
    return train_vace(options, clips, ControlledClips(vae, clips, options, run / "controls.pt"), text_encoder.module(),
                      t2v, run)


@pytest.mark.parametrize(("train", "learns"), [
    # Parts that begin at zero hide those behind them from the first step's gradient.
    (run_i2v, ("transformer.patch_embedding.weight", "transformer.blocks.3.cross_attn.v_img.weight")),
    (run_ti2v, ("head.head.weight",)),
    (run_vace, ("vace_blocks.0.after_proj.weight", "vace_blocks.1.after_proj.weight")),
], ids=("i2v", "ti2v", "vace"))
def test_a_stopped_run_goes_on_and_learns(train, learns, text_encoder, t2v, tmp_path):
    """Promise: a run of one step, at the beginning of the warm-up, changes nothing yet; gone on with, it learns."""
    before = train(replace(TRAINING, steps=1), text_encoder, t2v, tmp_path)
    after = train(TRAINING, text_encoder, t2v, tmp_path)
    assert before.keys() == after.keys() and all(tensor.isfinite().all() for tensor in after.values())
    for name in learns:
        assert not torch.equal(before[name], after[name]), name
    if train is run_vace:
        assert all(name.startswith("vace") for name in after)
    else:
        assert (tmp_path / f"{train.__name__.removeprefix('run_')}_state.pt").exists()


def test_a_transformer_begins_from_trained_blocks(t2v):
    """Promise: chosen blocks are taken over, tensors of other shapes stay as they are, and of a narrower feed-forward
    layer the units with the largest weights are kept, in their order."""
    model = WanTransformer(replace(TRANSFORMERS["nano_t2v"], num_layers=2, ffn_dim=100, in_dim=48, out_dim=48))
    model.init_weights()
    patches = model.patch_embedding.weight.clone()
    begin_from(model, t2v, (1, 4))
    own = model.state_dict()
    assert torch.equal(own["blocks.1.self_attn.q.weight"], t2v["blocks.4.self_attn.q.weight"])
    assert torch.equal(own["patch_embedding.weight"], patches)
    into, out = t2v["blocks.1.ffn.0.weight"], t2v["blocks.1.ffn.2.weight"]
    weight = into.norm(dim=1) * out.norm(dim=0)
    kept = weight >= weight.sort(descending=True).values[99]
    assert torch.equal(own["blocks.0.ffn.0.weight"], into[kept])
    assert torch.equal(own["blocks.0.ffn.0.bias"], t2v["blocks.1.ffn.0.bias"][kept])
    assert torch.equal(own["blocks.0.ffn.2.weight"], out[:, kept])
