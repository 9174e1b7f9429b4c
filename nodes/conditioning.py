"""ComfyUI's CONDITIONING to the engine's conditions.

A CONDITIONING is a list of (embedding, options): several entries are several prompts that are averaged by `strength`.
Ranges are given in percent of the run, which ComfyUI turns into noise levels by the model's shift; so does this, and
the ranges then mean the same in both. Pictures and controls are options under the names that the core's Wan nodes give
them, so its nodes and ours can be mixed. Options that would change the picture and that this version does not know are
refused by name, never passed over. Reference: ComfyUI's `comfy/samplers.py`, `comfy/model_sampling.py` and
`comfy/model_base.py` (class WAN21).
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..wan_core.conditioning import (
    Condition,
    ControlLatents,
    ImageChannels,
    ImageTokens,
    KnownFrames,
    SigmaRange,
    TextCondition,
    VaceCondition,
)
from ..wan_core.models import Model

log = logging.getLogger(__name__)

# Options that say nothing to a Wan model.
WITHOUT_EFFECT = frozenset({"pooled_output", "guidance"})
HANDLED = frozenset({"start_percent", "end_percent", "strength", "concat_latent_image", "concat_mask",
                     "clip_vision_output", "vace_frames", "vace_mask", "vace_strength", "wan_vace_percents"})

# Our own option beside the core's for VACE: for each control the parts of the run (0..1) where it starts and ends.
VACE_PERCENTS = "wan_vace_percents"

# Options that this version cannot honour -> what makes them.
REFUSED = {
    "area": "an area", "mask": "a mask", "mask_strength": "a mask", "control": "a ControlNet", "gligen": "GLIGEN",
    "hooks": "hooks", "model_conds": "model conditions", "concat_mask_index": "a Fun control video",
    "reference_latents": "reference latents", "time_dim_concat": "subject images",
    "camera_conditions": "a camera path", "audio_embed": "audio", "reference_motion": "reference motion",
    "control_video": "a control video", "pose_video_latent": "a pose video", "face_video_pixels": "a face video",
    "unclip_conditioning": "an image condition", "clip_start_percent": "a scheduled CLIP hook",
}


def text_conditions(conditioning: list, model: Model, shift: float, shape: tuple[int, ...],
                    name: str) -> list[TextCondition]:
    """The prompts in a CONDITIONING and what goes with them, for a latent of `shape` [B, C, T, H, W].

    `name` is the socket that errors speak of. Raises ValueError for an empty one, an option that is not supported, or
    parts that do not fit the latent.
    """
    if not conditioning:
        raise ValueError(f"{name} is an empty conditioning; connect an encoded prompt.")
    return [_text_condition(embedding, options, model, shift, shape, name) for embedding, options in conditioning]


def percent_to_sigma(percent: float, shift: float) -> float:
    """The noise level at which `percent` (0..1) of a flow-matching run with this shift is done."""
    if percent <= 0:
        return 1.0
    if percent >= 1:
        return 0.0
    return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


def sigma_range(start: float, end: float, shift: float, what: str) -> SigmaRange:
    """The noise levels from `start` to `end` percent (0..1). Raises ValueError unless start lies before end."""
    if start > end:
        raise ValueError(f"{what} is active from {start:.0%} to {end:.0%} of the run; let the start lie before the "
                         "end.")
    return SigmaRange(percent_to_sigma(start, shift), percent_to_sigma(end, shift))


def _text_condition(embedding: Tensor, options: dict, model: Model, shift: float, shape: tuple[int, ...],
                    name: str) -> TextCondition:
    given = {key for key, value in options.items() if value is not None}
    refused = ", ".join(f"{REFUSED[key]} ({key})" for key in sorted(given & REFUSED.keys()))
    if refused:
        raise ValueError(f"{name} carries {refused}, which this sampler does not support yet. Remove the node that "
                         "adds it, or sample with ComfyUI's own nodes.")
    unknown = sorted(given - HANDLED - WITHOUT_EFFECT)
    if unknown:
        log.warning("Wan: %s carries %s, which has no effect here.", name, ", ".join(unknown))
    if embedding.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} holds {embedding.shape[0]} embeddings and the latent {shape[0]} videos; give one "
                         "embedding, or one for each video.")
    sigmas = sigma_range(options.get("start_percent", 0.0), options.get("end_percent", 1.0), shift, name)
    given = {key: options[key] for key in given}
    beside = (*_image_channels(given, model, shape), *_image_tokens(given, model, name),
              *_controls(given, model, shift))
    return TextCondition(embedding, sigmas, options.get("strength", 1.0), beside)


def _image_channels(given: dict, model: Model, shape: tuple[int, ...]) -> list[Condition]:
    """What WanImageToVideo and its like put beside a prompt: raw latents, and a mask that is 0 where they are known."""
    if "concat_latent_image" not in given:
        return []
    latents = given["concat_latent_image"]
    mask = given.get("concat_mask")
    if mask is None:
        raise ValueError("the prompt carries a picture without a mask (concat_latent_image without concat_mask), as "
                         "Wan Fun control models take it; they are not supported.")
    if not latents.ndim == mask.ndim == 5 or latents.shape[1] != shape[1]:
        raise ValueError(f"the picture beside the prompt has shape {list(latents.shape)} and its mask "
                         f"{list(mask.shape)}; expected [batch, {shape[1]}, frames, height, width], and one or four "
                         "channels for the mask. Encode it with the model's VAE.")
    # The core leaves frames beyond those it is given unknown: latents that are zero when normalised.
    if latents.shape[2] < shape[2]:
        missing = shape[2] - latents.shape[2]
        rest = model.latent_stats.restore(latents.new_zeros(*latents.shape[:2], missing, *latents.shape[3:]))
        latents = torch.cat([latents, rest], 2)
    if mask.shape[2] < shape[2]:
        mask = F.pad(mask, (0, 0, 0, 0, 0, shape[2] - mask.shape[2]), value=1.0)
    known = 1 - (mask if mask.shape[1] == 4 else mask.mean(1, keepdim=True).expand(-1, 4, -1, -1, -1))
    return [ImageChannels.of(KnownFrames(latents, known), model.latent_stats)]


def _image_tokens(given: dict, model: Model, name: str) -> list[Condition]:
    if "clip_vision_output" not in given:
        return []
    if not model.spec.image_dim:
        log.warning("Wan: %s carries a CLIP vision output, and %s takes none; it is left out.", name,
                    model.preset.title)
        return []
    features = getattr(given["clip_vision_output"], "penultimate_hidden_states", None)
    if not isinstance(features, Tensor):
        raise ValueError(f"{name} carries a CLIP vision output without penultimate_hidden_states (a "
                         f"{type(given['clip_vision_output']).__name__}). Make it with CLIP Vision Encode, or connect "
                         "a CLIP vision model to Wan Image to Video.")
    return [ImageTokens(features)]


def _controls(given: dict, model: Model, shift: float) -> list[Condition]:
    """What WanVaceToVideo puts beside a prompt: a list of controls, one for each node of a chain."""
    frames = given.get("vace_frames", [])
    masks, strengths = given.get("vace_mask", []), given.get("vace_strength", [1.0] * len(frames))
    if not len(frames) == len(masks) == len(strengths):
        raise ValueError(f"the prompt carries {len(frames)} VACE controls, {len(masks)} masks and {len(strengths)} "
                         "strengths; a control must have one of each. Make it with Wan VACE or WanVaceToVideo.")
    # Controls that the core's node added behind ours hold for the whole run, as all of the core's do.
    percents = [*given.get(VACE_PERCENTS, []), *[(0.0, 1.0)] * len(frames)]
    controls = []
    for latents, mask, strength, (start, end) in zip(frames, masks, strengths, percents):
        sigmas = sigma_range(start, end, shift, "a VACE control")
        controls.append(VaceCondition.of(ControlLatents(latents, mask), model.latent_stats, strength, sigmas))
    return controls
