"""Nodes that show a model pictures: start and end images of a clip, and the size that suits a picture.

What they put beside the prompts has the names and value ranges of the core's WanImageToVideo and
WanFirstLastFrameToVideo, so both samplers take either. Reference: ComfyUI's `comfy_extras/nodes_wan.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..wan_core.conditioning import FITS, best_size, encode_known_frames, fit, known_start, size_for_area
from ..wan_core.pipeline import latent_shape
from ..wan_core.presets import VAES, VAESpec
from ..wan_core.vae import LatentStats
from .host import HOST
from .latent import size_widgets
from .sockets import ComfyCLIPVision, ComfyVAE, check_pictures

FIT = (list(FITS), {
    "default": "crop",
    "tooltip": "How pictures are brought to the video's size. crop: scaled to cover it, the middle is kept. stretch: "
               "width and height scaled on their own."})


class WanCoreImageToVideo:
    """Start and end images for a model that takes pictures through its channels."""

    DESCRIPTION = ("Gives an image-to-video model its first frame, its last one, or both: Wan 2.1 I2V and FLF2V, Wan "
                   "2.2 I2V-A14B. Several start frames continue a clip. With a CLIP vision model (2.1 only) the "
                   "pictures are also shown to the model's attention.")
    CATEGORY = "Wan/conditioning"
    SEARCH_ALIASES = ["wan", "i2v", "flf2v", "first last frame", "image to video", "start image", "end image",
                      "wan image to video"]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    OUTPUT_TOOLTIPS = ("The prompt with the pictures.", "The negative prompt with the pictures.",
                       "An empty latent of the video's size.")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "The prompt."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt."}),
                "vae": ("VAE", {"tooltip": "The model's VAE."}),
                **size_widgets(),
                "fit": FIT,
            },
            "optional": {
                "start_image": ("IMAGE", {
                    "tooltip": "The first frame; or several, which the video then continues."}),
                "end_image": ("IMAGE", {"tooltip": "The last frame, or several last ones."}),
                "clip_vision": ("CLIP_VISION", {
                    "tooltip": "For Wan 2.1 I2V and FLF2V: the CLIP vision model. The first start and the last end "
                               "image are encoded as in the official code."}),
                "clip_vision_output": ("CLIP_VISION_OUTPUT", {
                    "tooltip": "Instead of clip_vision: the output of CLIP Vision Encode."}),
            },
        }

    def make(self, positive: list, negative: list, vae: ComfyVAE, width: int, height: int, length: int,
             batch_size: int, fit: str, start_image: Tensor | None = None, end_image: Tensor | None = None,
             clip_vision: ComfyCLIPVision | None = None, clip_vision_output: object = None) -> tuple[list, list, dict]:
        shape = latent_shape(grid_of(vae), width, height, length, batch_size)
        start, end = (None if image is None else pictures(image, width, height, fit)
                      for image in (start_image, end_image))
        known = encode_known_frames(encoder(vae), length, start, end)
        values = {"concat_latent_image": known.latents, "concat_mask": 1 - known.mask}
        seen = clip_vision_output
        if clip_vision is not None:
            if clip_vision_output is not None:
                raise ValueError("both clip_vision and clip_vision_output are connected; connect one of them.")
            shown = [image[index:index + 1 or None] for image, index in ((start_image, 0), (end_image, -1))
                     if image is not None]
            seen = PenultimateTokens.of([clip_vision.encode_image(image, crop=False) for image in shown])
        if seen is not None:
            values["clip_vision_output"] = seen
        latent = {"samples": torch.zeros(shape, device=HOST.result_device())}
        return with_values(positive, values), with_values(negative, values), latent


class WanCoreImageLatent:
    """A latent whose first frames are given: TI2V 5B."""

    DESCRIPTION = ("A latent for Wan 2.2 TI2V 5B: empty for text to video, or with the first frame given for image to "
                   "video. Several start frames continue a clip. Works with every VAE; for models other than TI2V the "
                   "given frames are inpainted around.")
    CATEGORY = "Wan/latent"
    SEARCH_ALIASES = ["wan", "ti2v", "5b", "wan22 image to video latent", "start image", "empty latent"]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The latent, for Wan Sampler.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "The model's VAE: it says how many pixels a latent stands for."}),
                **size_widgets(width=1280, height=704, length=121, step=32),
                "fit": FIT,
            },
            "optional": {
                "start_image": ("IMAGE", {"tooltip": "The first frame; or several, which the video then continues."}),
            },
        }

    def make(self, vae: ComfyVAE, width: int, height: int, length: int, batch_size: int, fit: str,
             start_image: Tensor | None = None) -> tuple[dict]:
        spec, device = grid_of(vae), HOST.result_device()
        samples = torch.zeros(latent_shape(spec, width, height, length, batch_size))
        if start_image is None:
            return ({"samples": samples.to(device)},)
        # As in the core, frames that are not known are zero when normalised, which counts where denoise is below 1.
        samples = LatentStats.of(spec).restore(samples)
        samples, mask = known_start(encoder(vae), samples, pictures(start_image, width, height, fit))
        return ({"samples": samples.to(device), "noise_mask": mask.to(device)},)


class WanCoreVideoSize:
    """Width and height that suit a picture."""

    DESCRIPTION = ("The video size for a picture: its aspect ratio, at the area that a model was trained on, on the "
                   "model's grid; the same arithmetic as in the official code.")
    CATEGORY = "Wan/latent"
    SEARCH_ALIASES = ["wan", "resolution", "aspect ratio", "bucket", "480p", "720p", "image size"]
    RETURN_TYPES = ("INT", "INT")
    RETURN_NAMES = ("width", "height")
    OUTPUT_TOOLTIPS = ("Pixels.", "Pixels.")
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "image": ("IMAGE", {"tooltip": "The picture whose aspect ratio the video gets."}),
            "area": (list(AREAS), {
                "default": "480p",
                "tooltip": "480p (832x480) and 720p (1280x720) for the 14B models, 704p for TI2V 5B (1280x704, on a "
                           "grid of 32), 64 and 128 for nano."}),
        }}

    def choose(self, image: Tensor, area: str) -> tuple[int, int]:
        check_pictures(image)
        rule = AREAS[area]
        height, width = image.shape[1:3]
        choose = best_size if rule.grid == 32 else size_for_area
        return choose(width, height, rule.width * rule.height, rule.grid)


@dataclass(frozen=True)
class Area:
    """An area in pixels, written as the size that it is named after, and the grid of the sizes chosen for it."""

    width: int
    height: int
    grid: int


AREAS = {"480p": Area(832, 480, 16), "720p": Area(1280, 720, 16), "704p (5B)": Area(1280, 704, 32),
         "nano": Area(64, 64, 16), "nano 5B": Area(128, 128, 32)}


@dataclass(frozen=True, eq=False)
class PenultimateTokens:
    """As much of ComfyUI's CLIP_VISION_OUTPUT as Wan models read, for one picture or several."""

    penultimate_hidden_states: Tensor

    @classmethod
    def of(cls, outputs: list) -> "PenultimateTokens":
        """The tokens of all pictures one after the other."""
        return cls(torch.cat([output.penultimate_hidden_states for output in outputs], 1))


