"""What every Wan model is made of, how it is sampled, and how a checkpoint is recognised by its tensors."""
from .recognition import PREFIXES, Recognition, foreign_dialect, recognise, strip_prefix, with_vace
from .specs import CLIPVisionSpec, Preset, Sampling, TextEncoderSpec, TinyVAESpec, TransformerSpec, VAESpec
from .tables import CLIP_VISION, PRESETS, TEXT_ENCODERS, TINY_VAES, TRANSFORMERS, VAES

__all__ = [
    "CLIP_VISION", "CLIPVisionSpec", "PREFIXES", "PRESETS", "Preset", "Recognition", "Sampling", "TEXT_ENCODERS",
    "TINY_VAES", "TRANSFORMERS", "TextEncoderSpec", "TinyVAESpec", "TransformerSpec", "VAES", "VAESpec",
    "foreign_dialect", "recognise", "strip_prefix", "with_vace",
]
