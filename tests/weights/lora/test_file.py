"""Opening: every family of files becomes the same adapters, with the right scale, and nothing is read on the way."""
import json
import math

import pytest
import torch

from tests.small_models import write_hollow, write_transformer
from tests.weights.lora.lora_files import LINEAR, PAIRS, SHAPES, low_rank, low_rank_file, random, write
from wan_core.presets import TRANSFORMERS
from wan_core.weights import LoadError
from wan_core.weights.lora import Delta, DoRA, LoHa, LoKr, LowRank, Replacement, Target, open_lora

MODULES = LINEAR["t2v"]
Q = "diffusion_model.blocks.0.self_attn.q"
DIFFUSERS = {"blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.2.cross_attn.o": "blocks.2.attn2.to_out.0",
             "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj", "head.head": "proj_out",
             "time_projection.1": "condition_embedder.time_proj"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def found(path):
    """Target name -> adapter."""
    return {entry.target.name: entry.adapter for entry in open_lora(path).entries}


def alone(path):
    adapters = found(path)
    assert len(adapters) == 1
    return next(iter(adapters.values()))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("style", ["diffusion_model.", "", "transformer.", "lora_unet_", "lora_unet__", "half",
                                   "lycoris_"])
def test_one_lora_in_every_spelling(tmp_path, style, pair):
    """The same numbers under any family's names are the same adapters of the same official tensors."""
    factors, tensors = {}, {}
    for module, theirs in DIFFUSERS.items():
        factors[module] = low_rank(MODULES[module])
        name = {"diffusion_model.": f"{style}{module}", "": module, "transformer.": f"{style}{theirs}",
                "half": f"lora_unet_{module.replace('.', '_', 1)}", "lycoris_": style + theirs.replace(".", "_"),
                }.get(style, style + module.replace(".", "_"))
        for ending, factor in zip(PAIRS[pair], factors[module], strict=True):
            tensors[name + ending] = factor
    adapters = found(write(tmp_path / "x.safetensors", tensors))
    assert set(adapters) == {f"{module}.weight" for module in DIFFUSERS}
    for module, (down, up) in factors.items():
        adapter = adapters[f"{module}.weight"]
        assert torch.equal(adapter.down, down) and torch.equal(adapter.up, up) and adapter.scale == 1.0


def test_pytorch_files_and_their_wrapping(tmp_path):
    """A .ckpt with its tensors under "state_dict" is read as the plain file is."""
    down, up = low_rank((128, 128))
    tensors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    for name, content in (("plain.pt", tensors), ("wrapped.ckpt", {"state_dict": tensors, "epoch": 3})):
        torch.save(content, tmp_path / name)
        assert torch.equal(alone(tmp_path / name).up, up)


def test_factors_stay_in_the_file(tmp_path):
    """A file of 4 GB of factors opens at once: they are views of the mapped file."""
    modules = {f"blocks.{n}.ffn.0": (2**14, 2**13) for n in range(20)}
    shapes = {f"{module}{ending}": shape for module, (out, width) in modules.items()
              for ending, shape in zip(PAIRS["peft"], ((4096, width), (out, 4096)), strict=True)}
    opened = open_lora(write_hollow(tmp_path / "x.safetensors", shapes))
    assert len(opened.entries) == 20 and opened.entries[0].adapter.shape == (2**14, 2**13)


@pytest.mark.parametrize("alpha", [torch.tensor(6.0), torch.tensor([6.0]), torch.tensor(6), torch.tensor(6.0).half()])
def test_alpha_over_rank(tmp_path, alpha):
    """kohya's alpha of any type and form: the scale is alpha / rank."""
    down, up = low_rank((128, 128), rank=4)
    path = write(tmp_path / "x.safetensors", {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up,
                                              f"{Q}.alpha": alpha})
    assert alone(path).scale == 1.5 and open_lora(path).unknown == ()


def peft(path, rank=4, prefix="transformer.", **config):
    down, up = low_rank((128, 128), rank)
    metadata = {f"{prefix}{key}": value for key, value in config.items()}
    return write(path, {"transformer.blocks.0.attn1.to_q.lora_A.weight": down,
                        "transformer.blocks.0.attn1.to_q.lora_B.weight": up},
                 lora_adapter_metadata=json.dumps(metadata))


@pytest.mark.parametrize("config, scale", [
    ({"lora_alpha": 8}, 2.0),
    ({"lora_alpha": 8, "use_rslora": False}, 2.0),
    ({"lora_alpha": 8, "use_rslora": True}, 4.0),
    ({"lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 2}}, 0.5),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}, "use_rslora": True}, 1.0),
    ({"lora_alpha": 8, "alpha_pattern": {"o_q": 2, "attn1": 3, "(a+)+$": 5}}, 2.0),
    ({"lora_alpha": 8, "r": 64, "rank_pattern": {"to_q": 4}}, 2.0),
    ({}, 1.0),
])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_peft_scaling(tmp_path, config, scale, prefix):
    """PEFT's configuration in the metadata: alpha / rank, its patterns, and alpha / sqrt(rank) if rank-stabilised."""
    assert alone(peft(tmp_path / "x.safetensors", prefix=prefix, **config)).scale == scale


@pytest.mark.parametrize("module, arguments, scale", [
    ("networks.lora_wan", {"rs_lora": "True"}, 3.0),
    ("networks.lora_wan", {"use_rslora": True}, 3.0),
    ("networks.lora_wan", {"rs_lora": "False"}, 1.5),
    ("networks.lora_wan", None, 1.5),
    ("lycoris.kohya", {"rs_lora": "True"}, 1.5),
])
def test_kohya_scaling(tmp_path, module, arguments, scale):
    """Rank-stabilised networks that say so; LyCORIS' alpha holds the square root already."""
    down, up = low_rank((128, 128), rank=4)
    path = write(tmp_path / "x.safetensors", {
        "lora_unet_blocks_0_self_attn_q.lora_down.weight": down, "lora_unet_blocks_0_self_attn_q.lora_up.weight": up,
        "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(6.0)}, ss_network_module=module, ss_network_alpha="6",
        ss_network_args=json.dumps(arguments))
    assert alone(path).scale == scale


def test_converted_files_are_not_scaled_twice(tmp_path):
    """kohya's metadata without alpha tensors are leftovers of a conversion: the scale is 1."""
    path = low_rank_file(tmp_path / "x.safetensors", {"blocks.0.ffn.0": (64, 128)}, ss_network_alpha="1",
                         ss_network_dim="32")
    assert alone(path).scale == 1.0


def test_full_differences(tmp_path):
    """.diff, .diff_b and .diff_m are changes of weight, bias and modulation, those of norms too."""
    shapes = SHAPES["t2v"]
    keys = {"blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
            "blocks.1.norm3.diff": "blocks.1.norm3.weight", "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
            "patch_embedding.diff": "patch_embedding.weight", "patch_embedding.diff_b": "patch_embedding.bias",
            "head.head.diff": "head.head.weight", "time_projection.1.diff_b": "time_projection.1.bias",
            "blocks.2.diff_m": "blocks.2.modulation", "head.diff_m": "head.modulation",
            "blocks.3.modulation.diff": "blocks.3.modulation"}
    tensors = {f"diffusion_model.{key}": random(*shapes[name]) for key, name in keys.items()}
    path = write(tmp_path / "x.safetensors", tensors)
    adapters = found(path)
    assert set(adapters) == set(keys.values())
    for key, name in keys.items():
        assert isinstance(adapters[name], Delta)
        assert torch.equal(adapters[name].delta(shapes[name]), tensors[f"diffusion_model.{key}"])
    assert len(open_lora(path).match(shapes).adapters) == len(keys)


def test_a_layer_with_weight_and_bias(tmp_path):
    """A LoRA of the weight and a change of the bias are two adapters; PEFT's own bias is scaled as the weight is."""
    down, up = low_rank((128, 128), rank=4)
    factors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up, f"{Q}.alpha": torch.tensor(2.0)}
    bias = random(128)
    plain = found(write(tmp_path / "a.safetensors", factors | {f"{Q}.diff_b": bias}))
    scaled = found(write(tmp_path / "b.safetensors", factors | {f"{Q}.lora_B.bias": bias}))
    name = "blocks.0.self_attn.q.bias"
    assert isinstance(plain["blocks.0.self_attn.q.weight"], LowRank) and len(plain) == len(scaled) == 2
    assert torch.equal(plain[name].delta((128,)), bias) and torch.equal(scaled[name].delta((128,)), bias / 2)


def test_lokr(tmp_path):
    """LoKr: whole matrices have no scale whatever alpha says, factored ones alpha / rank of the right side."""
    a, b, c = random(8, 4), random(16, 32), (random(16, 2), random(2, 32))
    whole = alone(write(tmp_path / "a.safetensors", {f"{Q}.lokr_w1": a, f"{Q}.lokr_w2": b,
                                                     f"{Q}.alpha": torch.tensor(math.inf)}))
    assert isinstance(whole, LoKr) and whole.scale == 1.0
    assert torch.allclose(whole.delta((128, 128)), torch.kron(a, b))
    half = alone(write(tmp_path / "b.safetensors", {f"{Q}.lokr_w1": a, f"{Q}.lokr_w2_a": c[0], f"{Q}.lokr_w2_b": c[1],
                                                    f"{Q}.alpha": torch.tensor(5.0)}))
    assert half.scale == 2.5
    assert torch.allclose(half.delta((128, 128)), 2.5 * torch.kron(a, c[0] @ c[1]), atol=1e-6)


def test_loha_and_tucker(tmp_path):
    """LoHa, and the cores of Tucker decompositions of a convolution in LoRA, LoHa and LoKr."""
    shape = SHAPES["t2v"]["patch_embedding.weight"]
    name, kernel = "patch_embedding", (1, 2, 2)
    pair = {f"{name}.hada_w1_a": random(128, 2), f"{name}.hada_w1_b": random(2, 64), f"{name}.alpha": torch.tensor(1.0),
            f"{name}.hada_w2_a": random(128, 2), f"{name}.hada_w2_b": random(2, 64)}
    loha = alone(write(tmp_path / "a.safetensors", pair))
    assert isinstance(loha, LoHa) and loha.scale == 0.5 and loha.delta(shape).shape == shape
    cores = {f"{name}.hada_w1_a": random(2, 128), f"{name}.hada_w1_b": random(3, 16),
             f"{name}.hada_w2_a": random(2, 128), f"{name}.hada_w2_b": random(3, 16),
             f"{name}.hada_t1": random(2, 3, *kernel), f"{name}.hada_t2": random(2, 3, *kernel)}
    assert alone(write(tmp_path / "b.safetensors", cores)).delta(shape).shape == shape
    mid = {f"{name}.lora_down.weight": random(3, 16, 1, 1, 1), f"{name}.lora_up.weight": random(128, 3, 1, 1, 1),
           f"{name}.lora_mid.weight": random(3, 3, *kernel), f"{name}.alpha": torch.tensor(6.0)}
    lora = alone(write(tmp_path / "c.safetensors", mid))
    assert lora.mid is not None and lora.scale == 2.0 and lora.delta(shape).shape == shape
    core = {f"{name}.lokr_w1": random(8, 4), f"{name}.lokr_w2_a": random(2, 16), f"{name}.lokr_w2_b": random(3, 4),
            f"{name}.lokr_t2": random(2, 3, *kernel)}
    assert alone(write(tmp_path / "d.safetensors", core)).delta(shape).shape == shape


@pytest.mark.parametrize("ending, shape", [(".dora_scale", (128, 1)), (".dora_scale", (1, 128)), (".magnitude", (128,)),
                                           (".lora_magnitude_vector", (128,)),
                                           (".lora_magnitude_vector.default.weight", (128,))])
def test_dora(tmp_path, ending, shape):
    """Magnitudes under the names of LyCORIS, PEFT and others make a DoRA of the layer's LoRA."""
    down, up = low_rank((128, 128))
    adapter = alone(write(tmp_path / "x.safetensors", {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up,
                                                       f"{Q}{ending}": random(*shape)}))
    assert isinstance(adapter, DoRA) and isinstance(adapter.inner, LowRank)
    assert adapter.axis((128, 128)) == (1 if shape == (1, 128) else 0)


def test_replacements_and_declared_shapes(tmp_path):
    """.set_weight replaces a tensor; .reshape_weight states the shape of the weight that was trained."""
    norm = "diffusion_model.blocks.0.self_attn.norm_q"
    replacement = alone(write(tmp_path / "a.safetensors", {f"{norm}.set_weight": random(128)}))
    assert isinstance(replacement, Replacement)
    down, up = random(2, 64), random(128, 2)
    path = write(tmp_path / "b.safetensors", {
        "patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up,
        "patch_embedding.reshape_weight": torch.tensor([128, 16, 1, 2, 2])})
    assert isinstance(alone(path), LowRank) and open_lora(path).unknown == ()


def test_experts(tmp_path):
    """Adapters are of one expert only where the file has both; else they fit either."""
    down, up = low_rank((128, 128))
    high = {"transformer.blocks.0.attn1.to_q.lora_A.weight": down, "transformer.blocks.0.attn1.to_q.lora_B.weight": up}
    low = {key.replace("transformer.", "transformer_2."): 2 * tensor for key, tensor in high.items()}
    for tensors in (high, low):
        assert open_lora(write(tmp_path / "one.safetensors", tensors)).experts == ("both",)
    pair = open_lora(write(tmp_path / "two.safetensors", high | low, lora_adapter_metadata=json.dumps(
        {"transformer.lora_alpha": 6, "transformer_2.lora_alpha": 9})))
    assert pair.experts == ("high", "low")
    target = Target("blocks.0.self_attn.q", "weight")
    first, second = (pair.match(SHAPES["t2v"], expert).adapters[target] for expert in ("high", "low"))
    assert torch.equal(first.up, up) and torch.equal(second.up, 2 * up) and (first.scale, second.scale) == (2.0, 3.0)
    for expert in (None, "both"):
        with pytest.raises(ValueError, match="'high' or 'low'"):
            pair.match(SHAPES["t2v"], expert)


def test_keys_of_no_use_are_listed(tmp_path):
    """What belongs to no adapter is unknown and stops nothing: text encoders, whole weights, a lonely alpha."""
    down, up = low_rank((128, 128))
    extra = {"lora_te_text_model_encoder.alpha": torch.tensor(1.0), "diffusion_model.patch_embedding.weight": random(2),
             "blocks.3.ffn.0.alpha": torch.tensor(1.0), "blocks.3.ffn.2.dora_scale": random(128, 1)}
    factors = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    opened = open_lora(write(tmp_path / "x.safetensors", factors | extra))
    assert len(opened.entries) == 1 and set(opened.unknown) == set(extra)


def test_other_files_are_named(tmp_path):
    """A whole model in place of a LoRA is an error that says so."""
    path = write_transformer(tmp_path / "x.safetensors", spec=TRANSFORMERS["nano_t2v"])
    with pytest.raises(LoadError, match="holds no LoRA.*seems to be Nano T2V"):
        open_lora(path)
