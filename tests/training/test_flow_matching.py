"""Flow-matching training: noise levels, loss weights and the loss."""

import pytest
import torch

from wan_core.training.flow_matching import (
    LogitNormalTimesteps,
    UniformTimesteps,
    bell_weights,
    flow_matching_loss,
    shift_sigmas,
)


def generator():
    return torch.Generator().manual_seed(0)


def table(shift, count=1000):
    """The shifted table of training timesteps, highest first."""
    return 1000 * shift_sigmas(torch.linspace(1, 0, count + 1)[:-1], shift)


def test_shift_keeps_the_ends_and_raises_what_lies_between():
    """s -> shift * s / (1 + (shift - 1) * s): 0 and 1 stay, 1/2 becomes shift / (shift + 1)."""
    sigmas = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_sigmas(sigmas, 5.0), torch.tensor([0.0, 5 / 6, 1.0]))
    torch.testing.assert_close(shift_sigmas(sigmas, 1.0), sigmas)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_weights_are_a_bell_with_mean_one(shift):
    """Over the table of 1,000: mean one, none negative, zero at the entry farthest from 500, highest nearest to it."""
    timesteps = table(shift)
    weights = bell_weights(timesteps)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    distance = (timesteps - 500).abs()
    assert weights.min() == 0 == weights[distance.argmax()]
    assert weights.argmax() == distance.argmin()
    # Monotone in the distance from 500, and by the formula's ratio of raised bells.
    order = distance.argsort()
    assert (weights[order].diff() <= 1e-6).all()
    bell = torch.exp(-2 * ((timesteps.double() - 500) / 1000) ** 2)
    bell -= bell.min()
    torch.testing.assert_close(weights.double(), bell / bell.mean(), atol=1e-4, rtol=0)


def test_weights_of_a_table_of_another_length():
    """Scaled to mean one, then all raised by the second entry's weight, so that every step has some."""
    timesteps = table(5.0, 40)
    bell = torch.exp(-2 * ((timesteps.double() - 500) / 1000) ** 2)
    bell -= bell.min()
    scaled = bell / bell.mean()
    weights = bell_weights(timesteps)
    torch.testing.assert_close(weights.double(), scaled + scaled[1], atol=1e-4, rtol=0)
    assert weights.min() > 0


def test_uniform_draws_are_table_entries_with_their_weights():
    """Every draw is one of the 1,000 shifted levels, carries that level's weight, and all parts of the table occur."""
    sigmas, weights = UniformTimesteps(5.0).sample(4000, generator())
    timesteps = table(5.0)
    index = (sigmas[:, None] * 1000 - timesteps[None]).abs().argmin(1)
    torch.testing.assert_close(sigmas * 1000, timesteps[index], atol=1e-3, rtol=0)
    torch.testing.assert_close(weights, bell_weights(timesteps)[index], atol=1e-5, rtol=0)
    assert torch.histc(index.float(), 10, 0, 1000).min() > 300


@pytest.mark.parametrize(("fraction", "timestep"), [(0.417, 875), (0.358, 900)])
def test_parts_of_the_table_meet_at_the_experts_boundaries(fraction, timestep):
    """The published fractions of the shift-5 table split it at t 875 (T2V) and 900 (I2V), with no level in both."""
    high, _ = UniformTimesteps(5.0, high=fraction).sample(20_000, generator())
    low, _ = UniformTimesteps(5.0, low=fraction).sample(20_000, generator())
    assert high.min() * 1000 >= timestep > low.max() * 1000
    assert high.max() == 1 and low.min() * 1000 < 10
    levels = {round(sigma, 6) for sigma in high.tolist()}
    assert len(levels) == round(1000 * fraction) and not levels & {round(sigma, 6) for sigma in low.tolist()}


def test_narrowest_part_of_the_table():
    """A part smaller than one level still gives a level of it."""
    assert UniformTimesteps(1.0, low=0.9995).sample(3, generator())[0].tolist() == pytest.approx([0.001] * 3)
    assert UniformTimesteps(1.0, high=0.0005).sample(3, generator())[0].tolist() == [1.0] * 3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 1.2)])
