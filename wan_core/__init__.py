"""Engine for the Wan 2.1 and 2.2 video models; works with and without ComfyUI.

    import wan_core
    wan_core.generate("a red circle moving left").save("clip.mp4")
"""

from .models import load_clip_vision, load_experts, load_model, load_text_encoder, load_vae
from .pipeline import Video, generate

__all__ = ["Video", "generate", "load_clip_vision", "load_experts", "load_model", "load_text_encoder", "load_vae"]
