"""Models as values: small handles that say where the weights are and how to run them.

A handle is immutable and cheap. Making one reads a file's header and no weights; they are read when the model first
runs, by the handle's placement. Changed copies (`dataclasses.replace`) share the files and the placement.
"""

from .encoders import TextEncoder, VideoVAE, VisionEncoder
from .load import NANO, add_vace, load_clip_vision, load_experts, load_model, load_text_encoder, load_vae
from .part import Part
from .transformer import Model

__all__ = ["NANO", "Model", "Part", "TextEncoder", "VideoVAE", "VisionEncoder", "add_vace", "load_clip_vision",
           "load_experts", "load_model", "load_text_encoder", "load_vae"]
