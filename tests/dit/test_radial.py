"""Radial attention: the published rule, dense attention of what it keeps, memory, and where a model uses it."""

import math

import pytest
import torch

from tests.dit.test_attention import exact
from tests.dit.test_chunks import SPECS, inputs_for, model_of
from wan_core.dit import Radial, attention
from wan_core.dit.attention import BlockPattern, radial
from wan_core.dit.attention.radial import BLOCK, by_blocks, by_flex, sparse_attention
from wan_core.memory.meter import FusedAttention, MemoryMeter

CPU = torch.device("cpu")


def tensors(length, heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, head_dim, generator=generator) for _ in range(3)]


def is_seen(i, j, apart, tokens, decay):
    """Whether a token of frame i sees that of frame j whose place is so far apart, with windows no narrower than a
    block: the paper's rule, where these are one token and decay is 1; the own frame and the first one are whole."""
    if i == j or j == 0:
        return True
    window = decay * tokens / 2 ** math.floor(math.log2(abs(i - j)))
    if window >= BLOCK:
        return apart + 1 <= window
    return abs(i - j) % math.ceil(BLOCK / window) == 0 and apart + 1 <= BLOCK


def brute(frames, tokens, decay):
    """Blocks that hold a pair of tokens of which one sees the other, found pair by pair."""
    places = torch.arange(tokens)
    distance = (places[:, None] - places).abs()
    seen = torch.zeros(frames, tokens, frames, tokens, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            row = torch.tensor([is_seen(i, j, step, tokens, decay) for step in range(tokens)])
            seen[i, :, j] = row[distance]
    length = frames * tokens
    padded = torch.zeros(2 * [-(-length // BLOCK) * BLOCK], dtype=torch.bool)
    padded[:length, :length] = seen.reshape(length, length)
    return padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(3).any(1)


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("grid", [(9, 12, 16), (5, 1, 300), (10, 5, 10), (3, 16, 16), (18, 3, 5), (1, 7, 9), (1, 1, 1)])
def test_the_pattern_is_the_published_rule(grid, decay):
    """A block of keys is kept exactly if the rule keeps any of its pairs: frames larger, smaller and unlike blocks."""
    pattern = BlockPattern.radial(grid, decay, CPU)
    expected = brute(grid[0], grid[1] * grid[2], decay)
    assert torch.equal(pattern.kept, expected) and pattern.density == pytest.approx(float(expected.float().mean()))


@pytest.mark.parametrize(("grid", "decay", "expected"), [
    ((21, 30, 52), 1, 63), ((21, 30, 52), 0.5, 44), ((21, 45, 80), 1, 56), ((21, 45, 80), 0.5, 40),
    ((81, 30, 52), 1, 29), ((81, 30, 52), 0.5, 18)])
def test_densities_are_those_that_the_help_page_tells(grid, decay, expected):
    """81 frames, and 20 seconds at 480p: percent of dense attention."""
    assert round(100 * BlockPattern.radial(grid, decay, CPU).density) == expected


@pytest.mark.parametrize("grid", [(9, 12, 16), (3, 9, 20)])
def test_it_is_dense_attention_of_what_is_kept(grid):
    """Every query attends to all keys of its blocks and to no others."""
    pattern = BlockPattern.radial(grid, 0.2, CPU)
    q, k, v = tensors(math.prod(grid))
    bias = torch.where(pattern.kept, 0.0, -torch.inf).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    by_head = [tensor.double().transpose(1, 2) for tensor in (q, k, v)]
    logits = by_head[0] @ by_head[1].mT / 4 + bias[:q.shape[1], :q.shape[1]]
    expected = (logits.softmax(-1) @ by_head[2]).transpose(1, 2).flatten(2)
    out = sparse_attention(q, k, v, pattern, "sdpa")
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    assert pattern.density < 0.9 and (out - attention(q, k, v)).norm() > 0.1 * out.norm()


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-math"])
def test_at_full_density_it_is_dense_attention(backend):
    """Where windows are wider than frames, nothing is left out."""
    pattern = BlockPattern.radial((9, 6, 10), 100.0, CPU)
    q, k, v = tensors(540)
    assert pattern.density == 1
    out = sparse_attention(q, k, v, pattern, backend)
    torch.testing.assert_close(out.double(), exact(q, k, v), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [540, 512])
def test_flex_attention_is_given_the_same_blocks(length):
    """The pattern as FlexAttention takes it says what to keep block by block, for as many tokens as there are."""
    kept = BlockPattern.radial((4, 1, length // 4), 0.2, CPU).kept.clone()
    kept[2, 1], kept[1, 2] = False, True
    mask = BlockPattern(kept, length, CPU).block_mask
    assert torch.equal(mask.to_dense()[0, 0].bool(), kept) and mask.seq_lengths == (length, length)


@pytest.mark.slow
def test_flex_attention_computes_the_same():
    """FlexAttention, compiled for a CPU, gives what is computed block by block; with a last block that is not full."""
    grid = (9, 9, 20)
    q, k, v = tensors(math.prod(grid))
    pattern = BlockPattern.radial(grid, 0.2, CPU)
    with torch.no_grad():
        torch.testing.assert_close(by_flex(q, k, v, pattern), by_blocks(q, k, v, pattern), atol=1e-5, rtol=0)


def test_a_device_without_flex_attention_takes_the_slow_way(caplog, fresh):
    """Elsewhere than on CPU and GPU it runs block by block, and one warning says so."""
    pattern = BlockPattern.radial((3, 9, 20), 0.2, torch.device("meta"))
    q, k, v = (tensor.to("meta") for tensor in tensors(540))
    with FusedAttention():
        for _ in range(2):
            assert sparse_attention(q, k, v, pattern, "sdpa").shape == (1, 540, 32)
    assert [record.args[1:] for record in caplog.records] == [
        ("a slower way to compute the same", "FlexAttention is not compiled for a meta device")]


def test_memory_is_linear_in_tokens():
    """Four times the frames take at most four times the memory, most of which is q, k, v and the result."""
    def peak(frames):
        pattern = BlockPattern.radial((frames, 16, 32), 0.2, CPU)
        q, k, v = (torch.empty(1, frames * 512, 8, 64, device="meta") for _ in range(3))
        with FusedAttention(), MemoryMeter("meta") as meter:
            by_blocks(q, k, v, pattern)
        return meter.peak

    assert peak(32) <= 4.1 * peak(8) and peak(32) <= 3.5 * 32 * 512 * 512 * 4


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_models_with_everything_kept_are_dense_models(kind):
    """With a grid of few tokens a radial model is the dense one, for every kind of model."""
    model = model_of(kind)
    inputs = inputs_for(model, kind)
    torch.testing.assert_close(model(inputs, radial=Radial()), model(inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["t2v", "vace"])
@torch.no_grad()
def test_first_blocks_stay_dense(kind, monkeypatch):
    """As many blocks as are wanted attend to everything, those of the VACE branch by the block that they belong to."""
    # Blocks of four tokens, so that few frames make a sparse pattern.
    monkeypatch.setattr(radial, "BLOCK", 4)
    model = model_of(kind)
    inputs = inputs_for(model, kind)
    dense = model(inputs)
    results = [model(inputs, radial=Radial(0.1, dense_blocks=count)) for count in (0, 1, len(model.blocks))]
    assert torch.equal(results[2], dense)
    assert not torch.equal(results[0], dense) and not torch.equal(results[1], dense)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize(("options", "message"), [
    ({"start": 1.5}, "begin at sigma 1.5; expected 0 to 1"), ({"start": math.nan}, "begin at sigma nan"),
    ({"dense_blocks": -1}, "-1 blocks are to keep dense attention; expected 0 or more"),
    ({"decay": 0.0}, "decay of radial attention is 0.0; expected a number above 0"), ({"decay": math.inf}, "is inf"),
    ({"decay": math.nan}, "is nan")])
def test_values_out_of_range_are_refused(options, message):
    """A wrong option is an error that names it, before anything runs."""
    with pytest.raises(ValueError, match=message):
        Radial(**options)
