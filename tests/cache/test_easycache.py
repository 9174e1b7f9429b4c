"""EasyCache against the published rule, on walks of random latents; its state: copies, saving, changes of shape."""

from copy import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.cache.runs import BOTH, run_of
from wan_core.cache import EasyCache


class Published:
    """The published rule in its own terms: a counter over calls, even ones positive and odd ones negative."""

    def __init__(self, steps: int, threshold: float, retained: int) -> None:
        self.calls, self.threshold, self.begin, self.cutoff = 0, threshold, 2 * retained, 2 * steps - 2
        self.before = self.last_in = self.last_out = self.rate = None
        self.total, self.skips = 0.0, False
        self.cached: list = [None, None]

    def call(self, x: Tensor, transformer) -> Tensor:
        side = self.calls % 2
        if side == 0:
            self.skips = False
            if self.calls < self.begin or self.calls >= self.cutoff:
                self.total = 0.0
            elif self.last_out is not None and self.before is not None and self.rate is not None:
                moved = (x - self.before).abs().mean()
                self.total += self.rate * (moved / self.last_out.abs().mean()).item()
                self.skips = self.total < self.threshold
                if not self.skips:
                    self.total = 0.0
            self.before = x.clone()
        self.calls += 1
        if self.skips:
            return x + self.cached[side]
        out = transformer(x, side)
        self.cached[side] = out - x
        if side == 0:
            if self.last_out is not None and self.last_in is not None:
                self.rate = ((out - self.last_out).abs().mean() / (x - self.last_in).abs().mean()).item()
            self.last_in, self.last_out = x.clone(), out
        return out


def transformer(x: Tensor, side: int) -> Tensor:
    """Something that is different for the branches and changes with its input."""
    return torch.tanh(3 * x) * (1 + 0.2 * side) + 0.1 * x.flip(-1)