def test_logit_normal_draws_have_normal_logits(mean, std):
    """Before the shift the logits of the levels have the given mean and deviation; all weights are one."""
    sigmas, weights = LogitNormalTimesteps(mean, std).sample(20_000, generator())
    logits = sigmas.double().logit()
    assert logits.mean().item() == pytest.approx(mean, abs=0.03)
    assert logits.std().item() == pytest.approx(std, abs=0.03)
    assert sigmas.shape == weights.shape == (20_000,) and (weights == 1).all()
    assert sigmas.min() > 0 and sigmas.max() < 1


def test_logit_normal_levels_are_shifted():
    """The same draws at shift 3 are the shifted ones."""
    plain, _ = LogitNormalTimesteps().sample(100, generator())
    shifted, _ = LogitNormalTimesteps(shift=3.0).sample(100, generator())
    torch.testing.assert_close(shifted, shift_sigmas(plain, 3.0))


@pytest.mark.parametrize(("low", "high"), [(0.825, 1.0), (0.0, 0.925), (0.4, 0.45)])
def test_logit_normal_draws_stay_in_their_range(low, high):
    """A range of sigmas is kept by truncation, not by clamping: nothing gathers at its ends."""
    sigmas, weights = LogitNormalTimesteps(0.3, 1.2, 3.0, low, high).sample(2000, generator())
    assert len(sigmas) == len(weights) == 2000
    assert sigmas.min() >= low and sigmas.max() <= high
    assert len(sigmas.unique()) > 1900
    assert sigmas.max() - sigmas.min() > 0.9 * (min(high, 0.99) - max(low, 0.05))


@pytest.mark.parametrize(("low", "high"), [(0.825, 1.0), (0.0, 0.925), (0.7, 0.9), (0.4, 0.45)])
def test_truncated_draws_are_those_that_would_be_kept(low, high):
    """A limited range has the distribution of unlimited draws that fall into it, at every decile."""
    drawn = shift_sigmas((torch.randn(400_000, generator=generator()) * 1.2 + 0.3).sigmoid(), 3.0)
    kept = drawn[(drawn >= low) & (drawn <= high)]
    sigmas, _ = LogitNormalTimesteps(0.3, 1.2, 3.0, low, high).sample(40_000, generator())
    deciles = torch.linspace(0.1, 0.9, 9)
    # Five standard errors of a decile of 40,000 and of about 10,000 levels, in shares of the levels below it.
    shares = (sigmas[:, None] <= kept.quantile(deciles)).float().mean(0)
    torch.testing.assert_close(shares, deciles, atol=0.03, rtol=0)


@pytest.mark.parametrize(("options", "median"), [
    ({"std": 0.5, "low": 0.999}, 0.999), ({"std": 0.5, "high": 0.001}, 0.001),
    ({"std": 0.06, "low": 0.9}, 0.9), ({"low": 0.5, "high": 0.5 + 1e-9}, 0.5)])
def test_improbable_ranges_are_drawn_from_at_once(options, median):
    """Where hardly any unlimited draw would fall, draws lie in the range, at the end next to the mean."""
    timesteps = LogitNormalTimesteps(**options)
    sigmas, _ = timesteps.sample(1000, generator())
    assert (sigmas >= torch.tensor(timesteps.low)).all() and (sigmas <= torch.tensor(timesteps.high)).all()
    assert sigmas.median().item() == pytest.approx(median, abs=2e-4)


@pytest.mark.parametrize("options", [
    {"std": 0.05, "low": 0.9}, {"std": 0.05, "high": 0.1}, {"mean": 500.0, "high": 0.5},
    {"shift": 1e300, "std": 0.5, "high": 0.5}, {"mean": float("nan")}])
def test_ranges_without_probability_are_refused(options):
    """A range that no draw reaches is an error when it is written down, not a loop without end."""
    with pytest.raises(ValueError, match="is ever drawn at mean .* Widen the range, or move the mean"):
        LogitNormalTimesteps(**options)


