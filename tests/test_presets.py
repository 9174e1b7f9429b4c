"""Presets: the tables hold the official numbers, and checkpoints are recognised from names and shapes alone."""
import json
import math
import os
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from wan_core.presets import (
    CLIP_VISION,
    PREFIXES,
    PRESETS,
    TEXT_ENCODERS,
    TINY_VAES,
    TRANSFORMERS,
    VAES,
    TransformerSpec,
    recognise,
    strip_prefix,
)
from wan_core.weights import build_module, can_run, expected_shapes

GOLDEN = Path(os.environ.get("WAN_GOLDEN_DIR") or Path(__file__).parent / "golden")

# keys file -> (kind, candidates, the table's spec)
KEYS = {
    "wan21_t2v_1_3b": ("transformer", ("wan21_t2v_1_3b",), TRANSFORMERS["wan21_t2v_1_3b"]),
    "wan21_t2v_14b": ("transformer", ("wan21_t2v_14b", "wan21_t2i_14b", "wan22_t2v_a14b"),
                      TRANSFORMERS["wan21_t2v_14b"]),
    "wan22_t2v_a14b_expert": ("transformer", ("wan21_t2v_14b", "wan21_t2i_14b", "wan22_t2v_a14b"),
                              TRANSFORMERS["wan22_t2v_a14b"]),
    "wan21_i2v_14b": ("transformer", ("wan21_i2v_14b_480p", "wan21_i2v_14b_720p"), TRANSFORMERS["wan21_i2v_14b"]),
    "wan21_flf2v_14b": ("transformer", ("wan21_flf2v_14b",), TRANSFORMERS["wan21_flf2v_14b"]),
    "wan21_vace_1_3b": ("transformer", ("wan21_vace_1_3b",), TRANSFORMERS["wan21_vace_1_3b"]),
    "wan21_vace_14b": ("transformer", ("wan21_vace_14b",), TRANSFORMERS["wan21_vace_14b"]),
    "wan22_i2v_a14b_expert": ("transformer", ("wan22_i2v_a14b",), TRANSFORMERS["wan22_i2v_a14b"]),
    "wan22_ti2v_5b": ("transformer", ("wan22_ti2v_5b",), TRANSFORMERS["wan22_ti2v_5b"]),
    "wan22_s2v_14b": ("transformer", ("wan22_s2v_14b",), TRANSFORMERS["wan22_s2v_14b"]),
    "wan22_animate_14b": ("transformer", ("wan22_animate_14b",), TRANSFORMERS["wan22_animate_14b"]),
    "wan21_vae": ("vae", ("wan21_vae",), VAES["wan21_vae"]),
    "wan22_vae": ("vae", ("wan22_vae",), VAES["wan22_vae"]),
    "umt5_xxl_encoder": ("text_encoder", ("umt5_xxl",), TEXT_ENCODERS["umt5_xxl"]),
    "clip_vision_vit_h_14": ("clip_vision", ("clip_vit_h_14",), CLIP_VISION["clip_vit_h_14"]),
}
RUNNABLE = {
    "wan21_t2v_1_3b": 1_418_996_800, "wan21_t2v_14b": 14_288_491_584, "wan22_t2v_a14b_expert": 14_288_491_584,
    "wan21_i2v_14b": 16_394_878_784, "wan21_flf2v_14b": 16_395_536_704, "wan21_vace_1_3b": 2_153_972_032,
    "wan21_vace_14b": 17_337_592_896, "wan22_i2v_a14b_expert": 14_288_901_184, "wan22_ti2v_5b": 4_999_787_712,
    "wan21_vae": 126_892_531, "wan22_vae": 704_688_668, "umt5_xxl_encoder": 5_680_910_336,
    "clip_vision_vit_h_14": 632_076_800,
}


