"""Nodes that open model files. They read headers only; weights are read when a model first runs.

The bundled nano models stand first in every list, so a new graph runs before anything is downloaded. Where a file is
replaced on disk, `IS_CHANGED` makes ComfyUI open it again.
"""

import logging

from ..wan_core.dit import BACKENDS
from ..wan_core.memory.placement import DTYPES
from ..wan_core.models import Model, load_clip_vision, load_experts, load_model, load_text_encoder, load_vae
from ..wan_core.presets import PRESETS, TRANSFORMERS
from ..wan_core.vae import Tiling
from ..wan_core.weights import TARGETS, can_run
from ..wan_core.weights.fp8 import SWITCH
from .host import HOST
from .sockets import ComfyCLIPVision, ComfyTextEncoder, ComfyVAE

log = logging.getLogger(__name__)

AUTO = "auto"
AS_STORED = "as stored"

PRECISION = ([AUTO, *DTYPES], {
    "default": AUTO,
    "tooltip": "What the model computes in. auto: the file's own bfloat16 or float16 on a GPU (bfloat16 for float32 "
               "files), float32 on a CPU."})
ATTENTION = (list(BACKENDS), {
    "default": "sdpa",
    "tooltip": "How attention is computed. sdpa lets PyTorch choose its kernel, its others hold it to one. auto: the "
               "fastest exact one that runs here. flash2, flash3, sage, sage3 are packages; sage and sage3 are faster "
               "and less exact. What cannot run gives way to sdpa, and the log says why. For noise levels of their "
               "own, see Wan Attention."})
# Optional, because prompts were saved before there was this widget.
WEIGHTS = ([AS_STORED, *TARGETS], {
    "default": AS_STORED,
    "tooltip": "How the transformer's weights are kept in memory. as stored: in the file's own format, quantised or "
               "not. The others make BF16, FP16 or FP32 files smaller while they are loaded: fp8_scaled and q8_0 to "
               "half of BF16 with little loss, q6_k to 41 %, q5_k to 34 %, q4_k to 28 %."})
FP8_PRODUCTS = (list(SWITCH), {
    "default": "auto",
    "tooltip": "Whether FP8 weights are multiplied in FP8, which is faster and a little less exact. auto: on cards "
               "that have it (NVIDIA since RTX 40). off: they are turned into the working precision first."})


