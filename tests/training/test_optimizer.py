"""The optimiser of the nano models: orthogonal updates, a loss that falls, a run that goes on where it stopped."""

import pytest
import torch
from torch import nn

from wan_core.training.optimizer import Muon, Optimizers, learning_rate_factor, orthogonalise


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (1, 8)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_one(shape, scale):
    """Whatever the matrix's shape and size, its update has singular values around one and the same directions."""
    matrix = randn(*shape) * scale
    # A square random matrix has directions of next to no size, which five iterations cannot raise.
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(s.clamp_min(0.05 * s[0])) @ v
    result = orthogonalise(matrix)
    assert result.shape == matrix.shape and result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(result, u @ torch.diag(torch.diag(u.T @ result @ v.T)) @ v, atol=1e-3, rtol=0)


def test_a_gradient_of_zero_moves_nothing():
    """No direction, no update: a layer whose gradient vanishes stays, instead of turning into NaN."""
    assert not orthogonalise(torch.zeros(4, 8)).any()


def test_size_of_an_update_is_the_learning_rate():
    """The root mean square of one update's entries is lr, for matrices of any shape and for kernels."""
    for shape in ((24, 8), (8, 24), (6, 4, 3, 3, 3)):
        parameter = nn.Parameter(randn(*shape))
        before = parameter.detach().clone()
        parameter.grad = randn(*shape, seed=1)
        Muon([parameter], lr=0.01).step()
        size = (parameter.detach() - before).square().mean().sqrt().item()
        assert size == pytest.approx(0.01, rel=0.25)


def test_weight_decay_shrinks():
    """With no gradient direction, a step leaves (1 - lr * decay) of the weights."""
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))


def test_momentum_smooths_gradients_that_alternate():
    """The parameter follows the lasting part of the gradient, not the part that changes its sign."""
    lasting, noise = randn(8, 8), 3 * randn(8, 8, seed=1)
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([parameter], lr=0.01)
    for step in range(200):
        parameter.grad = lasting + noise * (-1) ** step
        optimizer.step()
    assert (parameter.detach() * lasting).sum() < -0.5 * parameter.norm() * lasting.norm()


class Regression(nn.Module):
    """A small network with every kind of parameter: matrices, vectors, an embedding and a 1-column matrix."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.hidden = nn.Linear(8, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.embedding(x))))


INPUTS, TARGETS = torch.arange(5), torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2]).unsqueeze(1)


def run(model, optimizers, steps):
    for step in range(steps):
        loss = (model(INPUTS) - TARGETS).square().mean()
        loss.backward()
        optimizers.step(1 - step / 400)
    return loss.item()


def regression():
    torch.manual_seed(0)
    model = Regression()
    return model, Optimizers(model, muon_lr=0.01, adam_lr=0.02, adam_names=("embedding",))


def test_a_small_problem_is_minimised():
    """Muon and AdamW together fit five targets almost exactly."""
    model, optimizers = regression()
    assert run(model, optimizers, 400) < 1e-3


def test_parameters_are_shared_out():
    """Hidden matrices go to Muon; vectors, single-row matrices and whatever is named go to AdamW; all are trained."""
    model, optimizers = regression()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(model, optimizers, 1)
    muon, adam = optimizers.state_dict()
    assert len(muon["state"]) == 1 and muon["state"][0]["momentum"].shape == (16, 8)
    assert len(adam["state"]) == 4
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_gradients_are_clipped_and_cleared():
    """A huge gradient moves AdamW's first step no farther than its rate, and no gradient is left for the next step."""
    model, optimizers = regression()
    before = model.out.bias.detach().clone()
    (1e6 * model(INPUTS).sum()).backward()
    optimizers.step(0.5)
    assert (model.out.bias.detach() - before).abs() <= 0.02 * 0.5 * 1.01
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_factor_of_zero_changes_nothing():
    """At the end of the schedule the rate is zero for both optimisers."""
    model, optimizers = regression()
    before = model.hidden.weight.detach().clone()
    model(INPUTS).sum().backward()
    optimizers.step(0.0)
    assert torch.equal(model.hidden.weight.detach(), before)


def test_a_resumed_run_is_the_same_run(tmp_path):
    """Saved after 20 steps, loaded into new objects and run for 20 more: bit for bit what 40 steps give."""
    model, optimizers = regression()
    run(model, optimizers, 20)
    torch.save([model.state_dict(), optimizers.state_dict()], tmp_path / "state.pt")
    run(model, optimizers, 20)
    resumed, fresh = regression()
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    fresh.load_state_dict(state)
    run(resumed, fresh, 20)
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))


def test_learning_rate_rises_and_falls():
    """Linear from 0 to 1 over the warm-up, then linear to 0 at the end; never above one."""
    factors = [learning_rate_factor(step / 1000) for step in range(1001)]
    assert factors[0] == 0 and factors[-1] == 0 and factors[10] == pytest.approx(0.5)
    assert max(factors) == pytest.approx(1) == factors[20]
    assert all(a <= b for a, b in zip(factors[:21], factors[1:21]))
    assert all(a > b for a, b in zip(factors[20:], factors[21:]))
    assert learning_rate_factor(0, warmup=0) == 1
