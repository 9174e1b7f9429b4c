"""What an attention backend is, and what decides whether it can run somewhere.

A backend computes softmax(q k^T / sqrt(head_dim) + bias) v for tensors as the transformer has them, and says of a case
why it cannot. Packages are imported when a case asks for them, never with this module.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# q [B, Lq, heads, head_dim], k and v [B, Lk, heads, head_dim], bias [Lk] or None -> [B, Lq, heads, head_dim].
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

HALF = (torch.bfloat16, torch.float16)


class CannotRun(Exception):
    """Why a backend cannot run certain tensors, found out only when it was asked to."""


@dataclass(frozen=True)
class Case:
    """Tensors of `dtype` with heads of `head_dim` and so many `keys` on a device; `capability` is that of an NVIDIA
    card, None elsewhere."""

    device: torch.device
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    keys: int = 0

    @staticmethod
    def of(q: Tensor, k: Tensor) -> "Case":
        """That of queries and keys [B, L, heads, head_dim]."""
        return Case(q.device, capability(q.device), q.dtype, q.shape[3], k.shape[1])


def anywhere(case: Case) -> None:
    """For a backend that runs everything."""


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    `why_not` says of a case why `run` cannot compute it, None where it can. With `tolerance`, a small computation is
    compared with PyTorch's own before the first use: a relative error above it counts as a reason, too. Without
    `takes_bias`, `run` must not be given a bias.
    """

    run: Run
    why_not: Callable[[Case], str | None] = anywhere
    takes_bias: bool = True
    tolerance: float | None = None


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA card, None for another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@cache
def imported(find: Callable[[], Callable]) -> Callable | str:
    """What `find` imports, or why it cannot be had. Broken builds of compiled packages raise all kinds of errors."""
    try:
        return find()
    except Exception as error:
        return first_line(error)


def why_no_half_card(case: Case, least: tuple[int, int]) -> str | None:
    """Why a case is not one of half precision on an NVIDIA card of compute capability `least` or more."""
    if case.capability is None:
        found = "an AMD card" if case.device.type == "cuda" else case.device.type
        return f"it needs an NVIDIA card, and the device is {found}"
    if case.capability < least:
        return f"it needs compute capability {_number(least)}, and the card has {_number(case.capability)}"
    if case.dtype not in HALF:
        return f"it takes bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}; choose that precision"
    return None


def why_no_head(case: Case, fits: bool, expected: str) -> str | None:
    """Why heads of this size are not taken, unless the size `fits`."""
    return None if fits else f"it takes head sizes {expected}, and the model's is {case.head_dim}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def current(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, where packages launch their kernels, and what was current so again."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _number(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
