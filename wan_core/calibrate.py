"""Measures a model, so that MagCache and TeaCache can be used with it: whole runs that reuse nothing.

One prompt is enough for MagCache's ratios, which hardly depend on it (Ma et al. 2025, arXiv:2506.09045, figure 2);
TeaCache's polynomial becomes steadier with more. Ratios belong to the steps, shift and guidance that they are measured
with.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from .cache import Calibration, Polynomial, fit_coefficients
from .cache.calibration import SIGNALS
from .cache.measuring import Measured, Measuring
from .models import Model
from .pipeline import generate

# Digits behind the point, as the published tables have them.
_DIGITS = 5


def calibrate(prompts: Sequence[str], model: Model, *, on_prompt: Callable[[int], None] | None = None,
              **options: object) -> Calibration:
    """What is measured of `model` while it makes a video of each of `prompts`; `options` are those of `generate`.

    `on_prompt` is told how many prompts are done. Raises ValueError for no prompts, for runs that are too short to fit
    a polynomial to (5 different changes of each expert), and as `generate` does.
    """
    if not prompts:
        raise ValueError("no prompt was given to measure with; give one or more.")
    seen: dict[tuple[int, int, str], Measured] = {}
    for number, prompt in enumerate(prompts):
        def on_measured(measured: Measured, number: int = number) -> None:
            seen[number, measured.index, measured.branch] = measured

        generate(prompt, model=replace(model, cache=Measuring(on_measured)), **options)
        if on_prompt:
            on_prompt(number + 1)
    found = list(seen.values())
    polynomials = tuple(
        _fitted(expert, signal, [(one.signals[signal], one.output) for one in found
                                 if one.expert == expert and one.output is not None])
        for expert in model.parts for signal in SIGNALS)
    return Calibration(model.preset.name, _ratios(found, "positive"), _ratios(found, "negative"), polynomials)


def _ratios(found: Sequence[Measured], branch: str) -> tuple[float, ...]:
    """The mean ratio of a branch at each step; nothing where the branch was not computed at all of them."""
    steps = 1 + max(one.index for one in found)
    values: list[list[float]] = [[] for _ in range(steps)]
    for one in found:
        if one.branch == branch:
            values[one.index].append(1.0 if one.magnitude is None else one.magnitude)
    return tuple(round(statistics.fmean(each), _DIGITS) for each in values) if all(values) else ()


def _fitted(expert: str, signal: str, pairs: Sequence[tuple[float, float]]) -> Polynomial:
    """The polynomial through changes of a time embedding and those of the output."""
    changes = [change for change, _ in pairs]
    coefficients = fit_coefficients(changes, [output for _, output in pairs])
    return Polynomial(expert, signal, coefficients, (min(changes), max(changes)))