class WanCoreModelLoader:
    """A single transformer."""

    DESCRIPTION = ("Opens a Wan transformer: 2.1 T2V, I2V, FLF2V or VACE, 2.2 TI2V 5B, or a bundled nano model. What "
                   "the file is, is read from its tensors. Weights are loaded when the sampler runs.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan", "load diffusion model", "unet loader", "checkpoint", "wan 2.1", "t2v", "i2v", "flf2v",
                      "vace", "ti2v", "5b", "nano"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for Wan Sampler.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        presets = [name for name, preset in PRESETS.items()
                   if not preset.experts and can_run(TRANSFORMERS[preset.transformer])]
        return {"required": {
            "model": (HOST.model_names("diffusion_models"), {
                "tooltip": "A file in models/diffusion_models, in full or half precision, FP8, int8, MXFP8, NVFP4 or "
                           "GGUF, or one of the nano models that come with this pack."}),
            "preset": ([AUTO, *presets], {
                "default": AUTO,
                "tooltip": "Which model this is. auto: the first that has the file's architecture. A name: the file is "
                           "refused if it is another model, and the sampler's official values are this model's."}),
            "precision": PRECISION,
            "attention": ATTENTION,
        }, "optional": {
            "weights": WEIGHTS,
            "fp8_products": FP8_PRODUCTS,
        }, "hidden": {
            "node_id": "UNIQUE_ID",
        }}

    @classmethod
    def IS_CHANGED(cls, model: str, **_others: object) -> str:
        return HOST.fingerprint("diffusion_models", model)

    def load(self, model: str, preset: str, precision: str, attention: str, weights: str = AS_STORED,
             fp8_products: str = "auto", node_id: str | None = None) -> tuple[Model]:
        loaded = load_model(HOST.model_path("diffusion_models", model), preset=None if preset == AUTO else preset,
                            placement=HOST.placement("transformer"), dtype=precision, attention=attention,
                            fp8_products=fp8_products)
        return _found(loaded, weights, node_id)


class WanCoreExpertPairLoader:
    """A high- and a low-noise expert as one model."""

    DESCRIPTION = ("Opens the two experts of Wan 2.2 T2V-A14B or I2V-A14B (or the bundled nano pair) as one model. The "
                   "sampler switches between them by noise level, as the official code does, and keeps only one in "
                   "memory.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan 2.2", "a14b", "high noise", "low noise", "moe", "two models", "unet loader"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("Both experts as one model, for Wan Sampler.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        names = HOST.model_names("diffusion_models")
        return {"required": {
            "high_noise": (names, {
                "default": first_with("high_noise", names),
                "tooltip": "The expert that lays out the video, at high noise (...high_noise...)."}),
            "low_noise": (names, {
                "default": first_with("low_noise", names),
                "tooltip": "The expert that draws the detail, at low noise (...low_noise...)."}),
            "precision": PRECISION,
            "attention": ATTENTION,
        }, "optional": {
            "weights": WEIGHTS,
            "fp8_products": FP8_PRODUCTS,
        }, "hidden": {
            "node_id": "UNIQUE_ID",
        }}

    @classmethod
    def IS_CHANGED(cls, high_noise: str, low_noise: str, **_others: object) -> str:
        return HOST.fingerprint("diffusion_models", high_noise, low_noise)

    def load(self, high_noise: str, low_noise: str, precision: str, attention: str,
             weights: str = AS_STORED, fp8_products: str = "auto", node_id: str | None = None) -> tuple[Model]:
        # Nothing in the tensors tells the experts apart; their names usually do.
        if "low_noise" in high_noise.lower() or "high_noise" in low_noise.lower():
            log.warning("Wan: the high-noise expert is %s and the low-noise expert %s; they seem to be swapped.",
                        high_noise, low_noise)
        loaded = load_experts(HOST.model_path("diffusion_models", high_noise),
                              HOST.model_path("diffusion_models", low_noise),
                              placement=HOST.placement("transformer"), dtype=precision, attention=attention,
                              fp8_products=fp8_products)
        return _found(loaded, weights, node_id)


class WanCoreTextEncoderLoader:
    """A UMT5 encoder as ComfyUI's CLIP."""

    DESCRIPTION = ("Opens a UMT5 text encoder with its tokenizer. The result works in Wan Text Encode and in ComfyUI's "
                   "own CLIP Text Encode.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan", "umt5", "t5", "clip loader", "load clip", "text encoder"]
    RETURN_TYPES = ("CLIP",)
    RETURN_NAMES = ("clip",)
    OUTPUT_TOOLTIPS = ("The text encoder, for Wan Text Encode or CLIP Text Encode.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "text_encoder": (HOST.model_names("text_encoders"), {
                "tooltip": "A file in models/text_encoders: umt5_xxl as BF16, FP16, FP8 or GGUF for the released "
                           "models, the nano encoder for the nano models. A file without a tokenizer inside, such as "
                           "the official .pth, needs Google's spiece.model beside it or in a folder tokenizer."}),
        }, "hidden": {
            "node_id": "UNIQUE_ID",
        }}

    @classmethod
    def IS_CHANGED(cls, text_encoder: str, **_others: object) -> str:
        return HOST.fingerprint("text_encoders", text_encoder)

    def load(self, text_encoder: str, node_id: str | None = None) -> tuple[ComfyTextEncoder]:
        encoder = load_text_encoder(HOST.model_path("text_encoders", text_encoder),
                                    placement=HOST.placement("text_encoder"))
        HOST.say(node_id, encoder.part.summary())
        return (ComfyTextEncoder(encoder),)


