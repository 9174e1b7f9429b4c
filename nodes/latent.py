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
        return {"required": size_widgets()}

    def make(self, width: int, height: int, length: int, batch_size: int) -> tuple[dict]:
        shape = latent_shape(VAES["wan21_vae"], width, height, length, batch_size)
        return ({"samples": torch.zeros(shape, device=HOST.result_device())},)


def size_widgets(width: int = 832, height: int = 480, length: int = 81, step: int = 16) -> dict:
    """The widgets for the size of a video, with their defaults and the grid that they step on."""
    return {
        "width": ("INT", {
            "default": width, "min": step, "max": 8192, "step": step,
            "tooltip": f"Pixels, a multiple of {step}. 832x480 for the 480p models, 1280x720 for the 720p ones, "
                       "1280x704 for TI2V 5B, 64x64 for nano (128x128 for its TI2V)."}),
        "height": ("INT", {
            "default": height, "min": step, "max": 8192, "step": step,
            "tooltip": f"Pixels, a multiple of {step}."}),
        "length": ("INT", {
            "default": length, "min": 1, "max": 2049, "step": 4,
            "tooltip": "Frames, 4n + 1. The released models were trained on 81 (five seconds at 16 frames a second), "
                       "TI2V 5B on 121 (at 24), nano on 17. 1 makes a picture."}),
        "batch_size": ("INT", {
            "default": 1, "min": 1, "max": 64,
            "tooltip": "How many videos are made at once, each from its own noise."}),
    }


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
        }, "optional": {
            "trim_latent": ("INT", {
                "default": 0, "min": 0, "max": 4096,
                "tooltip": "Latent frames to leave away at the beginning: the reference images of VACE (connect "
                           "trim_latent of Wan VACE)."}),
        }}

    def decode(self, samples: dict, vae: ComfyVAE, tile_size: int, tile_overlap: int,
               trim_latent: int = 0) -> tuple[Tensor]:
        made_for = samples.get(MADE_FOR)
        if made_for and isinstance(vae, ComfyVAE) and not vae.vae.fits(VAES[made_for]):
            raise ValueError(f"{vae.vae.part.label} is not the VAE of the model that made this latent. "
                             f"Load {made_for} in the VAE loader.")
        latents = samples["samples"]
        if trim_latent >= latents.shape[2]:
            raise ValueError(f"trim_latent is {trim_latent}, and the latent has {latents.shape[2]} frames; at least "
                             "one must be left.")
        latents = latents[:, :, trim_latent:]
        if tile_size:
            stride = vae.spacial_compression_decode()
            images = vae.decode_tiled(latents, tile_x=tile_size // stride, tile_y=tile_size // stride,
                                      overlap=tile_overlap // stride)
        else:
            images = vae.decode(latents)
        return (images.flatten(0, 1) if images.ndim == 5 else images,)
