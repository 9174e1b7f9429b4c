"""Engine for the Wan 2.1 and 2.2 video models; works with and without ComfyUI.

    import wan_core
    wan_core.generate("a red circle moving left").save("clip.mp4")
"""

from .checkpoint import Checkpoints
from .models import add_vace, load_clip_vision, load_experts, load_model, load_text_encoder, load_vae
from .pipeline import Video, generate
from .visuals import Visuals
from .weights.lora import open_lora

__all__ = ["Checkpoints", "Video", "Visuals", "add_vace", "generate", "load_clip_vision", "load_experts", "load_model",
           "load_text_encoder", "load_vae", "open_lora"]