def run(state, steps: int, x: Tensor, first: int = 0, end: int | None = None, seen: list | None = None) -> Tensor:
    """Euler steps `first` to `end` of `steps`, with guidance, through a state of EasyCache."""
    for index in range(first, steps if end is None else end):
        state.decide(index, x)
        velocities = []
        for side, branch in enumerate(BOTH):
            velocity = state.reused(branch, x)
            if seen is not None:
                seen.append(velocity is not None)
            if velocity is None:
                velocity = transformer(x, side)
                state.computed(branch, x, velocity)
            velocities.append(velocity)
        x = x - (velocities[1] + 4 * (velocities[0] - velocities[1])) / steps
    return x


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.4])
@pytest.mark.parametrize("steps", [20, 50])
def test_published_decisions(steps, threshold):
    """Promise: over a whole run each branch reuses where the published rule does, with the same velocities."""
    torch.manual_seed(steps)
    start = torch.randn(1, 4, 3, 6, 6)
    published, x, expected = Published(steps, threshold, steps // 5), start, []
    for _ in range(steps):
        velocities = []
        for _ in BOTH:
            computed = []
            velocities.append(published.call(x, lambda x, side: computed.append(side) or transformer(x, side)))
            expected.append(not computed)
        x = x - (velocities[1] + 4 * (velocities[0] - velocities[1])) / steps
    seen = []
    state = EasyCache(threshold).begin(run_of(steps))
    assert torch.equal(run(state, steps, start, seen=seen), x)
    assert seen == expected and any(seen) and not any(seen[:2 * steps // 5]) and not any(seen[-2:])


def test_random_walks():
    """Promise: the decisions are those of the published rule for latents and velocities that have nothing to do with
    each other, too."""
    torch.manual_seed(3)
    skips = 0
    for trial in range(10):
        steps, threshold = 30, 0.05 * (trial + 1)
        state, published = EasyCache(threshold).begin(run_of(steps)), Published(steps, threshold, 6)
        x, out = torch.randn(1, 2, 2, 4, 4), torch.randn(1, 2, 2, 4, 4)
        for index in range(steps):
            x = x + torch.rand(()) * 0.2 * torch.randn_like(x)
            out = out + torch.rand(()) * 0.2 * torch.randn_like(x)
            computed = []
            for _ in BOTH:
                published.call(x, lambda x, side: computed.append(side) or out)
            assert state.decide(index, x) == (not computed)
            if computed:
                for branch in BOTH:
                    state.computed(branch, x, out)
            skips += not computed
    assert 30 < skips < 200


def test_saved_and_resumed():
    """Promise: a state that is saved between any two steps and loaded goes on with the same bits."""
    torch.manual_seed(4)
    start = torch.randn(1, 4, 2, 4, 4)
    whole = EasyCache(0.1).begin(run_of(20))
    expected = run(whole, 20, start)
    for at in (0, 1, 5, 9, 13, 19):
        state = EasyCache(0.1).begin(run_of(20))
        x = run(state, 20, start, end=at)
        # Through a file, which takes no tensor twice.
        saved = load(save(state.state_dict()))
        resumed = EasyCache(0.1).begin(run_of(20))
        resumed.load_state_dict({**saved, "unipc.index": torch.tensor(at)})
        assert torch.equal(run(resumed, 20, x, at), expected)


def test_a_copy_is_a_moment():
    """Promise: what a copy goes through changes nothing in the original, and nobody's tensors are kept."""
    torch.manual_seed(5)
    state = EasyCache(0.1).begin(run_of(20))
    x = run(state, 20, torch.randn(1, 4, 2, 4, 4), end=12)
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    tried = copy(state)
    once = run(tried, 20, x, 12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())
    assert torch.equal(run(copy(state), 20, x, 12), once)
    # The caller's tensors may be overwritten.
    latents, velocity = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 2, 4, 4)
    state = EasyCache().begin(run_of(20))
    state.decide(0, latents)
    state.computed("positive", latents, velocity)
    kept = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    latents.zero_(), velocity.zero_()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.state_dict().items())


def _settled(steps) -> tuple[object, Tensor]:
    """A state that reuses from step 4 on, and latents that hardly move."""
    state, x = EasyCache(0.5, warm_up=0.1).begin(steps), torch.ones(1, 2, 1, 2, 2)
    for index in range(4):
        state.decide(index, x * (1 + index / 100))
        for branch in steps.branches[index]:
            state.computed(branch, x * (1 + index / 100), x * (2 + index / 100))
    return state, x


def test_a_branch_without_a_difference_computes():
    """Promise: where the first branch reuses, another one that was not computed since does not, and may from then
    on."""
    steps = run_of(20, branches=(BOTH,) * 2 + (("positive",),) * 2 + (BOTH,) * 16)
    state, x = _settled(steps)
    assert state.decide(4, x) and state.reused("positive", x) is not None and state.reused("negative", x) is None
    state.computed("negative", x, 3 * x)
    assert state.decide(5, x) and torch.equal(state.reused("negative", x), 3 * x)


def test_nothing_is_carried_over():
    """Promise: at the switch of the experts, and when the shape changes, all is forgotten; steps outside the range of
    sigmas compute."""
    state, x = _settled(run_of(20, high=4))
    assert not state.decide(4, x) and state.reused("positive", x) is None
    state, x = _settled(run_of(20))
    assert state.decide(4, x)
    state, x = _settled(run_of(20))
    assert not state.decide(4, torch.ones(1, 2, 1, 2, 4))
    state, x = _settled(run_of(20, sigmas=(1.0,) * 20))
    assert state.decide(4, x)
    steps = run_of(20)
    state = EasyCache(0.5, warm_up=0.1, end=0.9).begin(steps)
    assert not any(state._may_skip[3:]) and state._may_skip[2]


def test_damaged_states():
    """Promise: a state that is incomplete, or of a longer run, is refused."""
    state, _ = _settled(run_of(20))
    saved = state.state_dict()
    for lost in ("easycache.total", "easycache.computed_at.positive"):
        with pytest.raises(ValueError, match="no whole saved state"):
            EasyCache().begin(run_of(20)).load_state_dict({name: saved[name] for name in saved if name != lost})
    with pytest.raises(ValueError, match="stands at step 4, and this run has 3"):
        EasyCache().begin(run_of(3)).load_state_dict(saved)