def keys(name: str) -> dict[str, tuple[int, ...]]:
    table = json.loads((GOLDEN / "keys" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in table.items()}


def stats() -> dict:
    return json.loads((GOLDEN / "stats.json").read_text(encoding="utf-8"))


def test_every_golden_key_list_is_covered():
    """No official model is left out of the recognition test."""
    assert {path.stem for path in (GOLDEN / "keys").glob("*.json")} == set(KEYS)


@pytest.mark.parametrize("prefix", ("", *PREFIXES))
@pytest.mark.parametrize("name", KEYS)
def test_every_released_model_is_recognised(name, prefix):
    """Each official model is told from its tensors, under every prefix, with all candidates of the same shapes."""
    kind, names, spec = KEYS[name]
    shapes = {prefix + key: shape for key, shape in keys(name).items()}
    found_prefix, mapping = strip_prefix(shapes)
    recognition = recognise({short: shapes[full] for short, full in mapping.items()})
    assert found_prefix == prefix
    assert (recognition.kind, recognition.names, recognition.spec) == (kind, names, spec)


def test_every_module_that_can_run_is_compared():
    """No architecture that this version runs is left out of the tests of names, shapes and counts; nor is a preset."""
    assert {name for name, (_, _, spec) in KEYS.items() if can_run(spec)} == set(RUNNABLE)
    compared = {preset for _, presets, _ in KEYS.values() for preset in presets}
    assert {name for name in PRESETS if not name.startswith("nano")} <= compared


@pytest.mark.parametrize("name", RUNNABLE)
def test_modules_have_the_official_names_and_shapes(name):
    """The module built from a spec has exactly the official model's tensors."""
    assert expected_shapes(KEYS[name][2]) == keys(name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_modules_have_the_official_parameter_count(name):
    """Parameter counts agree with the published ones."""
    module = build_module(KEYS[name][2])
    assert sum(parameter.numel() for parameter in module.parameters()) == RUNNABLE[name]


@pytest.mark.parametrize("name", sorted({preset.transformer for preset in PRESETS.values()
                                         if can_run(TRANSFORMERS[preset.transformer])}))
def test_own_modules_are_recognised_as_their_preset(name):
    """A checkpoint written from a module of the table, nano included, leads back to the table."""
    assert recognise(expected_shapes(TRANSFORMERS[name])).spec == TRANSFORMERS[name]


@pytest.mark.parametrize("table, name", [
    (VAES, "nano_vae"), (VAES, "nano_vae22"), (TINY_VAES, "nano_tiny_vae"),
    (TEXT_ENCODERS, "nano_umt5"), (CLIP_VISION, "nano_clip")])
def test_nano_parts_are_recognised(table, name):
    """The nano VAEs, text encoder and CLIP vision model lead back to their table entry."""
    recognition = recognise(expected_shapes(table[name]))
    assert (recognition.names, recognition.spec) == ((name,), table[name])


def test_an_unreleased_size_gets_its_spec_from_the_shapes():
    """A transformer or VAE of unknown width is described, not refused, and claims no preset."""
    spec = TransformerSpec(model_type="t2v", dim=384, ffn_dim=512, num_heads=3, num_layers=2, text_dim=64)
    recognition = recognise(expected_shapes(spec))
    assert (recognition.names, recognition.spec) == ((), spec)
    for vae in (replace(VAES["wan21_vae"], dim=24, decoder_dim=24), replace(VAES["wan22_vae"], dim=24, decoder_dim=40)):
        recognition = recognise(expected_shapes(vae))
        assert (recognition.names, recognition.spec) == ((), vae)


@pytest.mark.parametrize("vae", [
    replace(VAES["wan21_vae"], dim=8, decoder_dim=8, dim_mult=(1, 3, 2), num_res_blocks=1,
            temporal_downsample=(True, False), spatial_stride=4, temporal_stride=2),
    replace(VAES["wan22_vae"], dim=8, decoder_dim=12, dim_mult=(1, 4, 4), num_res_blocks=3,
            temporal_downsample=(False, True), spatial_stride=8, temporal_stride=2)])
def test_vae_layout_is_read_from_the_shapes(vae):
    """Levels, multipliers, widths of both halves and temporal strides of a VAE come from its tensors."""
    assert recognise(expected_shapes(vae)).spec == vae


def transformers_clip(dim: int = 1280, mlp_dim: int = 5120, blocks: int = 32) -> dict[str, tuple[int, ...]]:
    """A part of the shapes of ComfyUI's clip_vision_h, or of another size."""
    shapes = {"vision_model.embeddings.patch_embedding.weight": (dim, 3, 14, 14),
              "vision_model.embeddings.position_embedding.weight": (257, dim), "visual_projection.weight": (1024, dim)}
    return shapes | {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (mlp_dim, dim) for i in range(blocks)}


def test_clip_vision_in_every_layout():
    """ViT-H/14 is known by the official names with the text half beside it, and by transformers' names."""
    whole = {f"visual.{name}": shape for name, shape in keys("clip_vision_vit_h_14").items()}
    for shapes, dialect in ((whole | {"textual.norm.weight": (1024,), "log_scale": ()}, "official"),
                            (transformers_clip(), "transformers")):
        recognition = recognise(shapes)
        assert (recognition.names, recognition.dialect) == (("clip_vit_h_14",), dialect)


def test_other_sizes_of_clip_vision():
    """Depth and width follow from the shapes where the width is a multiple of ViT-H's heads; ViT-L, whose activation is
    another one, is refused by its width, and positions that are no square are named."""
    spec = recognise(transformers_clip(160, 320, 5)).spec
    assert spec == replace(CLIP_VISION["clip_vit_h_14"], dim=160, mlp_dim=320, num_heads=2, num_layers=5)
    vit_l = recognise(transformers_clip(1024, 4096, 24))
    assert vit_l.spec is None and "a CLIP vision model, but its width is 1024 and not the 1280" in vit_l.reason
    positions = {"vision_model.embeddings.position_embedding.weight": (256, 1280)}
    assert "256 positions are no square" in recognise(transformers_clip() | positions).reason


FOREIGN = {
    "lora": ("lora", "LoRA", {"blocks.0.self_attn.q.lora_A.weight": (32, 5120)}),
    "lora kohya": ("lora", "LoRA", {"lora_unet_blocks_0_self_attn_q.lora_down.weight": (32, 5120)}),
    "lora lycoris": ("lora", "LoRA", {"lycoris_blocks_0_ffn_0.lokr_w1": (4, 4)}),
    "lora diff": ("lora", "LoRA", {"blocks.0.norm3.diff_b": (5120,)}),
    "a part": ("transformer", "in several files", {"blocks.39.self_attn.norm_q.weight": (5120,)}),
    "a diffusers part": ("transformer", "in several files", {"blocks.39.attn1.norm_q.weight": (5120,)}),
    "ltx part": ("other", "another model", {"transformer_blocks.0.attn1.norm_q.weight": (2048,)}),
    "sd vae": ("vae", "Stable Diffusion VAE", {"encoder.conv_in.weight": (128, 3, 3, 3)}),
    "clip text": ("other", "CLIP text", {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)}),
    "open-clip": ("clip_vision", "open-clip layout", {
        "visual.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280), "text_projection": (1024, 1024)}),
    "gguf": ("text_encoder", "GGUF", {"enc.blk.9.attn_q.weight": (4096, 4096)}),
    "sd": ("other", "Stable Diffusion", {"input_blocks.0.0.weight": (320, 4, 3, 3)}),
    "flux": ("other", "Flux", {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}),
    "humo": ("transformer", "HuMo", {"head.modulation": (1, 2, 5120),
                                     "audio_proj.audio_proj_glob_1.layer.bias": (1536,)}),
    "unknown": ("other", "unknown model (first tensors: weird.weight)", {"weird.weight": (1,)}),
    "nothing": ("other", "first tensors: none", {}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_named(case):
    """What people open by mistake is named instead of failing on a missing key."""
    kind, text, shapes = FOREIGN[case]
    recognition = recognise(shapes)
    assert (recognition.kind, recognition.spec, recognition.names) == (kind, None, ())
    assert text in recognition.reason


@pytest.mark.parametrize("change, text", [
    ({"head.modulation": ()}, "head.modulation"),
    ({"head.modulation": (1, 2, 100)}, "multiple of the head size"),
    ({"patch_embedding.weight": (1536, 32, 1, 2, 2)}, "32"),
    ({"patch_embedding.weight": (0, 16, 1, 2, 0)}, "impossible"),
    ({"text_embedding.0.weight": None}, "text_embedding.0.weight' is missing"),
])
def test_odd_transformers_are_explained(change, text):
    """Shapes that contradict each other give a reason and no spec, and never an exception."""
    shapes = {name: shape for name, shape in (keys("wan21_t2v_1_3b") | change).items() if shape is not None}
    recognition = recognise(shapes)
    assert recognition.kind == "transformer" and recognition.spec is None and text in recognition.reason


@pytest.mark.parametrize("name", KEYS)
def test_a_part_of_a_model_never_raises(name):
    """Any subset of an official file's tensors is answered, whatever is missing."""
    full = keys(name)
    for step in (2, 3, 7):
        for first in range(step):
            assert recognise(dict(list(full.items())[first::step])).kind


def test_prefixes_are_stripped_once_and_kept_for_strangers():
    """The majority's prefix goes, other names stay; two names that become one are an error."""
    names = ["model.diffusion_model.a", "model.diffusion_model.model.b", "scaled_fp8"]
    assert strip_prefix(names) == ("model.diffusion_model.", {
        "a": "model.diffusion_model.a", "model.b": "model.diffusion_model.model.b", "scaled_fp8": "scaled_fp8"})
    assert strip_prefix([]) == ("", {})
    with pytest.raises(ValueError, match="two copies"):
        strip_prefix(["model.a", "model.b", "a"])


def test_latent_statistics_and_negative_prompts_are_the_official_ones():
    """Mean, standard deviation and negative prompts agree with the official code, number by number."""
    official = stats()
    for name in ("wan21_vae", "wan22_vae"):
        assert list(VAES[name].mean) == official[name]["mean"]
        assert list(VAES[name].std) == official[name]["std"]
    prompts = official["negative_prompts"]
    i2v = prompts["wan21_i2v_prefix"] + prompts["shared"]
    expected = {"wan21_i2v_14b_480p": i2v, "wan21_i2v_14b_720p": i2v, "wan22_s2v_14b": prompts["s2v"],
                "wan21_flf2v_14b": prompts["wan21_flf2v_prefix"] + i2v}
    for name, preset in PRESETS.items():
        if name.startswith("nano"):
            assert preset.sampling.negative_prompt == ""
            continue
        assert preset.sampling.negative_prompt == expected.get(name, prompts["shared"]), name


# name -> steps, shift, (low, high), boundary, fps, frames
SAMPLING = {
    "wan21_t2v_1_3b": (50, 5.0, (5.0, 5.0), None, 16, 81), "wan21_t2v_14b": (50, 5.0, (5.0, 5.0), None, 16, 81),
    "wan21_t2i_14b": (50, 5.0, (5.0, 5.0), None, 16, 1), "wan21_i2v_14b_480p": (40, 3.0, (5.0, 5.0), None, 16, 81),
    "wan21_i2v_14b_720p": (40, 5.0, (5.0, 5.0), None, 16, 81), "wan21_flf2v_14b": (50, 16.0, (5.0, 5.0), None, 16, 81),
    "wan21_vace_1_3b": (50, 16.0, (5.0, 5.0), None, 16, 81), "wan21_vace_14b": (50, 16.0, (5.0, 5.0), None, 16, 81),
    "wan22_t2v_a14b": (40, 12.0, (3.0, 4.0), 0.875, 16, 81), "wan22_i2v_a14b": (40, 5.0, (3.5, 3.5), 0.9, 16, 81),
    "wan22_ti2v_5b": (50, 5.0, (5.0, 5.0), None, 24, 121), "wan22_s2v_14b": (40, 3.0, (4.5, 4.5), None, 16, 80),
    "wan22_animate_14b": (20, 5.0, (1.0, 1.0), None, 30, 77),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_defaults_are_the_official_ones(name):
    """Steps, shift, guidance, boundary, rate and length are those of the official configuration."""
    s = PRESETS[name].sampling
    assert (s.steps, s.shift, (s.guidance_low, s.guidance_high), s.boundary, s.fps, s.frames) == SAMPLING[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
    """Parts exist and fit each other, sizes fit the grid, and only expert pairs have a boundary."""
    preset = PRESETS[name]
    transformer, vae = TRANSFORMERS[preset.transformer], VAES[preset.vae]
    assert preset.name == name and preset.sampling.solver == "unipc"
    assert transformer.out_dim == vae.z_dim
    assert transformer.text_dim == TEXT_ENCODERS[preset.text_encoder].dim
    assert transformer.dim // transformer.num_heads == (32 if name.startswith("nano") else 128)
    assert (transformer.image_dim is None) == (preset.clip_vision is None)
    assert preset.experts == (preset.sampling.boundary is not None)
    assert preset.experts or preset.sampling.guidance_low == preset.sampling.guidance_high
    grid = vae.spatial_stride * transformer.patch_size[1]
    assert preset.sampling.width % grid == 0 and preset.sampling.height % grid == 0
    # Audio clips are 80 frames: the first of 81 is cut off, because it repeats the reference.
    assert preset.sampling.frames % vae.temporal_stride == (0 if transformer.model_type == "s2v" else 1)


def test_strides_follow_from_the_layout():
    """The strides of a VAE spec are those of its levels."""
    for vae in VAES.values():
        assert vae.temporal_stride == 2 ** sum(vae.temporal_downsample)
        assert vae.spatial_stride == 2 ** (len(vae.dim_mult) - 1) * (2 if vae.kind == "wan22" else 1)


def test_tables_and_specs_are_read_only():
    """Nobody changes a preset for everybody else."""
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["nano_t2v"]
    with pytest.raises(FrozenInstanceError):
        PRESETS["nano_t2v"].sampling.steps = 1


def test_contradictory_specs_are_refused():
    """Heads that do not divide the width, and statistics that do not fit the channels, are errors at once."""
    with pytest.raises(ValueError, match="cannot have 7 heads"):
        replace(TRANSFORMERS["nano_t2v"], num_heads=7)
    with pytest.raises(ValueError, match="16 latent channels"):
        replace(VAES["wan21_vae"], mean=(0.0,))


def test_golden_key_lists_add_up():
    """The key lists are whole: their numbers add up to the published parameter counts."""
    counts = {"wan22_s2v_14b": 16_295_755_609, "wan22_animate_14b": 17_274_816_884, **RUNNABLE}
    assert set(counts) == set(KEYS)
    for name, count in counts.items():
        # Animate's blur kernels are buffers, which published counts leave out.
        assert sum(math.prod(s) for key, s in keys(name).items() if not key.endswith(".kernel")) == count, name
