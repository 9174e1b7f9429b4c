"""Ways to condition a video, one file each: text, pictures, known latents, VACE controls."""

from .condition import Condition, SigmaRange
from .image import ImageChannels, ImageTokens, KnownFrames, encode_known_frames
from .known import KnownLatents
from .text import TextCondition, active
from .vace import ControlLatents, VaceCondition, encode_control

__all__ = ["Condition", "ControlLatents", "ImageChannels", "ImageTokens", "KnownFrames", "KnownLatents", "SigmaRange",
           "TextCondition", "VaceCondition", "active", "encode_control", "encode_known_frames"]
