"""Matrix products in FP8: activations are rounded to e4m3 with scales of their own, weights stay as they are stored.

Twice the arithmetic rate of bfloat16 on cards that have it (NVIDIA since Ada), and no pass that makes numbers of the
weights. Scales of activations are measured, one a row where the card takes that (since Hopper), else one for all: the
fixed ones in some files clip whatever is larger than in their calibration. Reference: `torch._scaled_mm`.
"""

import functools
import logging

import torch
from torch import Tensor

from .fused import fused_rounding
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


def fp8_product(x: Tensor, weight: Quantised, bias: Tensor | None, dtype: torch.dtype,
                by_row: bool | None = None) -> Tensor:
    """x [..., in] times weight [out, in] plus bias, in `dtype`; the weight is one that `can_multiply` takes.

    `by_row` is what `scales_by_row` says, for compiled code, which cannot try it.
    """
    rows = x.reshape(-1, x.shape[-1])
    codes = weight.parts["codes"].view(torch.float8_e4m3fn)
    scale = weight.parts.get("scale")
    scale = torch.ones((), device=x.device) if scale is None else scale.float()
    output = _output(dtype)
    by_row = scales_by_row(x.device, dtype) if by_row is None else by_row
    rounded, own = rounded_rows(rows, by_row)
    after = joined = None
    if by_row:
        scale = scale.reshape(1, -1).expand(1, codes.shape[0]).contiguous()
    elif scale.numel() == 1:
        scale = scale.reshape(())
    else:
        # The card takes one scale only; those of the weight's rows are multiplied onto the output.
        scale, after = torch.ones((), device=x.device), scale.reshape(1, -1)
    if bias is not None and after is None and output == dtype:
        # In this type it costs the product no pass of its own.
        joined, bias = bias.to(dtype), None
    y = torch._scaled_mm(rounded, codes.t(), scale_a=own, scale_b=scale, bias=joined, out_dtype=output)
    return _finished(y.to(dtype), after, bias).view(*x.shape[:-1], -1)


def _finished(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * scale + bias in one pass, in the memory of y; either may be None."""
    if scale is None:
        return y if bias is None else y.add_(bias)
    return y.mul_(scale) if bias is None else torch.addcmul(bias.float(), y, scale, out=y)


def rounded_rows(rows: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """`rows` [N, K] in e4m3 over their scales, and those: one of each row [N, 1], or one for all."""
    scale = None
    if not by_row:
        # One pass, and no numbers in between.
        smallest, largest = rows.aminmax()
        scale = _scale_of(torch.maximum(-smallest, largest))
    fused = fused_rounding(rows, scale)
    if fused is not None:
        return fused
    if scale is None:
        scale = _scale_of(rows.abs().amax(1, keepdim=True))
    return (rows / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


def _scale_of(peak: Tensor) -> Tensor:
    """With which the largest number becomes the largest code; also zero has a scale."""
    return (peak.float() / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)


@functools.cache
def scales_by_row(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's product in `dtype` takes a scale for each row and column; tried once, since that depends on
    the card, the system and the library (on Windows there is no such kernel for the newest cards)."""
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < _HOPPER:
        return False
    reason = _why_not_by_row(device, _output(dtype))
    if reason is not None:
        log.info("FP8 products on %s take one scale for all activations: %s", device, reason)
    return reason is None


def _why_not_by_row(device: torch.device, output: torch.dtype) -> str | None:
    """What is in the way of scales for each row and column, found out by a small product of ones."""
    side, one = 2 * _GRAIN, torch.ones((), device=device)
    codes = one.expand(side, side).contiguous().to(torch.float8_e4m3fn)
    rows, columns = torch.linspace(1, 2, side, device=device).view(-1, 1), torch.linspace(1, 3, side, device=device)
    try:
        found = torch._scaled_mm(codes, codes.t(), scale_a=rows, scale_b=columns.view(1, -1),
                                 bias=one.expand(side).to(output), out_dtype=output)
        is_right = torch.allclose(found.float(), side * rows * columns + 1, rtol=1e-2)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None if is_right else "its numbers are wrong"


def _output(dtype: torch.dtype) -> torch.dtype:
    """The product's own output type: float32 has no kernel on every card."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
