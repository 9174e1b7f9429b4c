"""torch.compile for what there is between the attentions of a block.

A block is three pieces with an attention between each two. Each piece is compiled once, for all blocks and both
experts: weights are inputs of its graph, numbers of tokens are symbols in it. What differs from call to call stays
outside, so that nothing is compiled again for it: attention and its packages, the text, hooks that bring swapped
blocks, loops over chunks and over runs of tokens, the numbers of quantised weights. Graphs are whole or not at all, so
a piece that cannot be compiled has not begun to run, and is run as it is written. References: PyTorch's documentation
of torch.compiler, "Dynamic Shapes" and "CUDAGraph Trees".
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .time import TimeRows

log = logging.getLogger(__name__)

MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")

# Graphs of a piece that a process keeps, where PyTorch's own limit is 8: each kind of model, of weights, of batch and
# of stack of LoRAs is one.
MOST_GRAPHS = 64


@dataclass(frozen=True)
class Compile:
    """How blocks are compiled.

    `mode` is one of PyTorch's: "default"; "max-autotune-no-cudagraphs", which also tries several kernels for each
    matrix product; "reduce-overhead", which records CUDA graphs. Without `dynamic` each number of tokens has a graph of
    its own, which may be a little faster and has to be compiled. `backend` is the compiler, by its name in PyTorch.
    Raises ValueError for an unknown mode or backend.
    """

    mode: str = "default"
    dynamic: bool = True
    backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode of compilation {self.mode!r}; choose {', '.join(MODES)}.")
        if self.backend == "inductor":
            return
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            raise ValueError(f"unknown compiler {self.backend!r}; choose {', '.join(sorted(known))}.")
        if self.mode != "default":
            raise ValueError(f"the mode of compilation {self.mode!r} is one of inductor's, and the compiler is "
                             f"{self.backend!r}. Use the mode default.")

    @property
    def records(self) -> bool:
        """Whether CUDA graphs are recorded."""
        return self.mode == "reduce-overhead"


@dataclass(frozen=True)
class Piece:
    """What a block does between two attentions.

    `method` is called as method(block, x [B, L, D], its runs, what else there is), the latter being a tensor for the
    same tokens, or a list that holds nothing but one and out of which it is taken. Where it `changes` x, in place, x
    comes first in its result. `layers` are the names of the layers whose weights it needs.
    """

    method: Callable
    layers: tuple[str, ...]
    changes: bool = True


Run = Callable[[Piece, nn.Module, Tensor, TimeRows, Tensor | list[Tensor]], object]


def at_once(piece: Piece, block: nn.Module, x: Tensor, time: TimeRows, given: Tensor | list[Tensor]) -> object:
    """Runs a piece as it is written."""
    return piece.method(block, x, time, given)


class Compiled:
    """Runs pieces compiled, for tokens of one run each.

    With `records` CUDA graphs are recorded. If something cannot be compiled, all of the model runs as it is written
    from then on, and the log says why.
    """

    def __init__(self, how: Compile, records: bool) -> None:
        self.how, self.records = how, records
        self._failed = self._has_run = False

    def begin(self) -> None:
        """To be called before the first block: nobody needs results of an earlier call any more."""
        if self.records:
            torch.compiler.cudagraph_mark_step_begin()

    def __call__(self, piece: Piece, block: nn.Module, x: Tensor, time: TimeRows,
                 given: Tensor | list[Tensor]) -> object:
        if self._failed or torch.is_grad_enabled() or len(time.rows) > 1:
            return piece.method(block, x, time, given)
        if not self._has_run:
            log.info("The transformer's blocks are compiled, so the first step takes longer. What is compiled is kept "
                     "on disk for other runs.")
            self._has_run = True
        is_boxed = isinstance(given, list)
        other = given.pop() if is_boxed else given
        try:
            with _holding(block, piece.layers):
                return self._run(piece, block, x, time.rows[0], other, is_boxed)
        except Exception as error:
            reason = why_not_compiled(error)
            if reason is None:
                raise
            self._failed = True
            log.warning("The model runs without torch.compile, which fails here: %s. It needs a C++ compiler for a "
                        "CPU, and Triton for a GPU (on Windows the package triton-windows).", reason)
        return piece.method(block, x, time, [other] if is_boxed else other)

    def _run(self, piece: Piece, block: nn.Module, x: Tensor, row: Tensor, other: Tensor, is_boxed: bool) -> object:
        part = _with_plain_strides(x)
        # Compilers know no complex numbers.
        axis, other = (0, torch.view_as_real(other)) if other.is_complex() else (1, _with_plain_strides(other))
        if self.how.dynamic:
            torch._dynamo.maybe_mark_dynamic(part, 1)
            torch._dynamo.maybe_mark_dynamic(other, axis)
        result = with_room(compiled(piece, self.how, self.records), block, part, row, other, is_boxed)
        if not piece.changes:
            return result
        changed, *others = result
        if changed is not None:
            # The next call with the same graph writes where this result is.
            x.copy_(changed)
        return (x, *others) if others else x


def with_room(run: Callable, *given: object, **options: object) -> object:
    """run(...), which is compiled as a whole, with room for `MOST_GRAPHS` graphs where PyTorch's limit is reached."""
    try:
        return run(*given, **options)
    except _limit_errors():
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        with config.patch({limit: MOST_GRAPHS}):
            return run(*given, **options)


