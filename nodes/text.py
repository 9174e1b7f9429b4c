"""The node that encodes both prompts."""

from ..wan_core.presets import PRESETS
from .sockets import ComfyTextEncoder

# What the official code puts in the place of an empty negative prompt, for all text-to-video models.
RELEASED_NEGATIVE = PRESETS["wan21_t2v_14b"].sampling.negative_prompt


class WanCoreTextEncode:
    """Prompts to conditioning."""

    DESCRIPTION = ("Encodes the prompt and the negative prompt. Words can be weighted as everywhere in ComfyUI: "
                   "(word:1.2). Works with any CLIP that fits the model, ours or ComfyUI's.")
    CATEGORY = "Wan/conditioning"
    SEARCH_ALIASES = ["wan", "prompt", "negative prompt", "clip text encode", "umt5"]
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    OUTPUT_TOOLTIPS = ("What the video should show.", "What it should not show.")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "clip": ("CLIP", {
                "tooltip": "The text encoder, from Wan Text Encoder Loader or ComfyUI's Load CLIP (type wan)."}),
            "positive": ("STRING", {
                "multiline": True, "dynamicPrompts": True, "placeholder": "what the video should show",
                "tooltip": "What the video should show: subject, motion, scene, camera. Must not be empty. "
                           "512 tokens count, about 300 English words."}),
            "negative": ("STRING", {
                "multiline": True, "dynamicPrompts": True, "placeholder": "what it should not show",
                "tooltip": "What the video should not show. Has an effect where the sampler's guidance is not 1."}),
            "official_negative": ("BOOLEAN", {
                "default": True, "label_on": "if blank", "label_off": "never",
                "tooltip": "if blank: where the negative prompt is blank, Wan's official one is used, as the official "
                           "code does (the nano models have none). never: a blank one stays blank."}),
        }}

    def encode(self, clip: ComfyTextEncoder, positive: str, negative: str,
               official_negative: bool) -> tuple[list, list]:
        if not positive.strip():
            raise ValueError("the prompt is empty; say in 'positive' what the video should show.")
        if official_negative and not negative.strip():
            negative = getattr(clip, "negative_prompt", RELEASED_NEGATIVE)
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (positive, negative)]
        return encoded[0], encoded[1]
