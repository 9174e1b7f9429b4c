"""Norm and SiLU written where a convolution reads them: the kernel and PyTorch's own, against plain ones."""

import pytest
import torch
import torch.nn.functional as F

from tests.interpreter import interpreted_kernels
from tests.vae.small import randn
from wan_core.vae.fused import norm_silu
from wan_core.vae.layers import CausalConv3d, RMSNorm, Stream


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    with interpreted_kernels("wan_core.vae.triton_kernels") as module:
        yield module


def features(*shape, dtype=torch.float32):
    return randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def expected(x, gamma):
    return F.silu(F.normalize(x.float(), dim=1) * x.shape[1] ** 0.5 * gamma.float().view(-1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [24, 5])
def test_the_kernel_computes_the_norm_and_silu(kernels, channels, dtype):
    """Into the rear of a larger tensor, of two clips, with widths that are no power of two and pixels of zeros."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gamma = features(2, channels, 2, 3, 5, dtype=dtype).to(device), randn(channels, seed=1).to(device, dtype)
    x[:, :, 0, 0, 0] = 0
    whole = torch.full_like(features(2, channels, 4, 3, 5, dtype=dtype), 7.0, device=device)
    assert kernels.is_rows(x) and kernels.is_rows(whole[:, :, 2:]) and not kernels.is_rows(x.contiguous())
    kernels.norm_silu(x, gamma, whole[:, :, 2:])
    torch.testing.assert_close(whole[:, :, 2:].float(), expected(x, gamma), atol=5e-3 if dtype.itemsize == 2 else 1e-5,
                               rtol=0)
    assert (whole[:, :, :2] == 7).all()


def test_operations_without_a_kernel_write_the_same():
    """On devices without the kernel PyTorch's operations write into the rear of the tensor."""
    x, gamma = features(2, 6, 3, 2, 2), randn(6, seed=1)
    whole = torch.zeros_like(features(2, 6, 5, 2, 2))
    norm_silu(x, gamma.view(-1, 1, 1, 1), whole[:, :, 2:])
    torch.testing.assert_close(whole[:, :, 2:], expected(x, gamma), atol=1e-5, rtol=0)
    assert not whole[:, :, :2].any()


@pytest.mark.parametrize("batch", [1, 2])
def test_activated_convolutions_equal_their_parts(batch):
    """Pieces of one, two and three frames: norm, SiLU and convolution one after the other give the same."""
    torch.manual_seed(0)
    norm, convolution = RMSNorm(6), CausalConv3d(6, 4, 3, padding=1)
    norm.gamma.data.normal_()
    streams = Stream(), Stream()
    with torch.no_grad():
        for frames in (1, 2, 3, 1):
            x = features(batch, 6, frames, 4, 5)
            apart = convolution(F.silu(norm(x)), streams[0])
            torch.testing.assert_close(convolution.activated(norm, x, streams[1]), apart, atol=1e-5, rtol=0)
            torch.testing.assert_close(streams[1].recall(convolution), streams[0].recall(convolution))