@functools.cache
def compiled(piece: Piece, how: Compile, records: bool) -> Callable:
    """`piece` by torch.compile; for all models, whose differences are guarded by what PyTorch makes of it."""
    def run(block: nn.Module, x: Tensor, row: Tensor, other: Tensor, is_boxed: bool) -> object:
        # CUDA graphs change no tensor that is not theirs.
        x = x.clone() if records and piece.changes else x
        result = piece.method(block, x, TimeRows((row,), (x.shape[1],)), [other] if is_boxed else other)
        if not piece.changes:
            return result
        changed, *others = result if isinstance(result, tuple) else (result,)
        # A graph that returns what it was given makes a view of it that begins where that of its first call did.
        return (changed if records else None, *others)

    # Graphs are kept, counted and named by the code that they are made of, and this is one code for all pieces.
    run.__code__ = run.__code__.replace(co_name=piece.method.__name__)
    inductor = how.backend == "inductor"
    mode = ("default" if how.records and not records else how.mode) if inductor else None
    return torch.compile(run, fullgraph=True, dynamic=None if how.dynamic else False, backend=how.backend, mode=mode)


def use_compiled(module: nn.Module, how: Compile | None, *, why_no_graphs: str | None = None) -> None:
    """Let a transformer run its blocks compiled, or, for None, as they are written.

    `why_no_graphs`, if there is a reason, is why no CUDA graphs can be recorded: they hold the addresses of weights.
    """
    records = how is not None and how.records and why_no_graphs is None
    held: Compiled | None = module.compiled
    if how is None:
        module.compiled = None
    elif held is None or (held.how, held.records) != (how, records):
        module.compiled = Compiled(how, records)
        if how.records and not records:
            log.warning("The blocks are compiled without CUDA graphs: %s. Use the mode default to choose this.",
                        why_no_graphs)


@contextmanager
def _holding(block: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Layers that have to `hold` something before compiled code can take it have it, until the end."""
    layers = [layer for name in names for layer in block.get_submodule(name).modules() if hasattr(type(layer), "hold")]
    try:
        for layer in layers:
            layer.hold()
        yield
    finally:
        for layer in layers:
            layer.release()


def _with_plain_strides(x: Tensor) -> Tensor:
    """x [B, ...] with the strides of a tensor of its own where it is a part of a batch of one: graphs depend on them.
    """
    return x[0].unsqueeze(0) if x.shape[0] == 1 else x


def _limit_errors() -> tuple[type[Exception], ...]:
    """What PyTorch raises where more graphs are wanted of a piece than its limit; the name depends on the version."""
    from torch._dynamo import exc

    names = ("FailOnRecompileLimitHit", "RecompileLimitExceeded", "FailOnCacheLimitHit", "CacheLimitExceeded")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def why_not_compiled(error: Exception) -> str | None:
    """The reason in one line if `error` is one of compiling, before anything has run; None for any other.

    Raises torch.OutOfMemoryError where that is what has stopped the compiler: others know what to do about it.
    """
    from torch._dynamo import exc

    if not isinstance(error, (exc.TorchDynamoException, *_limit_errors())):
        return None
    inner = getattr(error, "inner_exception", None) or error.__cause__
    if isinstance(inner, torch.OutOfMemoryError):
        raise inner from error
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
