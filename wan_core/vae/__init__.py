"""The video VAEs: pixels to latents and back, streaming along time, tiled in space."""

from .model import WanVAE
from .stats import LatentStats
from .streaming import StreamingVAE
from .tiling import Tiling
from .tiny import TinyVAE

__all__ = ["LatentStats", "StreamingVAE", "Tiling", "TinyVAE", "WanVAE"]
