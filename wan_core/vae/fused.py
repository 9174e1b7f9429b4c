"""Norm and SiLU before a convolution: by a kernel of one pass where the device has one, else by PyTorch's operations.

The kernel is written in Triton, which is optional: it comes with the CUDA, ROCm and XPU builds of PyTorch for Linux,
and as a package of its own for Windows.
"""

import logging
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

_ACCELERATORS = ("cuda", "xpu")
# The first NVIDIA cards with instructions for bfloat16.
_AMPERE = (8, 0)


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Write SiLU(x / ||x||_2 * sqrt(C) * gamma) into `out`; x and `out` [B, C, T, H, W], gamma [C, ...].

    Without gradients; norms are over channels and in float32.
    """
    kernels = tried_kernels(x.device, x.dtype) if x.device.type in _ACCELERATORS else None
    if kernels is not None and kernels.is_rows(x) and kernels.is_rows(out):
        with getattr(torch, x.device.type).device(x.device):
            kernels.norm_silu(x, gamma.flatten(), out)
        return
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
    torch.mul(x, (x.shape[1] ** 0.5 / norm).to(x.dtype), out=out)
    F.silu(out.mul_(gamma), inplace=True)


@cache
def tried_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels if they run on `device` with `dtype`; otherwise None, and the log says what is in the way.

    They are tried once, on a few pixels, and compared with PyTorch's operations.
    """
    try:
        if dtype == torch.bfloat16 and device.type == "cuda" and torch.version.hip is None and \
                torch.cuda.get_device_capability(device) < _AMPERE:
            raise RuntimeError("the card has no instructions for bfloat16")
        from . import triton_kernels

        # Channels that are no power of two, as in most layers.
        x = torch.arange(2 * 24 * 6, device=device).float().sin().view(2, 1, 2, 3, 24).movedim(-1, 1)
        gamma, found = torch.linspace(0.5, 2, 24, device=device), torch.empty_like(x, dtype=dtype)
        with torch.inference_mode(), getattr(torch, device.type).device(device):
            triton_kernels.norm_silu(x.to(dtype), gamma.to(dtype), found)
        expected = F.silu(F.normalize(x, dim=1) * 24 ** 0.5 * gamma.view(-1, 1, 1, 1))
        if not torch.allclose(found.float(), expected, rtol=2e-2, atol=2e-2):
            raise RuntimeError("its numbers are wrong")
    except torch.cuda.OutOfMemoryError:
        raise
    # What a missing compiler, header or driver raises differs between versions and systems.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("On %s the VAE's norms are PyTorch's own operations, which is slower: the Triton kernel does not "
                     "run here with %s (%s). On Linux Triton needs a C compiler and Python's headers; on Windows it is "
                     "the package triton-windows.", device, str(dtype).removeprefix("torch."), reason)
        return None
    return triton_kernels