@pytest.mark.parametrize("timesteps", [UniformTimesteps(5.0), LogitNormalTimesteps(shift=3.0)])
def test_a_seed_gives_the_same_levels(timesteps):
    """Two generators of one seed draw alike; the generator moves on."""
    first = generator()
    draws = timesteps.sample(16, first)[0]
    assert torch.equal(draws, timesteps.sample(16, generator())[0])
    assert not torch.equal(draws, timesteps.sample(16, first)[0])


@pytest.mark.parametrize("options", [{"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.1}, {"shift": 0.0}])
@pytest.mark.parametrize("kind", [UniformTimesteps, LogitNormalTimesteps])
def test_unfit_options_are_refused(kind, options):
    """Empty ranges, ranges outside 0..1 and a shift of zero are errors when they are written down."""
    with pytest.raises(ValueError, match="expected 0 <= low < high <= 1"):
        kind(**options)


def test_a_deviation_of_zero_is_refused():
    """All draws would be one level."""
    with pytest.raises(ValueError, match="std 0.0"):
        LogitNormalTimesteps(std=0.0)


def clips():
    draws = generator()
    return torch.randn(3, 4, 2, 3, 3, generator=draws), torch.randn(3, 4, 2, 3, 3, generator=draws)


def test_loss_is_zero_for_the_exact_velocity():
    """noise - clean is what is learned; the model sees the mixture at each sample's sigma, and 1000 * sigma as time."""
    clean, noise = clips()
    sigmas = torch.tensor([0.0, 0.25, 1.0])

    def exact(noisy, timesteps):
        torch.testing.assert_close(timesteps, torch.tensor([0.0, 250.0, 1000.0]))
        torch.testing.assert_close(noisy[0], clean[0])
        torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
        torch.testing.assert_close(noisy[2], noise[2])
        return noise - clean

    assert flow_matching_loss(exact, clean, noise, sigmas, torch.ones(3)) == 0


def test_loss_is_the_weighted_mean_of_the_samples_errors():
    """An error of e in every entry costs e^2 times the sample's weight, averaged over the batch, in fp32."""
    clean, noise = clips()
    errors, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 0.0])
    loss = flow_matching_loss(lambda noisy, timesteps: noise - clean + errors.view(3, 1, 1, 1, 1), clean, noise,
                              torch.full((3,), 0.5), weights)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((1 + 4 * 0.5) / 3, rel=1e-5)


def test_loss_reaches_the_model():
    """Gradients flow through the prediction, also from a half-precision one."""
    clean, noise = clips()
    gain = torch.ones((), requires_grad=True)
    loss = flow_matching_loss(lambda noisy, timesteps: (noisy * gain).bfloat16(), clean, noise, torch.rand(3),
                              torch.ones(3))
    loss.backward()
    assert loss.dtype == torch.float32 and gain.grad != 0


def test_known_frames_are_shown_clean_and_do_not_count():
    """Known frames enter as they are at timestep 0, and what is predicted for them costs nothing."""
    clean, noise = clips()
    known = torch.tensor([[True, False], [False, False], [True, False]])

    def exact_elsewhere(noisy, timesteps):
        torch.testing.assert_close(timesteps, torch.tensor([[0.0, 250.0], [500.0, 500.0], [0.0, 1000.0]]))
        torch.testing.assert_close(noisy[0, :, 0], clean[0, :, 0])
        torch.testing.assert_close(noisy[1], (clean[1] + noise[1]) / 2)
        return noise - clean + known[:, None, :, None, None] * 7.0

    sigmas = torch.tensor([0.25, 0.5, 1.0])
    assert flow_matching_loss(exact_elsewhere, clean, noise, sigmas, torch.ones(3), known) == 0
    off = flow_matching_loss(lambda noisy, timesteps: noise - clean + 1, clean, noise, sigmas, torch.ones(3), known)
    assert off.item() == pytest.approx(1, rel=1e-5)
