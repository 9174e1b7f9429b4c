"""FlashAttention 2 and 3: exact attention by packages of their own (Dao 2023; Shah et al. 2024).

References: Dao-AILab/flash-attention, `flash_attn/flash_attn_interface.py` and `hopper/flash_attn_interface.py`. Both
take [B, L, heads, head_dim] and no bias. The third is for Hopper; it runs on Ampere and Ada, too.
"""

from collections.abc import Callable

from torch import Tensor

from .backend import Backend, CannotRun, Case, current, imported, why_no_half_card, why_no_head

_AMPERE = (8, 0)
_BLACKWELL = (10, 0)


def _second() -> Callable:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _third() -> Callable:
    try:
        from flash_attn_3.flash_attn_interface import flash_attn_func
    except ModuleNotFoundError:
        # Its place before it had a package of its own.
        from flash_attn_interface import flash_attn_func
    return flash_attn_func


def _run_with(find: Callable[[], Callable]) -> Callable:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: None) -> Tensor:
        function = imported(find)
        if isinstance(function, str):
            raise CannotRun(function)
        with current(q.device):
            out = function(q, k, v)
        # Builds of the third before July 2025 give the sums of the logits' exponentials as well.
        return out[0] if isinstance(out, tuple) else out

    return run


def _why_not_second(case: Case) -> str | None:
    reason = _why_no_case(case)
    if reason is None and isinstance(found := imported(_second), str):
        reason = f"the package flash-attn cannot be used ({found}); install a build of it for this PyTorch"
    return reason


def _why_not_third(case: Case) -> str | None:
    reason = _why_no_case(case)
    if reason is None and case.capability >= _BLACKWELL:
        reason = "FlashAttention 3 has kernels for Hopper, Ada and Ampere cards, and this one is newer"
    if reason is None and isinstance(found := imported(_third), str):
        reason = (f"FlashAttention 3 cannot be used ({found}); install it from the folder hopper of the FlashAttention "
                  "repository")
    return reason


def _why_no_case(case: Case) -> str | None:
    fits = case.head_dim <= 256 and case.head_dim % 8 == 0
    return why_no_half_card(case, _AMPERE) or why_no_head(case, fits, "that are multiples of 8 up to 256")


FLASH2 = Backend(_run_with(_second), _why_not_second, takes_bias=False, tolerance=0.05)
FLASH3 = Backend(_run_with(_third), _why_not_third, takes_bias=False, tolerance=0.05)
