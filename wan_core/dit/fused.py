"""Whether a block's work on single tokens goes through kernels of one pass, and what PyTorch can join to its products.

The kernels are written in Triton, which is optional: it comes with the CUDA, ROCm and XPU builds of PyTorch for Linux,
and as a package of its own for Windows. They are for inference: where gradients are recorded, and where PyTorch's own
compiler joins operations, callers use PyTorch's operations, which give the same numbers within rounding.
"""

import logging
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

_ACCELERATORS = ("cuda", "xpu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first NVIDIA cards with instructions for bfloat16.
_AMPERE = (8, 0)
# A trial's tokens and channels of heads: no power of two, and fewer than a program has room for.
_TOKENS, _HEADS, _HEAD_DIM = 3, 2, 24


def kernels_for(x: Tensor, *others: Tensor | torch.dtype) -> ModuleType | None:
    """The module of kernels if they take x and `others`, tensors beside it or types of results; otherwise None."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type not in _ACCELERATORS:
        return None
    for other in (x, *others):
        dtype = other if isinstance(other, torch.dtype) else other.dtype
        strided = isinstance(other, Tensor) and other.stride(-1) != 1
        if strided or dtype not in _DTYPES or tried_kernels(x.device, dtype) is None:
            return None
    return tried_kernels(x.device, x.dtype)


@cache
def tried_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels if they run on `device` with tensors of `dtype` beside the tokens; otherwise None, and the
    log says what is in the way. They are tried once, on a few tokens, and compared with PyTorch's operations."""
    try:
        if dtype == torch.bfloat16 and _lacks_bfloat16(device):
            raise RuntimeError("the card has no instructions for bfloat16")
        from . import triton_kernels

        with torch.inference_mode():
            if not all(torch.allclose(*pair, rtol=1e-2, atol=1e-2) for pair in _trial(triton_kernels, device, dtype)):
                raise RuntimeError("their numbers are wrong")
    except torch.cuda.OutOfMemoryError:
        raise
    # What a missing compiler, header or driver raises differs between versions and systems.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("On %s the transformer's norms, rotation and residuals are PyTorch's own operations, which is "
                     "slower: the Triton kernels do not run here with %s (%s). On Linux Triton needs a C compiler and "
                     "Python's headers; on Windows it is the package triton-windows.", device,
                     str(dtype).removeprefix("torch."), reason)
        return None
    return triton_kernels


def _lacks_bfloat16(device: torch.device) -> bool:
    # What Triton makes of the type there differs between its versions.
    return (device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device) < _AMPERE)


def _trial(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results of both kernels and PyTorch's, in float32."""
    width, eps = _HEADS * _HEAD_DIM, 1e-6
    x = torch.arange(_TOKENS * width, device=device, dtype=torch.float32).view(1, _TOKENS, width).sin()
    update, row = x.flip(1).to(dtype), x[0, 0] + 2
    turns = torch.polar(torch.ones_like(x[0, :, :_HEAD_DIM // 2]), x[0, :, :_HEAD_DIM // 2]).unsqueeze(1)
    stream, normed, turned = x.clone(), torch.empty_like(update), torch.empty_like(update)
    kernels.stream_pass(stream, update=update, gate=row, out=normed, scale=row, shift=row, offset=1.0, eps=eps)
    kernels.rms_norm(update, row, eps, turned, turns)
    added = x + row * update.float()
    numbers = update.float()
    numbers = numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + eps) * row
    pairs = torch.view_as_complex(numbers.view(1, _TOKENS, _HEADS, -1, 2)) * turns
    return [(stream, added), (normed.float(), F.layer_norm(added, (width,), 1 + row, row, eps).to(dtype).float()),
            (turned.float(), torch.view_as_real(pairs).reshape(x.shape).to(dtype).float())]


def rms_heads(x: Tensor, weight: Tensor, eps: float, num_heads: int, dtype: torch.dtype,
              turns: Tensor | None = None) -> Tensor | None:
    """RMS norm of x [B, L, D] over D times `weight` [D], then rotation by `turns` [L, 1, head_dim / 2] if given.

    [B, L, heads, head_dim] in `dtype`, in the memory of x where that is of the type; None if no kernel takes x.
    """
    kernels = kernels_for(x, weight, dtype)
    if kernels is None:
        return None
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    kernels.rms_norm(x, weight, eps, out, turns)
    return out.unflatten(-1, (num_heads, -1))


def joins_gelu(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a matrix product of x [..., in] with `bias` is to have its GELU (tanh form) in the same kernel."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cuda" or bias is None:
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and bias.dtype == x.dtype and product_has_gelu(x.device, x.dtype)


@cache
def product_has_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's product with an activation exists on `device`, and is the tanh form of GELU; tried once.

    On a CPU, and in some builds, it is the form with erf, which differs by up to 5e-4.
    """
    side = 16
    with torch.inference_mode():
        x = torch.linspace(-6, 6, side * side, device=device).view(side, side).to(dtype)
        one, zero = torch.eye(side, device=device, dtype=dtype), torch.zeros(side, device=device, dtype=dtype)
        try:
            found = torch._addmm_activation(zero, x, one, use_gelu=True).double()
        except torch.cuda.OutOfMemoryError:
            raise
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            _log.info("On %s GELU is an operation of its own: %s", device, str(error).partition("\n")[0])
            return False
        expected = F.gelu(x.double(), approximate="tanh")
        # Its tails are where the two forms differ by more than a type's rounding.
        return bool(((found - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all())
