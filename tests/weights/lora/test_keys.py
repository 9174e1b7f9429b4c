"""Reading key names: every spelling leads to the official tensor, and diffusers' own renaming is undone."""
import pytest
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from tests.weights.lora.lora_files import PAIRS, PREFIXES, SHAPES
from wan_core.weights.lora.keys import BLOCK_LAYERS, ENDINGS, OTHER_LAYERS, Target, official_module, read_key, target_of

ALL_NAMES = sorted(set(SHAPES["vace"]) | set(SHAPES["clip"]) | {"img_emb.emb_pos"})
MODULES = sorted({name.removesuffix(".weight") for name in ALL_NAMES if name.endswith(".weight")})


def diffusers_name(name: str) -> str:
    """What diffusers' converter of whole models calls an official tensor."""
    return next(iter(convert_wan_transformer_to_diffusers({name: None})))


@pytest.mark.parametrize("flat", [False, True])
def test_diffusers_names_are_read_back(flat):
    """Every tensor of VACE and CLIP models is found under the name that diffusers' converter gives it, dots or not."""
    for name in ALL_NAMES:
        if name.endswith("emb_pos"):
            continue
        module, _, parameter = name.rpartition(".")
        theirs = diffusers_name(name)
        if parameter == "modulation":
            module = name
        else:
            theirs = theirs.rpartition(".")[0]
        assert official_module(theirs.replace(".", "_") if flat else theirs) == module


def test_official_names_are_kept():
    """An official name is its own reading, with dots, without, and half-dotted."""
    for module in MODULES:
        assert official_module(module) == module
        assert official_module(module.replace(".", "_")) == module
        assert official_module(module.replace(".", "_", 1)) == module


def test_flat_names_are_unique():
    """No two layers have one name without dots, on which reading rests."""
    for table in (BLOCK_LAYERS, OTHER_LAYERS):
        names = [name.replace(".", "_") for official, others in table.items() for name in (official, *others)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_prefix_and_pair(prefix, pair):
    """Packager's prefix and trainer's ending are told from the layer's name, in any combination."""
    for ending, role in zip(PAIRS[pair], ("down", "up"), strict=True):
        for module in ("blocks.11.self_attn.o", "head.head", "vace_blocks.3.after_proj", "time_projection.1"):
            key = read_key(prefix + module + ending)
            assert (key.module, key.role, key.written, key.low_noise) == (module, role, module, False)


@pytest.mark.parametrize("key, module, role", [
    ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "blocks.0.self_attn.q", "down"),
    ("lora_unet__blocks_0_cross_attn_k.lora_up.weight", "blocks.0.cross_attn.k", "up"),
    ("lora_unet_blocks_22.self_attn.k.alpha", "blocks.22.self_attn.k", "alpha"),
    ("lora_unet_head_head.lora_down.weight", "head.head", "down"),
    ("lora_unet_blocks_3_cross_attn_norm_k_img.diff", "blocks.3.cross_attn.norm_k_img", "diff"),
    ("lycoris_blocks_5_attn2_to_out_0.lokr_w1", "blocks.5.cross_attn.o", "lokr_w1"),
    ("lycoris_blocks_5_ffn_net_0_proj.lokr_w2_a", "blocks.5.ffn.0", "lokr_w2_a"),
    ("lora_transformer_blocks_1_attn1_to_q.lora_up.weight", "blocks.1.self_attn.q", "up"),
    ("transformer.blocks.7.attn1.processor.to_q_lora.down.weight", "blocks.7.self_attn.q", "down"),
    ("transformer.blocks.7.attn1.processor.to_out_lora.up.weight", "blocks.7.self_attn.o", "up"),
    ("transformer.condition_embedder.time_proj.lora_B.bias", "time_projection.1", "up_bias"),
    ("transformer.proj_out.lora_A.weight", "head.head", "down"),
    ("transformer.vace_blocks.2.proj_out.lora_A.weight", "vace_blocks.2.after_proj", "down"),
    ("base_model.model.blocks.0.ffn.2.lora_magnitude_vector", "blocks.0.ffn.2", "magnitude"),
    ("diffusion_model.blocks.0.diff_m", "blocks.0", "modulation_diff"),
    ("diffusion_model.head.diff_m", "head", "modulation_diff"),
    ("diffusion_model.blocks.007.ffn.0.diff_b", "blocks.7.ffn.0", "bias_diff"),
    ("model.face_adapter.fuser_blocks.0.linear2.lora_A.weight", "face_adapter.fuser_blocks.0.linear2", "down"),
])
def test_keys_seen_in_files(key, module, role):
    """Keys as trainers write them; a layer that the tables do not have keeps its name."""
    read = read_key(key)
    assert (read.module, read.role) == (module, role)


def test_the_low_noise_prefix_is_noticed():
    """Only diffusers' second transformer marks a key as one for the low-noise expert."""
    assert read_key("transformer_2.blocks.0.attn1.to_q.lora_A.weight").low_noise
    assert not read_key("transformer.blocks.0.attn1.to_q.lora_A.weight").low_noise


@pytest.mark.parametrize("key", ["diffusion_model.blocks.0.self_attn.q.weight", "optimizer.step", "", ".", "alpha"])
def test_other_keys_are_no_adapters(key):
    """A whole weight or anything else is no part of an adapter."""
    assert read_key(key) is None


def test_parameters_that_are_no_layers():
    """A difference of a modulation is for the modulation, whether its key names the block or the parameter."""
    assert target_of("blocks.0", "modulation") == target_of("blocks.0.modulation", "weight")
    assert target_of("blocks.0", "modulation") == Target("blocks.0", "modulation")
    assert target_of("img_emb.emb_pos", "weight").name == "img_emb.emb_pos"
    assert target_of("blocks.0.ffn.0", "weight").name == "blocks.0.ffn.0.weight"


def test_every_ending_is_told_from_its_longer_ones():
    """The longest ending counts: none is taken for a shorter one that it ends with."""
    assert all(read_key(f"blocks.0.ffn.0{ending}") == ("blocks.0.ffn.0", role, "blocks.0.ffn.0", False)
               for ending, role in ENDINGS.items())
