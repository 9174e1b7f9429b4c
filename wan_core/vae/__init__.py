"""The video VAEs: pixels to latents and back, streaming along time, tiled in space."""

from .model import WanVAE
from .stats import LatentStats
from .tiling import Tiling

__all__ = ["LatentStats", "Tiling", "WanVAE"]
