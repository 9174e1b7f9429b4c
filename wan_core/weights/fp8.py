"""Matrix products in FP8: activations are rounded to e4m3 with scales of their own, weights stay as they are stored.

Twice the arithmetic rate of bfloat16 on cards that have it (NVIDIA since Ada), and no pass that makes numbers of the
weights. Scales of activations are measured, one a row where the card takes that (since Hopper), else one for all: the
fixed ones in some files clip whatever is larger than in their calibration. Reference: `torch._scaled_mm`.
"""

import functools
import logging

import torch
from torch import Tensor

from .quantised import Quantised, Scaled

log = logging.getLogger(__name__)

SWITCH = ("auto", "on", "off")
# The name of the weight format that can be multiplied.
MULTIPLIED = Scaled(torch.float8_e4m3fn).name

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Sides of a matrix must be multiples of this.
_GRAIN = 16
_ADA, _HOPPER = (8, 9), (9, 0)


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies FP8 matrices faster than others."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= _ADA


def choose_fp8_products(switch: str, device: torch.device) -> bool:
    """Whether products are to be computed in FP8: as `switch` says, for "auto" where the device is faster at it.

    Raises ValueError for an unknown word, and for "on" where the device cannot.
    """
    if switch not in SWITCH:
        raise ValueError(f"unknown choice of FP8 products {switch!r}; choose {', '.join(SWITCH)}.")
    # A CPU can and is slow; that is for checking.
    if switch == "on" and device.type != "cpu" and not has_fp8_products(device):
        raise ValueError(f"FP8 products were asked for, and the device {device} has none: they need an NVIDIA card of "
                         "the Ada generation (RTX 40) or newer. Use auto or off.")
    return switch == "on" or switch == "auto" and has_fp8_products(device)


def can_multiply(weight: Quantised) -> bool:
    """Whether `fp8_product` takes a weight: e4m3, whole or with one scale or one a row, of suitable sides."""
    if not isinstance(weight.scheme, Scaled) or weight.scheme.dtype != torch.float8_e4m3fn or weight.scheme.rotation:
        return False
    scale = weight.parts.get("scale")
    sides_fit = len(weight.shape) == 2 and not any(side % _GRAIN for side in weight.shape)
    return sides_fit and (scale is None or scale.numel() in (1, weight.shape[0]))


def fp8_product(x: Tensor, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., in] times weight [out, in] plus bias, in `dtype`; the weight is one that `can_multiply` takes."""
    rows = x.reshape(-1, x.shape[-1])
    codes = weight.parts["codes"].view(torch.float8_e4m3fn)
    scale = weight.parts.get("scale")
    scale = torch.ones((), device=x.device) if scale is None else scale.float()
    if _scales_by_row(x.device, _output(dtype)):
        peak = rows.abs().amax(1, keepdim=True).float()
        scale = scale.reshape(1, -1).expand(1, codes.shape[0]).contiguous()
    else:
        peak = rows.abs().amax().float()
        if scale.numel() > 1:
            return _by_output(rows, codes, scale, bias, dtype, peak).view(*x.shape[:-1], -1)
        scale = scale.reshape(())
    own = (peak / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    y = torch._scaled_mm(_rounded(rows, own), codes.t(), scale_a=own, scale_b=scale, out_dtype=_output(dtype))
    y = y.to(dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(dtype)


@functools.cache
def _scales_by_row(device: torch.device, output: torch.dtype) -> bool:
    """Whether the device's product takes a scale for each row and column; tried once, since that depends on the card,
    the system and the library (on Windows there is no such kernel for the newest cards)."""
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < _HOPPER:
        return False
    side, one = 2 * _GRAIN, torch.ones((), device=device)
    codes = one.expand(side, side).contiguous().to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=one.expand(side, 1).contiguous(),
                         scale_b=one.expand(1, side).contiguous(), out_dtype=output)
    except (RuntimeError, ValueError) as error:
        log.info("FP8 products on %s take one scale for all activations: %s", device, str(error).partition("\n")[0])
        return False
    return True


def _by_output(rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
               peak: Tensor) -> Tensor:
    """Where the card takes one scale only, those of the weight's rows are multiplied onto the output."""
    own = (peak / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    one = torch.ones((), device=rows.device)
    y = torch._scaled_mm(_rounded(rows, own), codes.t(), scale_a=own, scale_b=one, out_dtype=_output(dtype))
    y = (y.float() * scale.reshape(1, -1)).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def _output(dtype: torch.dtype) -> torch.dtype:
    """The product's own output type: float32 has no kernel on every card."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
