"""Nodes at the two ends of sampling: an empty latent to begin with, and a latent back to pictures."""

import torch
from torch import Tensor

from ..wan_core.pipeline import latent_shape
from ..wan_core.presets import VAES
from .host import HOST
from .sockets import ComfyVAE

# An entry that our sampler adds to its LATENT, so that Wan Decode notices another family's VAE.
MADE_FOR = "wan_vae"


class WanCoreEmptyLatent:
    """The size of the video."""

    DESCRIPTION = ("An empty latent: the size and length of the video to be made. Sizes off the model's grid are "
                   "refused with the nearest one that fits. ComfyUI's EmptyHunyuanLatentVideo gives the same.")
    CATEGORY = "Wan/latent"
    SEARCH_ALIASES = ["wan", "empty latent video", "video size", "resolution", "length", "frames"]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The empty latent, for Wan Sampler.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "width": ("INT", {
                "default": 832, "min": 16, "max": 8192, "step": 16,
                "tooltip": "Pixels, a multiple of 16. 832x480 for the 480p models, 1280x720 for the 720p ones, 64x64 "
                           "for nano."}),
            "height": ("INT", {
                "default": 480, "min": 16, "max": 8192, "step": 16, "tooltip": "Pixels, a multiple of 16."}),
            "length": ("INT", {
                "default": 81, "min": 1, "max": 2049, "step": 4,
                "tooltip": "Frames, 4n + 1. The released models were trained on 81 (five seconds at 16 frames a "
                           "second), nano on 17. 1 makes a picture."}),
            "batch_size": ("INT", {
                "default": 1, "min": 1, "max": 64,
                "tooltip": "How many videos are made at once, each from its own noise."}),
        }}

    def make(self, width: int, height: int, length: int, batch_size: int) -> tuple[dict]:
        shape = latent_shape(VAES["wan21_vae"], width, height, length, batch_size)
        return ({"samples": torch.zeros(shape, device=HOST.result_device())},)


class WanCoreDecode:
    """Latents to pictures."""

    DESCRIPTION = ("Turns a latent into frames, in tiles where memory is short. Like ComfyUI's VAE Decode and VAE "
                   "Decode (Tiled) in one; beyond them it refuses a VAE that does not belong to the model which made "
                   "the latent.")
    CATEGORY = "Wan/latent"
    SEARCH_ALIASES = ["wan", "vae decode", "vae decode tiled", "latent to video"]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The frames; those of several videos follow one another.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "samples": ("LATENT", {"tooltip": "The latent to decode."}),
            "vae": ("VAE", {"tooltip": "The VAE of the model that made the latent."}),
            "tile_size": ("INT", {
                "default": 0, "min": 0, "max": 4096, "step": 32,
                "tooltip": "Side of the tiles in pixels; smaller ones need less memory and more time. 0: as set in Wan "
                           "VAE Loader."}),
            "tile_overlap": ("INT", {
                "default": 64, "min": 8, "max": 1024, "step": 8,
                "tooltip": "Pixels that neighbouring tiles share and blend, at most half a tile. Counts only with a "
                           "tile_size."}),
        }}

    def decode(self, samples: dict, vae: ComfyVAE, tile_size: int, tile_overlap: int) -> tuple[Tensor]:
        made_for = samples.get(MADE_FOR)
        if made_for and isinstance(vae, ComfyVAE) and vae.vae.spec != VAES[made_for]:
            raise ValueError(f"{vae.vae.part.label} is not the VAE of the model that made this latent. "
                             f"Load {made_for} in the VAE loader.")
        if tile_size:
            stride = vae.spacial_compression_decode()
            images = vae.decode_tiled(samples["samples"], tile_x=tile_size // stride, tile_y=tile_size // stride,
                                      overlap=tile_overlap // stride)
        else:
            images = vae.decode(samples["samples"])
        return (images.flatten(0, 1) if images.ndim == 5 else images,)
