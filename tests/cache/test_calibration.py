"""What is measured for the caches, and the file it is kept in."""

import json

import numpy as np
import pytest
import torch

from wan_core.cache import (
    Calibration,
    Polynomial,
    fit_coefficients,
    magnitude_ratio,
    read_calibration,
    write_calibration,
)

WHOLE = Calibration("nano_t2v", (1.0, 0.99, 0.95), (1.0, 0.98, 0.9),
                    (Polynomial("low", "e0", (1.5, -2.0, 0.1), (0.1, 0.5)),))


def test_magnitude_ratio():
    """Promise: mean and deviation over tokens of the norms' ratio, and cosine distance, whatever the chunk."""
    torch.manual_seed(0)
    old = torch.randn(2, 37, 8)
    new = 0.9 * old + 0.1 * torch.randn(2, 37, 8)
    ratios = np.linalg.norm(new.numpy(), axis=2) / np.linalg.norm(old.numpy(), axis=2)
    cosine = (new * old).sum(2) / (new.norm(dim=2) * old.norm(dim=2))
    expected = (ratios.mean(), ratios.std(ddof=1), float((1 - cosine).mean()))
    for chunk in (5, 37, 4096):
        assert magnitude_ratio(new, old, chunk) == pytest.approx(expected, rel=1e-5)
    assert magnitude_ratio(2 * old, old) == pytest.approx((2, 0, 0), abs=1e-6)
    with pytest.raises(ValueError, match=r"shapes \[2, 37, 8\] and \[37, 8\]"):
        magnitude_ratio(new, old[0])


def test_fit():
    """Promise: the coefficients are numpy's, also for changes as small as real ones; too few are refused."""
    generator = np.random.default_rng(0)
    x = generator.uniform(0.002, 0.08, 200)
    y = np.polyval([-5e4, 9e3, -5e2, 13.0, -0.05], x) + generator.normal(0, 0.001, 200)
    fitted = fit_coefficients(x.tolist(), y.tolist())
    assert np.polyval(fitted, x) == pytest.approx(np.polyval(np.polyfit(x, y, 4), x), rel=1e-6, abs=1e-8)
    with pytest.raises(ValueError, match="1 different changes of the time embedding and 9 changes"):
        fit_coefficients([0.1] * 9, [0.1] * 9)


@pytest.mark.parametrize("calibration", [
    WHOLE, Calibration("nano_i2v", (1.0, 0.9)), Calibration("x", polynomials=WHOLE.polynomials)])
def test_a_file_comes_back(tmp_path, calibration):
    """Promise: what is written is read back as it was, whichever parts there are."""
    write_calibration(calibration, tmp_path / "a.json")
    assert read_calibration(tmp_path / "a.json") == calibration


@pytest.mark.parametrize("change, message", [
    ({"format": "other"}, "no calibration of the format"),
    ({"ratios": {"positive": [1.0, "a"]}}, "the positive ratios are .* expected finite numbers"),
    ({"ratios": {"positive": [1.0, -0.5]}}, "the positive ratios hold -0.5"),
    ({"ratios": {"positive": [1.0, 0.5], "negative": [1.0]}}, "ratios of 2 steps for the positive and 1 for"),
    ({"ratios": [1.0]}, "c.json: "),
    ({"ratios": {}, "polynomials": []}, "neither ratios nor polynomials"),
    ({"polynomials": [{"expert": "mid", "signal": "e", "coefficients": [1.0], "range": [0.1, 1]}]},
     "a polynomial of expert 'mid'"),
    ({"polynomials": [{"expert": "low", "signal": "e", "coefficients": [], "range": [0.1, 1]}]},
     "the coefficients are"),
    ({"polynomials": [{"expert": "low", "signal": "e", "coefficients": [1.0], "range": [1, 0.1]}]},
     "two numbers above 0"),
    ({"polynomials": [{"expert": "low"}]}, "c.json: 'signal'"),
])
def test_bad_files(tmp_path, change, message):
    """Promise: a file that is another or holds what cannot be is refused by name, and never half used."""
    path = tmp_path / "c.json"
    write_calibration(WHOLE, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_calibration(path)


def test_no_file(tmp_path):
    """Promise: a missing file, a folder and text that is not JSON are refused without showing what is in them."""
    (tmp_path / "t.json").write_text("secret words")
    for name in ("none.json", "", "t.json"):
        with pytest.raises(ValueError, match="cannot be read") as error:
            read_calibration(tmp_path / name)
        assert "secret" not in str(error.value)


def test_what_is_not_there():
    """Promise: the other model's calibration, a missing polynomial and missing ratios say what to do."""
    for ask, message in ((lambda: WHOLE.check_preset("wan21_t2v_14b"), "measured on nano_t2v, and this model is"),
                         (lambda: WHOLE.polynomial("high", "e0"), "no polynomial of the high-noise expert"),
                         (lambda: Calibration("x", polynomials=WHOLE.polynomials).ratios("positive", 5), "no ratios")):
        with pytest.raises(ValueError, match=message):
            ask()


def test_other_step_counts():
    """Promise: the nearest measured step, halves to the even one, as numpy rounds; one branch alone serves both."""
    one = Calibration("x", tuple(float(index) for index in range(1, 41)))
    for steps in (2, 3, 4, 14, 27, 30, 40, 50, 79):
        nearest = np.round(np.arange(steps) * (39 / (steps - 1))).astype(int)
        assert one.ratios("negative", steps) == tuple(float(1 + index) for index in nearest)
    assert one.ratios("positive", 1) == (40.0,) and WHOLE.ratios("negative", 3) == (1.0, 0.98, 0.9)