def pictures(image: Tensor, width: int, height: int, how: str) -> Tensor:
    """IMAGE [B, H, W, 3 or 4] in 0..1 as pictures [B, 3, height, width] in [-1, 1], for the VAE."""
    check_pictures(image)
    return fit(image[..., :3].movedim(-1, 1).cpu() * 2 - 1, width, height, how)


def encoder(vae: ComfyVAE) -> Callable[[Tensor], Tensor]:
    """Any VAE socket, ours or the core's, as the engine's encode: [1, 3, F, H, W] in [-1, 1] to raw latents."""
    return lambda video: vae.encode((video[0].movedim(0, -1) + 1) / 2).float().cpu()


def grid_of(vae: ComfyVAE) -> VAESpec:
    """Channels and strides of a VAE socket's latents, ours or the core's. Raises ValueError for a VAE not of Wan's."""
    channels = getattr(vae, "latent_channels", None)
    for spec in (VAES["wan21_vae"], VAES["wan22_vae"]):
        if spec.z_dim == channels:
            return spec
    raise ValueError(f"the VAE has {channels} latent channels; Wan's have 16 (2.1 and 2.2 14B) or 48 (TI2V 5B). "
                     "Connect Wan VAE Loader.")


def with_values(conditioning: list, values: dict) -> list:
    """A CONDITIONING with more options in every entry."""
    return [[embedding, {**options, **values}] for embedding, options in conditioning]
