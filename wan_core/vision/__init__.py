"""CLIP image features: how a picture is brought to the encoder's size and range, and the encoder itself."""

from .clip import CLIPVision
from .preprocess import CROPS, preprocess

__all__ = ["CROPS", "CLIPVision", "preprocess"]
