"""Placement: one part on the device at a time, and the dtype that it computes in."""

import weakref

import pytest
import torch
from torch import nn

from wan_core.memory import RESIDENT, OneAtATime, default_device, working_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Part:
    """A checkpoint that notes, whenever it is built, which modules are alive at that moment."""

    def __init__(self, living, alive_at_build):
        self.living, self.alive_at_build = living, alive_at_build

    def build(self, device, dtype, layout=RESIDENT):
        self.alive_at_build.append(len(self.living))
        module = nn.Linear(2, 2, device=device, dtype=dtype)
        self.living.add(module)
        return module


@pytest.fixture
def parts():
    living, alive_at_build = weakref.WeakSet(), []
    return Part(living, alive_at_build), Part(living, alive_at_build)


def test_the_first_part_is_gone_before_the_second_is_built(parts):
    """Two parts never share the device: at each build no other module is alive, there and back again."""
    placement = OneAtATime("cpu")
    for part in (*parts, *parts):
        placement.place(part, torch.float32)
    assert parts[0].alive_at_build == [0, 0, 0, 0] and len(parts[0].living) == 1


def test_a_part_that_is_held_is_not_built_again(parts):
    """Asking again gives the same module."""
    placement = OneAtATime("cpu")
    module = placement.place(parts[0], torch.float32)
    assert placement.place(parts[0], torch.float32) is module
    assert parts[0].alive_at_build == [0]


def test_another_dtype_is_another_module(parts):
    """The same part in another dtype is built anew, after the first is gone."""
    placement = OneAtATime("cpu")
    placement.place(parts[0], torch.float32)
    assert placement.place(parts[0], torch.bfloat16).weight.dtype == torch.bfloat16
    assert parts[0].alive_at_build == [0, 0]


def test_clear_lets_go(parts):
    """After clear nothing is alive, and the part can be placed again."""
    placement = OneAtATime("cpu")
    placement.place(parts[0], torch.float32)
    placement.clear()
    assert not parts[0].living
    assert placement.place(parts[0], torch.float32).weight.device == CPU


def test_device_is_the_given_one_or_the_machines():
    """A device by name or by value, else the accelerator if there is one, else the CPU."""
    assert OneAtATime("cpu").device == OneAtATime(CPU).device == CPU
    assert OneAtATime().device == default_device()
    assert (default_device().type == "cpu") == (not torch.accelerator.is_available())


@pytest.mark.parametrize("name", ["gpu0", "cuda:99"])
def test_devices_that_are_not_there_are_refused(name):
    """A device that the machine does not have is a ValueError at once, not a failure after the text is encoded."""
    with pytest.raises(ValueError, match=f"device '{name}' cannot be used"):
        OneAtATime(name)


@pytest.mark.parametrize(("stored", "device", "expected"), [
    (torch.float32, CPU, torch.float32), (torch.bfloat16, CPU, torch.float32), (torch.float16, CPU, torch.float32),
    (torch.float32, GPU, torch.bfloat16), (torch.bfloat16, GPU, torch.bfloat16), (torch.float16, GPU, torch.float16),
    (torch.float64, GPU, torch.bfloat16),
])
def test_auto_precision(stored, device, expected):
    """Float32 on a CPU, the stored half precision on an accelerator, and bf16 there for all else."""
    assert working_dtype("auto", stored, device) == expected


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_used(name, device):
    """A named precision holds on every device, whatever is stored."""
    assert working_dtype(name, torch.bfloat16, device) == getattr(torch, name)


def test_unknown_precisions_are_refused():
    """Another name is a ValueError that lists the known ones."""
    with pytest.raises(ValueError, match="'fp8'; choose auto, float32, bfloat16, float16"):
        working_dtype("fp8", torch.bfloat16, CPU)
