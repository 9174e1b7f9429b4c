"""Ways to condition a video, one file each: text, pictures, known latents, VACE controls."""

from .condition import Condition, SigmaRange, check_room
from .image import ImageChannels, ImageTokens, KnownFrames, encode_known_frames
from .known import KnownLatents, known_start
from .sizes import FITS, best_size, check_values, fit, fit_mask, masks_for, size_for_area
from .text import TextCondition, active
from .vace import ControlLatents, VaceCondition, encode_control

__all__ = ["FITS", "Condition", "ControlLatents", "ImageChannels", "ImageTokens", "KnownFrames", "KnownLatents",
           "SigmaRange", "TextCondition", "VaceCondition", "active", "best_size", "check_room", "check_values",
           "encode_control", "encode_known_frames", "fit", "fit_mask", "known_start", "masks_for", "size_for_area"]