class WanCoreCLIPVisionLoader:
    """A CLIP vision model as ComfyUI's CLIP_VISION."""

    DESCRIPTION = ("Opens the CLIP vision model (ViT-H/14) through which Wan 2.1's image-to-video models look at a "
                   "picture. The result works in ComfyUI's own CLIP Vision Encode; pictures are resized as in the "
                   "official code.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan", "load clip vision", "clip vision loader", "image encoder", "vit-h", "i2v"]
    RETURN_TYPES = ("CLIP_VISION",)
    RETURN_NAMES = ("clip_vision",)
    OUTPUT_TOOLTIPS = ("The CLIP vision model, for CLIP Vision Encode.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "clip_vision": (HOST.model_names("clip_vision"), {
                "tooltip": "A file in models/clip_vision: clip_vision_h, or the official models_clip file; the nano "
                           "encoder for nano I2V."}),
            "precision": PRECISION,
        }, "hidden": {
            "node_id": "UNIQUE_ID",
        }}

    @classmethod
    def IS_CHANGED(cls, clip_vision: str, **_others: object) -> str:
        return HOST.fingerprint("clip_vision", clip_vision)

    def load(self, clip_vision: str, precision: str, node_id: str | None = None) -> tuple[ComfyCLIPVision]:
        encoder = load_clip_vision(HOST.model_path("clip_vision", clip_vision),
                                   placement=HOST.placement("clip_vision"), dtype=precision)
        HOST.say(node_id, encoder.part.summary())
        return (ComfyCLIPVision(encoder),)


class WanCoreVAELoader:
    """A video VAE as ComfyUI's VAE."""

    DESCRIPTION = ("Opens a Wan 2.1 or 2.2 VAE. It decodes and encodes in pieces along time, so memory does not grow "
                   "with the clip's length; tiles bound it for large pictures. The result works in Wan Decode and in "
                   "ComfyUI's own VAE nodes.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan", "load vae", "wan vae", "tiled vae", "taehv", "taew2_1", "tiny vae"]
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for Wan Decode, VAE Decode, VAE Encode and their tiled kinds.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "vae": (HOST.model_names("vae"), {
                "tooltip": "A file in models/vae: wan_2.1_vae for the released 2.1 and 2.2 14B models, wan2.2_vae for "
                           "TI2V 5B, a nano VAE for the nano models; or, for a quick look, a tiny one (taew2_1, "
                           "taew2_2) in models/vae_approx."}),
            "precision": PRECISION,
            "tile_size": ("INT", {
                "default": 0, "min": 0, "max": 4096, "step": 32,
                "tooltip": "Side of the tiles in pixels, in which the picture is decoded and encoded to save memory. "
                           "0: the whole picture at once if there is room, else the largest tiles that fit."}),
            "tile_overlap": ("INT", {
                "default": 64, "min": 8, "max": 1024, "step": 8,
                "tooltip": "Pixels that neighbouring tiles share and blend, at most half a tile. Counts only with a "
                           "tile_size."}),
        }, "hidden": {
            "node_id": "UNIQUE_ID",
        }}

    @classmethod
    def IS_CHANGED(cls, vae: str, **_others: object) -> str:
        return HOST.fingerprint("vae", vae)

    def load(self, vae: str, precision: str, tile_size: int, tile_overlap: int,
             node_id: str | None = None) -> tuple[ComfyVAE]:
        tiling = Tiling(tile_size, tile_size, tile_overlap) if tile_size else None
        loaded = load_vae(HOST.model_path("vae", vae), placement=HOST.placement("vae"), dtype=precision, tiling=tiling)
        HOST.say(node_id, loaded.part.summary())
        return (ComfyVAE(loaded),)


def _found(model: Model, weights: str, node_id: str | None) -> tuple[Model]:
    """The model with its weights as wanted; the node says what it is."""
    model = model if weights == AS_STORED else model.quantised(weights)
    HOST.say(node_id, model.summary())
    return (model,)


def first_with(part: str, names: list[str]) -> str:
    """The first of a list widget's names that contains `part`; the bundled models see to it that there is one."""
    return next(name for name in names if part in name)
