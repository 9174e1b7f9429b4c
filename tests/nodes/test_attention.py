"""Wan Attention: the base backend, ranges by chaining, radial attention; and that its input stays as it was."""

import pytest

from wan_core.dit import Radial


@pytest.fixture
def model(pack):
    loader = pack.NODE_CLASS_MAPPINGS["WanCoreModelLoader"]()
    name = next(name for name in loader.INPUT_TYPES()["required"]["model"][0] if "nano" in name and "i2v" not in name)
    return loader.load(name, "auto", "auto", "sdpa")[0]


@pytest.fixture
def choose(pack):
    def run(model, backend="auto", start=1.0, end=0.0, radial=False, radial_start=0.94, dense_blocks=1, decay=0.5):
        return pack.NODE_CLASS_MAPPINGS["WanCoreAttention"]().choose(
            model, backend, start, end, radial, radial_start, dense_blocks, decay)[0]
    return run


def test_all_noise_levels_are_the_base(model, choose):
    """From 1 to 0 the backend is the model's, and nothing else changes."""
    chosen = choose(model, "sage")
    assert (chosen.attention, chosen.attention_ranges, chosen.radial) == ("sage", (), None)
    assert model.attention == "sdpa" and chosen.low is model.low


def test_ranges_are_chained(model, choose):
    """Another range is added behind those of the model, which keeps its base."""
    chosen = choose(choose(choose(model, "flash2"), "sage3", 0.9, 0.3), "sage", 0.95, 0.2)
    assert chosen.attention == "flash2"
    assert [(one.backend, one.start, one.end) for one in chosen.attention_ranges] == [("sage3", 0.9, 0.3),
                                                                                     ("sage", 0.95, 0.2)]


def test_radial_stays_through_a_chain(model, choose):
    """Once on, radial attention stays on, until another node sets its values anew."""
    chosen = choose(choose(model, radial=True, radial_start=0.99, dense_blocks=2, decay=0.25), "sage", 0.5, 0.0)
    found = chosen.radial
    assert (found.start, found.dense_blocks, found.decay) == (0.99, 2, 0.25)
    assert choose(chosen, radial=True).radial.decay == Radial().decay


def test_a_range_that_makes_no_sense_is_refused(model, choose):
    """The error names the levels."""
    with pytest.raises(ValueError, match="from sigma 0.2 to 0.5"):
        choose(model, "sage", 0.2, 0.5)
