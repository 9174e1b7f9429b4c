"""Nodes for VACE: control videos, masks and reference images, and VACE modules for text-to-video models.

What they put beside the prompts has the names and value ranges of the core's WanVaceToVideo, so both samplers take
either and the nodes can be chained with each other. Reference: ComfyUI's `comfy_extras/nodes_wan.py`.
"""

import logging

import torch
from torch import Tensor

from ..wan_core.conditioning import check_values, encode_control, masks_for
from ..wan_core.models import Model, add_vace
from ..wan_core.pipeline import latent_shape
from ..wan_core.vae import LatentStats
from .conditioning import VACE_PERCENTS
from .host import HOST
from .image import FIT, encoder, grid_of, pictures
from .latent import size_widgets
from .loaders import first_with
from .sockets import ComfyVAE

log = logging.getLogger(__name__)


class WanCoreVace:
    """A VACE control beside the prompts."""

    DESCRIPTION = ("Steers a VACE model: with a control video (pose, depth, edges, flow, gray), by making anew only "
                   "what a mask covers (inpainting, outpainting, filling in frames), and with reference images of "
                   "things that are to appear. Several of these nodes can be chained.")
    CATEGORY = "Wan/conditioning"
    SEARCH_ALIASES = ["wan", "vace", "control video", "inpaint", "outpaint", "reference image", "wan vace to video"]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "INT")
    RETURN_NAMES = ("positive", "negative", "latent", "trim_latent")
    OUTPUT_TOOLTIPS = ("The prompt with the control.", "The negative prompt with the control.",
                       "An empty latent of the video's size, with room for the reference images.",
                       "How many latent frames the reference images take at the beginning; for Wan Decode.")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "positive": ("CONDITIONING", {"tooltip": "The prompt, or the output of another Wan VACE."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt, or the output of another Wan VACE."}),
                "vae": ("VAE", {"tooltip": "The model's VAE."}),
                **size_widgets(),
                "fit": FIT,
                "strength": ("FLOAT", {
                    "default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01,
                    "tooltip": "How strongly the control is followed."}),
                "start_percent": ("FLOAT", {
                    "default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01,
                    "tooltip": "When the control begins to hold, in parts of the run."}),
                "end_percent": ("FLOAT", {
                    "default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01,
                    "tooltip": "When it ends. Layout is settled early: a control that ends at 0.5 leaves the details "
                               "free."}),
            },
            "optional": {
                "control_video": ("IMAGE", {
                    "tooltip": "The control, or the video that is to be changed. Frames that are missing are free."}),
                "control_masks": ("MASK", {
                    "tooltip": "1 where the video is made anew, 0 where it stays. One mask for all frames, or one for "
                               "each. None: everything is made anew, led by the control video."}),
                "reference_image": ("IMAGE", {
                    "tooltip": "One or more pictures of what is to appear, best on a plain background."}),
            },
        }

    def make(self, positive: list, negative: list, vae: ComfyVAE, width: int, height: int, length: int,
             batch_size: int, fit: str, strength: float, start_percent: float, end_percent: float,
             control_video: Tensor | None = None, control_masks: Tensor | None = None,
             reference_image: Tensor | None = None) -> tuple[list, list, dict, int]:
        spec = grid_of(vae)
        shape = latent_shape(spec, width, height, length, batch_size)
        video = torch.zeros(length, 3, height, width)
        if control_video is not None:
            given = pictures(control_video[:length], width, height, fit)
            video[:len(given)] = given
        elif control_masks is not None:
            log.warning("Wan: control masks are given without a control video; what they keep is grey.")
        mask = None if control_masks is None else _masks(control_masks, width, height, length, fit)
        references = []
        if reference_image is not None:
            references = [picture[:, None] for picture in pictures(reference_image, width, height, fit)]
        control = encode_control(encoder(vae), LatentStats.of(spec), spec.spatial_stride, video.movedim(0, 1), mask,
                                 references)
        values = {"vace_frames": control.frames, "vace_mask": control.mask, "vace_strength": strength,
                  VACE_PERCENTS: (start_percent, end_percent)}
        frames = shape[2] + control.references
        latent = {"samples": torch.zeros(*shape[:2], frames, *shape[3:], device=HOST.result_device())}
        return _chained(positive, values), _chained(negative, values), latent, control.references


class WanCoreVaceModule:
    """VACE blocks for a text-to-video model."""

    DESCRIPTION = ("Adds a VACE module (a file with nothing but the VACE blocks) to the text-to-video model it belongs "
                   "to. Nothing is copied or merged: both files stay as they are.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan", "vace", "module", "add-on", "vace module"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with VACE blocks, for Wan Sampler.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        names = HOST.model_names("diffusion_models")
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A text-to-video model, or an expert pair of them."}),
            "module": (names, {
                "default": first_with("vace", names),
                "tooltip": "The VACE module, the bundled one for the nano model; with an expert pair, that of the "
                           "high-noise expert."}),
            "module_low": (["same", *names], {
                "default": "same",
                "tooltip": "Expert pairs only: the module of the low-noise expert. same: one module for both."}),
        }}

    @classmethod
    def IS_CHANGED(cls, module: str, module_low: str, **_others: object) -> str:
        names = [module] if module_low == "same" else [module, module_low]
        return HOST.fingerprint("diffusion_models", *names)

    def add(self, model: Model, module: str, module_low: str) -> tuple[Model]:
        low = None if module_low == "same" else HOST.model_path("diffusion_models", module_low)
        return (add_vace(model, HOST.model_path("diffusion_models", module), low),)


def _masks(masks: Tensor, width: int, height: int, length: int, how: str) -> Tensor:
    """MASK [F, H, W] or [H, W] as [1, length, height, width]; see `masks_for`."""
    if masks.ndim == 2:
        masks = masks[None]
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(f"the masks have shape {list(masks.shape)}; expected [frames, height, width].")
    check_values("the mask", masks, 0, 1)
    return masks_for(masks[:, None].cpu(), width, height, length, how)


def _chained(conditioning: list, values: dict) -> list:
    """A CONDITIONING with one control more in every entry: each value is added to the list under its name."""
    entries = []
    for embedding, options in conditioning:
        count = len(options.get("vace_frames", []))
        # Controls of the core's node hold for the whole run.
        lists = {VACE_PERCENTS: [*options.get(VACE_PERCENTS, []), *[(0.0, 1.0)] * count][:count]}
        entries.append([embedding, {**options, **{
            name: [*lists.get(name, options.get(name, [])), value] for name, value in values.items()}}])
    return entries
