"""ComfyUI's CONDITIONING to the engine's conditions.

A CONDITIONING is a list of (embedding, options): several entries are several prompts that are averaged by `strength`.
Ranges are given in percent of the run, which ComfyUI turns into noise levels by the model's shift; so does this, and
the ranges then mean the same in both. Options that would change the picture and that this version does not know are
refused by name, never passed over. Reference: ComfyUI's `comfy/samplers.py` and `comfy/model_sampling.py`.
"""

import logging

from torch import Tensor

from ..wan_core.conditioning import SigmaRange, TextCondition

log = logging.getLogger(__name__)

# Options that say nothing to a Wan text-to-video model.
WITHOUT_EFFECT = frozenset({"pooled_output", "guidance"})
HANDLED = frozenset({"start_percent", "end_percent", "strength"})

# Options that this version cannot honour -> what makes them.
REFUSED = {
    "area": "an area", "mask": "a mask", "mask_strength": "a mask", "control": "a ControlNet", "gligen": "GLIGEN",
    "hooks": "hooks", "model_conds": "model conditions", "concat_latent_image": "a start or control image",
    "concat_mask": "a start image's mask", "clip_vision_output": "a CLIP vision output",
    "reference_latents": "reference latents", "vace_frames": "VACE frames", "time_dim_concat": "subject images",
    "camera_conditions": "a camera path", "audio_embed": "audio", "reference_motion": "reference motion",
    "control_video": "a control video", "pose_video_latent": "a pose video", "face_video_pixels": "a face video",
    "unclip_conditioning": "an image condition", "clip_start_percent": "a scheduled CLIP hook",
}


def text_conditions(conditioning: list, shift: float, batch: int, name: str) -> list[TextCondition]:
    """The prompts in a CONDITIONING, `name` being the socket that errors speak of.

    Raises ValueError for an empty one, an option that is not supported, or embeddings that do not fit the batch.
    """
    if not conditioning:
        raise ValueError(f"{name} is an empty conditioning; connect an encoded prompt.")
    return [_text_condition(embedding, options, shift, batch, name) for embedding, options in conditioning]


def percent_to_sigma(percent: float, shift: float) -> float:
    """The noise level at which `percent` (0..1) of a flow-matching run with this shift is done."""
    if percent <= 0:
        return 1.0
    if percent >= 1:
        return 0.0
    return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


def _text_condition(embedding: Tensor, options: dict, shift: float, batch: int, name: str) -> TextCondition:
    given = {key for key, value in options.items() if value is not None}
    refused = ", ".join(f"{REFUSED[key]} ({key})" for key in sorted(given & REFUSED.keys()))
    if refused:
        raise ValueError(f"{name} carries {refused}, which this sampler does not support yet. Remove the node that "
                         "adds it, or sample with ComfyUI's own nodes.")
    unknown = sorted(given - HANDLED - WITHOUT_EFFECT)
    if unknown:
        log.warning("Wan: %s carries %s, which has no effect here.", name, ", ".join(unknown))
    if embedding.shape[0] not in (1, batch):
        raise ValueError(f"{name} holds {embedding.shape[0]} embeddings and the latent {batch} videos; give one "
                         "embedding, or one for each video.")
    start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
    if start > end:
        raise ValueError(f"{name} is active from {start:.0%} to {end:.0%} of the run; "
                         "let the start lie before the end.")
    return TextCondition(embedding, SigmaRange(percent_to_sigma(start, shift), percent_to_sigma(end, shift)),
                         options.get("strength", 1.0))
