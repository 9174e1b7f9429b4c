"""The nodes that refine guidance: its range and scales, a negative prompt within attention, skipped blocks.

Each sets options of its own on the model, so they can be chained in any order.
"""

from dataclasses import replace

from ..wan_core.conditioning import SigmaRange
from ..wan_core.dit import NormalisedAttention
from ..wan_core.guidance import BATCHING, Projection, SkippedBlocks, parse_blocks, parse_scales
from ..wan_core.models import Model

UNITS = ("per element", "whole tensor")


class WanCoreGuidance:
    """When classifier-free guidance is active, its scales, CFG-Zero*, adaptive projected guidance, batching."""

    DESCRIPTION = ("Refines classifier-free guidance (CFG): noise levels at which it is active, which spares the "
                   "negative prompt's pass elsewhere, a scale for each step, CFG-Zero*, adaptive projected guidance "
                   "(APG). As it is placed it changes nothing.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "cfg", "cfg schedule", "cfg zero star", "cfg-zero*", "zero init", "apg", "guidance limit",
                      "cfg interval", "batched cfg"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with these options, for Wan Sampler.",)
    FUNCTION = "guide"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair."}),
            **_range("CFG is active", "Above, the prompt works alone, and a step costs half."),
            "scales": ("STRING", {
                "default": "",
                "tooltip": "A guidance scale for each step in place of the sampler's, such as 6, 6, 5, 1 or 6*10, 1. "
                           "The last one holds for the steps that follow. Empty: the sampler's."}),
            "cfg_zero_star": ("BOOLEAN", {
                "default": False, "label_on": "yes", "label_off": "no",
                "tooltip": "CFG-Zero*: scale the negative prompt's velocity to fit the prompt's before it is taken "
                           "away. Costs nothing."}),
            "zero_steps": ("INT", {
                "default": 0, "min": 0, "max": 100,
                "tooltip": "First steps at which nothing is computed and the noise stays as it is; the other part of "
                           "CFG-Zero* (published: 2 of 50 for text to video, 1 of 40 for image to video)."}),
            "apg": ("BOOLEAN", {
                "default": False, "label_on": "yes", "label_off": "no",
                "tooltip": "Adaptive projected guidance: less saturated colours at high scales. The four values below "
                           "belong to it."}),
            "apg_eta": ("FLOAT", {
                "default": 0.0, "min": -10.0, "max": 10.0, "step": 0.05,
                "tooltip": "How much is kept of the part of guidance that saturates. 1: all of it."}),
            "apg_momentum": ("FLOAT", {
                "default": -0.75, "min": -0.99, "max": 0.99, "step": 0.05,
                "tooltip": "How much of earlier steps' guidance is added to each; below 0, taken away. 0: none."}),
            "apg_threshold": ("FLOAT", {
                "default": 0.038, "min": 0.0, "max": 10000.0, "step": 0.001,
                "tooltip": "How large the difference between the prompts may be, in the unit below. 0: no limit."}),
            "apg_unit": (list(UNITS), {
                "default": UNITS[0],
                "tooltip": "per element: the threshold means the same for every size of video. whole tensor: as other "
                           "nodes count; 55 at 832x480 and 81 frames is 0.038 per element."}),
            "batched": (list(BATCHING), {
                "default": BATCHING[0],
                "tooltip": "Whether both prompts go through the model together, which takes more memory. auto: for "
                           "small videos on a GPU."}),
        }}

    def guide(self, model: Model, start_sigma: float, end_sigma: float, scales: str, cfg_zero_star: bool,
              zero_steps: int, apg: bool, apg_eta: float, apg_momentum: float, apg_threshold: float, apg_unit: str,
              batched: str) -> tuple[Model]:
        projection = Projection(apg_eta, apg_momentum, apg_threshold, apg_unit == UNITS[0]) if apg else None
        options = replace(model.guidance, sigmas=SigmaRange(start_sigma, end_sigma), scales=parse_scales(scales),
                          zero_star=cfg_zero_star, zero_steps=zero_steps, projection=projection, batched=batched)
        return (replace(model, guidance=options),)


class WanCoreNAG:
    """Normalised attention guidance."""

    DESCRIPTION = ("Normalised attention guidance (NAG): makes the negative prompt count where guidance is 1, as with "
                   "models and LoRAs that are distilled to few steps, for less than 1 % of a step's time. It works "
                   "together with CFG, too.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "nag", "normalized attention guidance", "negative prompt", "cfg 1", "lightx2v",
                      "lightning", "causvid"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with NAG, for Wan Sampler.",)
    FUNCTION = "guide"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair."}),
            "scale": ("FLOAT", {
                "default": 11.0, "min": 1.0, "max": 100.0, "step": 0.1,
                "tooltip": "How far from the negative prompt. 1: off. Published for Wan: 11 in few steps, 5 to 6 in "
                           "many."}),
            "tau": ("FLOAT", {
                "default": 2.5, "min": 0.1, "max": 100.0, "step": 0.1,
                "tooltip": "How many times as large as before attention's result may become. Higher in few steps "
                           "(3.5), lower in many and for image to video."}),
            "alpha": ("FLOAT", {
                "default": 0.25, "min": 0.0, "max": 1.0, "step": 0.01,
                "tooltip": "The share of the guided result. Higher in few steps (0.5), lower in many and for image to "
                           "video."}),
            "end_sigma": ("FLOAT", {
                "default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001,
                "tooltip": "The noise level down to which it works. 0: for the whole run."}),
        }}

    def guide(self, model: Model, scale: float, tau: float, alpha: float, end_sigma: float) -> tuple[Model]:
        nag = None if scale == 1 else NormalisedAttention(scale, tau, alpha)
        return (replace(model, guidance=replace(model.guidance, nag=nag, nag_end=end_sigma)),)


class WanCoreSkipLayers:
    """Skip-layer guidance."""

    DESCRIPTION = ("Skip-layer guidance (SLG): away from what the model makes without some of its blocks, which helps "
                   "details and motion. With scale 0 the blocks are left out of the negative prompt's pass, and it "
                   "costs nothing.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "slg", "skip layer guidance", "skip layers", "skip blocks", "uncond blocks"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with skipped blocks, for Wan Sampler.",)
    FUNCTION = "skip"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair."}),
            "blocks": ("STRING", {
                "default": "9",
                "tooltip": "Blocks to skip, such as 9, 10 or 9-11; the first is 0. In use for the 14B models: 9, or "
                           "9, 10."}),
            **_range("blocks are skipped", "Lower than 1 leaves the first steps, and with them the layout, alone.",
                     start=0.95),
            "scale": ("FLOAT", {
                "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
                "tooltip": "0: skip them in the negative prompt's pass (needs guidance other than 1). Above: a third "
                           "pass for each step, as originally published (3 is usual), which also works at guidance "
                           "1."}),
        }}

    def skip(self, model: Model, blocks: str, start_sigma: float, end_sigma: float, scale: float) -> tuple[Model]:
        skipped = SkippedBlocks(parse_blocks(blocks), scale, SigmaRange(start_sigma, end_sigma))
        return (replace(model, guidance=replace(model.guidance, skipped=skipped)),)


def _range(what: str, more: str, start: float = 1.0) -> dict:
    """Widgets for the noise levels of something."""
    return {
        "start_sigma": ("FLOAT", {
            "default": start, "min": 0.0, "max": 1.0, "step": 0.001,
            "tooltip": f"The highest noise level at which {what}, from 1 at the first step to 0. {more}"}),
        "end_sigma": ("FLOAT", {
            "default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001,
            "tooltip": f"The lowest noise level at which {what}."}),
    }
