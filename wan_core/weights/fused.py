"""Packed weights to numbers, and numbers to FP8, in one pass where the device can: whether it can, and the call.

The kernels are written in Triton, which is optional: it comes with the CUDA, ROCm and XPU builds of PyTorch for Linux,
and as a package of its own for Windows. It needs a C compiler and Python's headers when a kernel first runs, and a card
that it supports. Where anything is missing, callers use PyTorch's own operations, which give the same numbers.
"""

import logging
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .gguf_blocks import FORMATS, BlockFormat

_log = logging.getLogger(__name__)

_ACCELERATORS = ("cuda", "xpu")
# What is tried first, and tells whether Triton works at all.
_SIMPLEST = "Q8_0"
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
# The kernel that rounds activations.
ROUNDING = "FP8 e4m3"


@cache
def kernels_for(device: torch.device, kind: str | torch.dtype = _SIMPLEST) -> ModuleType | None:
    """The module of kernels if the one for `kind`, a block format's name, the type of scaled codes, or the rounding of
    activations, runs on `device`.

    Otherwise None, and the log says what is in the way. It is tried once, with a small weight whose numbers are
    compared with PyTorch's, and not at all where the simplest kernel does not run.
    """
    if device.type not in _ACCELERATORS or kind != _SIMPLEST and kernels_for(device) is None:
        return None
    try:
        from . import triton_kernels

        with _current(device):
            found, expected = _trial(triton_kernels, device, kind)
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3, equal_nan=True):
            raise RuntimeError("its numbers are wrong")
    except torch.cuda.OutOfMemoryError:
        raise
    # What a missing compiler, header or driver raises differs between versions and systems.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        work = "activations are rounded" if kind == ROUNDING else "quantised weights are unpacked"
        _log.warning("On %s %s by PyTorch's own operations, which is slower: the Triton kernel for %s does not run "
                     "here (%s). On Linux Triton needs a C compiler and Python's headers; on Windows it is the package "
                     "triton-windows.", device, work, kind, reason)
        return None
    return triton_kernels


def _trial(kernels: ModuleType, device: torch.device, kind: str | torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of a small weight by the kernel and by PyTorch."""
    if isinstance(kind, torch.dtype):
        codes = torch.arange(256, device=device).to(torch.uint8).view(kind)
        return kernels.dequantise_scaled(codes, torch.ones(1, device=device), torch.bfloat16), codes.bfloat16()
    if kind == ROUNDING:
        # All finite codes, with the scale 1.
        codes = torch.arange(256, device=device).to(torch.uint8).view(torch.float8_e4m3fn)
        numbers = codes.float().nan_to_num().view(1, -1)
        return kernels.round_rows(numbers, None)[0].float(), numbers
    form = FORMATS[kind]
    # Bytes below 64 are finite scales, wherever they stand.
    raw = (torch.arange(16 * form.nbytes, device=device) % 64).to(torch.uint8)
    return kernels.dequantise_blocks(form, raw, torch.bfloat16), form.dequantise(raw, torch.bfloat16)


def fused_blocks(form: BlockFormat, raw: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Rows of raw bytes [..., K * nbytes] as numbers [..., K * size], or None if there is no kernel for them."""
    kernels = kernels_for(raw.device, form.name) if dtype in _OUTPUTS else None
    if kernels is None:
        return None
    with _current(raw.device):
        return kernels.dequantise_blocks(form, raw, dtype)


def fused_scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Codes [...] of FP8 or int8 times one scale for each of equal parts, or None if there is no kernel for them."""
    kernels = kernels_for(codes.device, codes.dtype) if dtype in _OUTPUTS and codes.dtype in _CODES else None
    if kernels is None:
        return None
    with _current(codes.device):
        return kernels.dequantise_scaled(codes, scale, dtype)


def fused_rounding(rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Rows [N, K] in e4m3 over their scales, and those: `scale`, or one measured of each row; None if there is no
    kernel for them. See `triton_kernels.round_rows`."""
    if rows.dtype not in _OUTPUTS or torch.compiler.is_compiling():
        return None
    kernels = kernels_for(rows.device, ROUNDING)
    if kernels is None:
        return None
    with _current(rows.device):
        return kernels.round_rows(rows, scale)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the weight."""
    return getattr(torch, device.type).device(device)
