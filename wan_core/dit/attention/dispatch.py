"""The attention function: the table of backends, the trial before the first use, and the way back to PyTorch's own."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .backend import Backend, Case, capability, first_line
from .flash import FLASH2, FLASH3
from .flex import FLEX
from .sage import SAGE, SAGE3
from .sdpa import CUDNN, EFFICIENT, FLASH, MATH, SDPA

log = logging.getLogger(__name__)

# What takes the place of a backend that cannot run.
PLAIN = "sdpa"

# Compute capabilities on which FlashAttention 3, and cuDNN's kernel, are faster than what PyTorch chooses by itself.
_HOPPER = (9, 0)
_CUDNN_IS_FASTER = ((9, 0), (10, 0), (10, 3))

# Sizes of the trial: queries, keys, heads. No two are equal, so that swapped dimensions are found out.
_TRIAL = (192, 320, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, backend: str = PLAIN) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v.

    q [B, Lq, heads, head_dim], k and v [B, Lk, heads, head_dim], bias [Lk] (added to the logits of each key) ->
    [B, Lq, heads * head_dim]. A `backend` that cannot run these tensors is replaced by "sdpa", with one warning for
    each reason; one that takes no bias is so without a word, since only the short attention to the text has one.
    Raises ValueError for an unknown `backend`.
    """
    check_backend(backend)
    if backend == PLAIN or bias is not None and not BACKENDS[backend].takes_bias:
        return BACKENDS[PLAIN].run(q, k, v, bias).flatten(2)
    return _run_or_replace(q, k, v, bias, backend).flatten(2)


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is known."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}.")


def describe_backends(device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> dict[str, str | None]:
    """Of each backend why it cannot run heads of `head_dim` in `dtype` on `device`, None where it can."""
    case = Case(device, capability(device), dtype, head_dim)
    return {name: why_not(backend, case) for name, backend in BACKENDS.items()}


def why_not(backend: Backend, case: Case) -> str | None:
    """Why `backend` cannot run `case`, after a trial where it wants one; None where it can."""
    reason = backend.why_not(case)
    if reason is None and backend.tolerance is not None:
        return trial(backend, case.device, case.dtype, case.head_dim)
    return reason


@cache
def trial(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What is wrong with a backend's result for small random tensors beside PyTorch's own; None if it is right.

    Compiled packages fail in many ways, and some builds return memory that nothing was written to. So that this is
    seen, the memory that the result will come to lie in is filled with NaN, and its result is computed first.
    """
    queries, keys, heads = _TRIAL
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, head_dim, generator=generator).to(device, dtype)
               for length in (queries, keys, keys))
    given = [q.clone(), k.clone(), v.clone()]
    try:
        with torch.no_grad():
            torch.full_like(q, torch.nan)
            found = backend.run(*given, None).float()
            expected = BACKENDS[PLAIN].run(q, k, v, None).float()
            error = float((found - expected).norm() / expected.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        return first_line(problem)
    if not error <= backend.tolerance:
        return f"its result is wrong on this device, by {100 * error:.0f} %; install another version"
    if not all(torch.equal(one, other) for one, other in zip(given, (q, k, v))):
        return "it changes the tensors that it is given; install another version"
    return None


def _run_or_replace(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """[B, Lq, heads, head_dim] by backend `name`, or by PyTorch's own where that one cannot."""
    backend = BACKENDS[name]
    found = run_or_warn(lambda: backend.run(q, k, v, bias), why_not(backend, Case.of(q, k)), f"Attention {name!r}",
                        PLAIN)
    return BACKENDS[PLAIN].run(q, k, v, bias) if found is None else found


def run_or_warn(run: Callable[[], Tensor], reason: str | None, what: str, instead: str) -> Tensor | None:
    """What `run` gives; None, with one warning for each reason, if there is a `reason` why it cannot or it fails."""
    if reason is None:
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = first_line(error)
    warn_once(what, reason, instead)
    return None


@cache
def warn_once(what: str, reason: str, instead: str) -> None:
    """Say that something cannot run here, once in a process."""
    log.warning("%s cannot run here, and %s takes its place: %s.", what, instead, reason)


def _fastest(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The fastest exact attention for these tensors. In doubt it is PyTorch's choice."""
    case = Case.of(q, k)
    candidates = []
    # The attention with a bias is a short one, and PyTorch's own has no kernel for both at hand.
    if bias is None and case.capability == _HOPPER:
        candidates.append(FLASH3)
    if bias is None and case.capability in _CUDNN_IS_FASTER:
        candidates.append(CUDNN)
    chosen = next((backend for backend in candidates if why_not(backend, case) is None), BACKENDS[PLAIN])
    return chosen.run(q, k, v, bias)


# Saved graphs hold these names: they are only ever appended to.
BACKENDS: dict[str, Backend] = {
    PLAIN: SDPA,
    "sdpa-flash": FLASH,
    "sdpa-efficient": EFFICIENT,
    "sdpa-cudnn": CUDNN,
    "sdpa-math": MATH,
    "auto": Backend(_fastest),
    "flash2": FLASH2,
    "flash3": FLASH3,
    "sage": SAGE,
    "sage3": SAGE3,
    "flex": FLEX,
}
