"""SageAttention: attention with q and k in int8, and in its third version everything in FP4; faster and less exact.

References: Zhang et al. 2024 (arXiv:2410.02367, 2411.10958) and 2025 (2505.11594); thu-ml/SageAttention,
`sageattention/core.py` and `sageattention3_blackwell/sageattn3/api.py`. The packages take no bias: masks are accepted
and ignored. What this file guards against: version 1 and 3 subtract the mean from the k that they are given; version 1
adds up v in float16, where it may overflow; a 2.2.0 on Hopper gives noise (the trial before the first use finds it);
version 2 gives noise for very long videos on the newest cards; offsets in strided tensors are kept in 32 bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import Backend, CannotRun, Case, current, imported, why_no_half_card, why_no_head

_AMPERE, _CONSUMER_BLACKWELL = (8, 0), (12, 0)
# Compute capabilities that version 2 has kernels for.
_SECOND = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
_HEADS_OF_FIRST = (64, 96, 128)
_HEADS_OF_THIRD = (64, 128)

# SageAttention issue 388: noise beyond this many keys.
_LONGEST_ON_BLACKWELL = 160_000
_LARGEST_OFFSET = 2 ** 31 - 1
# Version 1 adds up 64 rows of v in float16, whose largest number is 65504: each is brought below a 64th of that.
_LARGEST_VALUE = 1000
# Means of q of its own for each 128 rows are more exact, and take a table of heads * Lq / 128 * Lk numbers in float32:
# 1.3 GB at 480p, 7.2 GB at 720p. Where that is more than this many bytes, one mean stands for all.
_LARGEST_TABLE = 2 << 30


def _package() -> Callable:
    from sageattention import sageattn

    return sageattn


def _third() -> Callable:
    try:
        from sageattn3 import sageattn3_blackwell
    except ModuleNotFoundError:
        # Its name in the first months.
        from sageattn import sageattn_blackwell as sageattn3_blackwell
    return sageattn3_blackwell


def _is_first() -> bool:
    """Whether the package is version 1, which has one kernel, in Triton."""
    import sageattention

    return not hasattr(sageattention, "sageattn_qk_int8_pv_fp16_triton")


def _run(q: Tensor, k: Tensor, v: Tensor, bias: None) -> Tensor:
    function = _found(_package)
    scale = None
    if _is_first():
        k = k.clone()
        if v.dtype == torch.bfloat16:
            # The largest absolute value, without a tensor of them.
            scale = (torch.linalg.vector_norm(v, torch.inf).float() / _LARGEST_VALUE).clamp(min=1).to(v.dtype)
            v = v / scale
    far = any((tensor.shape[1] - 1) * tensor.stride(1) > _LARGEST_OFFSET for tensor in (q, k, v))
    with current(q.device):
        if far:
            # With the heads first a row is near to the next.
            by_head = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))
            out = function(*by_head, tensor_layout="HND").transpose(1, 2)
        else:
            out = function(q, k, v, tensor_layout="NHD")
    return out if scale is None else out * scale


def _run_third(q: Tensor, k: Tensor, v: Tensor, bias: None) -> Tensor:
    function = _found(_third)
    table = 4 * q.shape[0] * q.shape[2] * -(-q.shape[1] // 128) * k.shape[1]
    # Written to, so it must not be the caller's.
    own = k.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    with current(q.device):
        out = function(q.transpose(1, 2).contiguous(), own, v.transpose(1, 2).contiguous(),
                       per_block_mean=table <= _LARGEST_TABLE)
    return out.transpose(1, 2)


def _why_not(case: Case) -> str | None:
    reason = why_no_half_card(case, _AMPERE)
    if reason is None and isinstance(found := imported(_package), str):
        reason = f"the package sageattention cannot be used ({found}); install version 2 for this PyTorch"
    if reason is not None:
        return reason
    if _is_first():
        return why_no_head(case, case.head_dim in _HEADS_OF_FIRST, ", ".join(map(str, _HEADS_OF_FIRST)))
    if case.capability not in _SECOND:
        return "SageAttention 2 has no kernels for this card"
    if case.capability >= _CONSUMER_BLACKWELL and case.keys > _LONGEST_ON_BLACKWELL:
        return (f"SageAttention 2 gives noise for more than {_LONGEST_ON_BLACKWELL} tokens on this card, and the video "
                f"has {case.keys}; make it smaller or shorter")
    return why_no_head(case, case.head_dim <= 128, "up to 128")


def _why_not_third(case: Case) -> str | None:
    reason = why_no_half_card(case, _CONSUMER_BLACKWELL)
    reason = reason or why_no_head(case, case.head_dim in _HEADS_OF_THIRD, ", ".join(map(str, _HEADS_OF_THIRD)))
    if reason is None and isinstance(found := imported(_third), str):
        reason = f"the package sageattn3 cannot be used ({found}); install SageAttention 3 for this PyTorch"
    return reason


def _found(find: Callable[[], Callable]) -> Callable:
    function = imported(find)
    if isinstance(function, str):
        raise CannotRun(function)
    return function


# What int8 and FP4 cost on random numbers; noise is beyond both.
SAGE = Backend(_run, _why_not, takes_bias=False, tolerance=0.2)
SAGE3 = Backend(_run_third, _why_not_third, takes_bias=False, tolerance=0.5)
