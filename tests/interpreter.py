"""Triton kernels in its interpreter, where there is no GPU to run them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch


@contextmanager
def interpreted_kernels(name: str) -> Iterator[ModuleType]:
    """The module of kernels `name`; interpreted where there is no GPU.

    Triton looks at the variable when functions are defined: those of the module, which nobody may have imported before,
    and its own. PyTorch may have imported these already, so the ones that kernels call are given undecorated.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            language = importlib.import_module("triton.language")
            for function in ("sum", "max"):
                patch.setattr(language, function, getattr(language, function).fn)
        yield importlib.import_module(name)
