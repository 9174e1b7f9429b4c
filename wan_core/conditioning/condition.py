"""What a condition is: something given with a prompt that adds to the inputs of the transformer.

Each way to condition a video has a file and a class of its own here. The sampling loop knows only this interface, so a
new way changes neither the loop nor the transformer's forward pass.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..dit import ModelInputs, WanTransformer
from ..presets import TransformerSpec


@dataclass(frozen=True)
class SigmaRange:
    """Noise levels from `start` (higher, reached first) down to `end`, both included."""

    start: float = math.inf
    end: float = 0.0

    def __post_init__(self) -> None:
        if not self.start >= self.end:
            raise ValueError(f"a sigma range runs from high to low noise, got start {self.start} and end {self.end}.")

    def holds(self, sigma: float) -> bool:
        return self.end <= sigma <= self.start


class Condition(Protocol):
    """One way to condition; immutable, on the host, for any batch that its own batch of 1 can be repeated to."""

    def check(self, spec: TransformerSpec, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless it suits a transformer and latents of `shape` [B, C, T, H, W]."""

    def prepare(self, model: WanTransformer, sample: Tensor) -> Tensor:
        """What `add` needs of it on the device of `sample` [B, C, T, H, W]; made once in a run for each expert."""

    def add(self, inputs: ModelInputs, prepared: Tensor, sigma: float) -> ModelInputs:
        """`inputs` with what it adds at noise level `sigma`."""


def check_tensor(name: str, tensor: Tensor, batch: int) -> None:
    """Raise ValueError unless the first size of `tensor` is 1 or `batch`, and its values are finite."""
    if tensor.shape[0] not in (1, batch):
        raise ValueError(f"{name} is a batch of {tensor.shape[0]} and the latents are a batch of {batch}; give one for "
                         "all, or one for each.")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values, and the video would be nothing else; look for where "
                         "they come from (often a VAE that overflows in float16).")


def check_room(frames: int, start: int, end: int = 0) -> None:
    """Raise ValueError unless `start` first and `end` last frames fit into a clip of `frames`."""
    if start + end > frames:
        given = " and ".join(f"{count} {name}" for count, name in ((start, "start"), (end, "end")) if count)
        raise ValueError(f"{given} frames do not fit into a clip of {frames} frames. Make the clip longer, or give "
                         "fewer.")


def to_batch(tensor: Tensor, sample: Tensor) -> Tensor:
    """`tensor` in float32 on the device of `sample`, repeated to its batch without a copy."""
    tensor = tensor.to(sample.device, sample.dtype)
    return tensor.expand(sample.shape[0], *tensor.shape[1:])
