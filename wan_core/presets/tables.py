"""Every released Wan 2.1 and 2.2 model, its parts and its sampling defaults, and the bundled nano family.

Sources: wan/configs/*.py and generate.py of Wan-Video/Wan2.1 and Wan2.2; latent statistics from the constructors of the
official VAE classes. Where the README recommends something else than the code's default, a comment says so. The tables
are read-only mappings from name to spec; equal architectures are equal specs, so that a T2V-14B file and one expert of
T2V-A14B, which nobody can tell apart by shapes, compare as equal.
"""
from dataclasses import replace
from types import MappingProxyType

from .specs import CLIPVisionSpec, Preset, Sampling, TextEncoderSpec, TinyVAESpec, TransformerSpec, VAESpec

_WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
    -0.9497, 0.2503, -0.2921,
)
_WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
    2.8251, 1.916,
)
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.157,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)

# The official negative prompts, character for character: models were tuned with them in place.
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JP"
    "EG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体"
    "，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_NEGATIVE_S2V = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三"
    "条腿，背景人很多，倒着走"
)
_NEGATIVE_I2V = "镜头晃动，" + _NEGATIVE
_NEGATIVE_FLF2V = "镜头切换，" + _NEGATIVE_I2V

_T2V_1_3B = TransformerSpec(model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_T2V_14B = TransformerSpec(model_type="t2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_I2V_14B = replace(_T2V_14B, model_type="i2v", in_dim=36, image_dim=1280, image_tokens=257)
# Released heads have 128 channels; a model this narrow needs several smaller ones to learn motion.
_NANO_T2V = TransformerSpec(
    model_type="t2v", dim=128, ffn_dim=384, num_heads=4, num_layers=6, text_dim=96, text_len=512)

TRANSFORMERS = MappingProxyType({
    "wan21_t2v_1_3b": _T2V_1_3B,
    "wan21_t2v_14b": _T2V_14B,
    "wan21_i2v_14b": _I2V_14B,
    "wan21_flf2v_14b": replace(_I2V_14B, model_type="flf2v", image_tokens=514),
    "wan21_vace_1_3b": replace(_T2V_1_3B, model_type="vace", vace_layers=tuple(range(0, 30, 2)), vace_in_dim=96),
    "wan21_vace_14b": replace(_T2V_14B, model_type="vace", vace_layers=tuple(range(0, 40, 5)), vace_in_dim=96),
    "wan22_t2v_a14b": _T2V_14B,
    # Unlike 2.1 the image enters through the channels alone: no CLIP tokens.
    "wan22_i2v_a14b": replace(_T2V_14B, model_type="i2v", in_dim=36),
    "wan22_ti2v_5b": replace(
        _T2V_1_3B, model_type="ti2v", dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48),
    "wan22_s2v_14b": replace(_T2V_14B, model_type="s2v"),
    "wan22_animate_14b": replace(_I2V_14B, model_type="animate"),
    "nano_t2v": _NANO_T2V,
    "nano_i2v": replace(_NANO_T2V, model_type="i2v", num_layers=4, in_dim=36, image_dim=64, image_tokens=17),
    "nano_ti2v": replace(_NANO_T2V, model_type="ti2v", ffn_dim=256, num_layers=4, in_dim=48, out_dim=48),
    "nano_vace": replace(_NANO_T2V, model_type="vace", vace_layers=(0, 3), vace_in_dim=96),
})

_WAN21_VAE = VAESpec(kind="wan21", dim=96, decoder_dim=96, z_dim=16, mean=_WAN21_MEAN, std=_WAN21_STD)

_WAN22_VAE = VAESpec(
    kind="wan22", dim=160, decoder_dim=256, z_dim=48, mean=_WAN22_MEAN, std=_WAN22_STD, spatial_stride=16)

VAES = MappingProxyType({
    "wan21_vae": _WAN21_VAE,
    "wan22_vae": _WAN22_VAE,
    # The nano weights are folded so that their latents have the released VAE's mean and standard deviation.
    "nano_vae": replace(_WAN21_VAE, dim=16, decoder_dim=16, num_res_blocks=1),
    "nano_vae22": replace(_WAN22_VAE, dim=8, decoder_dim=11, num_res_blocks=1),
})

_TAEW21 = TinyVAESpec(vae="wan21_vae", z_dim=16, mean=_WAN21_MEAN, std=_WAN21_STD)

TINY_VAES = MappingProxyType({
    # taew2_1 and lighttaew2_1, of one architecture.
    "taew2_1": _TAEW21,
    "taew2_2": replace(_TAEW21, vae="wan22_vae", z_dim=48, mean=_WAN22_MEAN, std=_WAN22_STD, patch=2),
    "nano_tiny_vae": replace(_TAEW21, vae="nano_vae", widths=(16, 16, 10, 10), encoder_width=6),
})

TEXT_ENCODERS = MappingProxyType({
    "umt5_xxl": TextEncoderSpec(
        vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24),
    "nano_umt5": TextEncoderSpec(vocab_size=336, dim=96, dim_attn=96, dim_ffn=192, num_heads=6, num_layers=2),
})

CLIP_VISION = MappingProxyType({
    "clip_vit_h_14": CLIPVisionSpec(
        image_size=224, patch_size=14, dim=1280, mlp_dim=5120, num_heads=16, num_layers=32, out_dim=1024),
    "nano_clip": CLIPVisionSpec(
        image_size=64, patch_size=16, dim=64, mlp_dim=128, num_heads=2, num_layers=4, out_dim=64),
})

_P480 = {"width": 832, "height": 480}
_P720 = {"width": 1280, "height": 720}

# For the 1.3B model the README advises shift 8 to 12 and guidance 6 at 480p.
_WAN21 = Sampling(steps=50, shift=5.0, guidance_low=5.0, guidance_high=5.0, fps=16, frames=81, **_P720,
                  negative_prompt=_NEGATIVE)
_WAN21_I2V = replace(_WAN21, steps=40, negative_prompt=_NEGATIVE_I2V)
_NANO = Sampling(steps=20, shift=3.0, guidance_low=3.0, guidance_high=3.0, fps=8, frames=17, width=64, height=64,
                 negative_prompt="")

_T2V_14B_PRESET = Preset(
    name="wan21_t2v_14b", title="Wan 2.1 T2V 14B", transformer="wan21_t2v_14b", vae="wan21_vae",
    text_encoder="umt5_xxl", sampling=_WAN21)
_I2V_720P_PRESET = replace(
    _T2V_14B_PRESET, name="wan21_i2v_14b_720p", title="Wan 2.1 I2V 14B 720P", transformer="wan21_i2v_14b",
    clip_vision="clip_vit_h_14", sampling=_WAN21_I2V)
_NANO_PRESET = Preset(
    name="nano_t2v", title="Nano T2V", transformer="nano_t2v", vae="nano_vae", text_encoder="nano_umt5",
    sampling=_NANO)

PRESETS = MappingProxyType({preset.name: preset for preset in (
    replace(_T2V_14B_PRESET, name="wan21_t2v_1_3b", title="Wan 2.1 T2V 1.3B", transformer="wan21_t2v_1_3b",
            sampling=replace(_WAN21, **_P480)),
    _T2V_14B_PRESET,
    # The same weights as T2V 14B, asked for a single frame; the size is the README's.
    replace(_T2V_14B_PRESET, name="wan21_t2i_14b", title="Wan 2.1 T2I 14B",
            sampling=replace(_WAN21, frames=1, width=1024, height=1024)),
    # 480P and 720P are the same architecture; the official code lowers the shift to 3 for 832x480 and 480x832.
    replace(_I2V_720P_PRESET, name="wan21_i2v_14b_480p", title="Wan 2.1 I2V 14B 480P",
            sampling=replace(_WAN21_I2V, shift=3.0, **_P480)),
    _I2V_720P_PRESET,
    replace(_I2V_720P_PRESET, name="wan21_flf2v_14b", title="Wan 2.1 FLF2V 14B 720P", transformer="wan21_flf2v_14b",
            sampling=replace(_WAN21, shift=16.0, negative_prompt=_NEGATIVE_FLF2V)),
    replace(_T2V_14B_PRESET, name="wan21_vace_1_3b", title="Wan 2.1 VACE 1.3B", transformer="wan21_vace_1_3b",
            sampling=replace(_WAN21, shift=16.0, **_P480)),
    replace(_T2V_14B_PRESET, name="wan21_vace_14b", title="Wan 2.1 VACE 14B", transformer="wan21_vace_14b",
            sampling=replace(_WAN21, shift=16.0)),
    replace(_T2V_14B_PRESET, name="wan22_t2v_a14b", title="Wan 2.2 T2V A14B", transformer="wan22_t2v_a14b",
            experts=True, sampling=replace(
                _WAN21, steps=40, shift=12.0, guidance_low=3.0, guidance_high=4.0, boundary=0.875)),
    # The official docstring advises shift 3 at 480p.
    replace(_T2V_14B_PRESET, name="wan22_i2v_a14b", title="Wan 2.2 I2V A14B", transformer="wan22_i2v_a14b",
            experts=True, sampling=replace(
                _WAN21, steps=40, guidance_low=3.5, guidance_high=3.5, boundary=0.9)),
    replace(_T2V_14B_PRESET, name="wan22_ti2v_5b", title="Wan 2.2 TI2V 5B", transformer="wan22_ti2v_5b",
            vae="wan22_vae", sampling=replace(_WAN21, fps=24, frames=121, width=1280, height=704)),
    # 80 frames is one clip of a longer run; the size is the README's.
    replace(_T2V_14B_PRESET, name="wan22_s2v_14b", title="Wan 2.2 S2V 14B", transformer="wan22_s2v_14b",
            sampling=replace(_WAN21, steps=40, shift=3.0, guidance_low=4.5, guidance_high=4.5, frames=80,
                             width=1024, height=704, negative_prompt=_NEGATIVE_S2V)),
    # 77 frames is one clip of a longer run; guidance 1 means that no negative branch is computed.
    replace(_I2V_720P_PRESET, name="wan22_animate_14b", title="Wan 2.2 Animate 14B", transformer="wan22_animate_14b",
            sampling=replace(_WAN21, steps=20, guidance_low=1.0, guidance_high=1.0, fps=30, frames=77)),
    _NANO_PRESET,
    replace(_NANO_PRESET, name="nano_i2v", title="Nano I2V", transformer="nano_i2v", clip_vision="nano_clip"),
    replace(_NANO_PRESET, name="nano_ti2v", title="Nano TI2V", transformer="nano_ti2v", vae="nano_vae22",
            sampling=replace(_NANO, width=128, height=128)),
    replace(_NANO_PRESET, name="nano_t2v_a", title="Nano T2V, expert pair", experts=True,
            sampling=replace(_NANO, boundary=0.875)),
)})
