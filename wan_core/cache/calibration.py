"""What is measured on a model so that MagCache and TeaCache can be used with it, and the file it is kept in.

A file is JSON:

    {"format": "wan_core cache calibration 1",
     "preset": "wan21_t2v_14b",
     "ratios": {"positive": [1.0, 1.025, ...], "negative": [1.0, 1.03, ...]},
     "polynomials": [{"expert": "low", "signal": "e0", "range": [0.01, 0.2],
                      "coefficients": [-3.0e5, 4.9e4, -2.6e3, 58.7, -0.3]}]}

`ratios` have a number for each step of the run that was measured (with its step count, shift and guidance they are
right): the magnitude of what the blocks add, over that of the step before, 1 for the first step. Without guidance there
is no "negative". `polynomials` have the highest power first and were fitted to changes within their range. Either may
be missing.

References: magcache_calibration in magcache_generate.py of Zehong-Ma/MagCache; ali-vilab/TeaCache, issue 2.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT = "wan_core cache calibration 1"
SIGNALS = ("e", "e0")

# What `python -m wan_core.training calibrations` has measured on the nano models.
BUNDLED = Path(__file__).with_name("nano_calibrations.json")


@dataclass(frozen=True)
class Polynomial:
    """From the relative change of a time embedding ("e" or "e0") of an expert ("high" or "low") to that of its output.

    `coefficients` have the highest power first, and were fitted to changes of the embedding within `range`. Raises
    ValueError for anything else.
    """

    expert: str
    signal: str
    coefficients: tuple[float, ...]
    range: tuple[float, float]

    def __post_init__(self) -> None:
        if self.expert not in ("high", "low") or self.signal not in SIGNALS:
            raise ValueError(f"a polynomial of expert {self.expert!r} and signal {self.signal!r}; expected \"high\" or "
                             "\"low\", and \"e\" or \"e0\".")
        _check_numbers("coefficients", self.coefficients)
        if len(self.range) != 2 or not all(map(math.isfinite, self.range)) or not 0 < self.range[0] < self.range[1]:
            raise ValueError(f"a polynomial for changes within {list(self.range)}; expected two numbers above 0, the "
                             "smaller one first.")

    def __call__(self, change: float) -> float:
        """The change that is expected of the output, 0 or more. Outside of the range a polynomial says nothing: there
        the output is taken to change in proportion, as from the range's nearer end."""
        inside = min(max(change, self.range[0]), self.range[1])
        return max(0.0, polynomial(self.coefficients, inside)) * change / inside


@dataclass(frozen=True)
class Calibration:
    """What was measured on one model: ratios of each branch, a number for each step, and polynomials. Empty: not.

    Raises ValueError for ratios that are not above 0, for branches of different lengths, and where nothing is there.
    """

    preset: str
    positive: tuple[float, ...] = ()
    negative: tuple[float, ...] = ()
    polynomials: tuple[Polynomial, ...] = ()

    def __post_init__(self) -> None:
        if not self.positive and not self.polynomials:
            raise ValueError(f"a calibration of {self.preset} with neither ratios nor polynomials; measure it again.")
        if self.negative and len(self.negative) != len(self.positive):
            raise ValueError(f"ratios of {len(self.positive)} steps for the positive and {len(self.negative)} for the "
                             "negative branch; both must be of the same run.")
        for name, ratios in (("positive", self.positive), ("negative", self.negative)):
            if ratios:
                _check_numbers(f"{name} ratios", ratios)
            if any(ratio <= 0 for ratio in ratios):
                raise ValueError(f"the {name} ratios hold {min(ratios)}; magnitudes are above 0. Measure them again.")

    @property
    def is_pair(self) -> bool:
        """Whether it was measured on two experts."""
        return any(one.expert == "high" for one in self.polynomials)

    def check_preset(self, preset: str) -> None:
        """Raise ValueError unless it was measured on a model of this preset."""
        if preset != self.preset:
            raise ValueError(f"the calibration was measured on {self.preset}, and this model is {preset}. Measure this "
                             "one, or use EasyCache, which needs no calibration.")

    def polynomial(self, expert: str, signal: str) -> Polynomial:
        """That of an expert and a signal. Raises ValueError where there is none."""
        for one in self.polynomials:
            if (one.expert, one.signal) == (expert, signal):
                return one
        raise ValueError(f"the calibration of {self.preset} has no polynomial of the {expert}-noise expert and signal "
                         f"{signal!r} (with retention steps it is 'e0', without 'e'). Measure it again, or choose the "
                         "other kind.")

    def ratios(self, branch: str, steps: int) -> tuple[float, ...]:
        """A branch's ratio for each of `steps` steps, the nearest of the measured ones.

        Ratios are taken as they are though a step may then span more or less of the schedule, as the published rule
        has it. Raises ValueError where none were measured.
        """
        own = self.positive if branch.startswith("positive") or not self.negative else self.negative
        if not own:
            raise ValueError(f"the calibration of {self.preset} has no ratios, which MagCache needs. Measure it again, "
                             "or use EasyCache.")
        if steps == 1:
            return own[-1:]
        scale = (len(own) - 1) / (steps - 1)
        # Halves go to the even number, as in numpy's rounding, which the published rule uses.
        return tuple(own[round(index * scale)] for index in range(steps))


def read_calibration(path: str | Path) -> Calibration:
    """The calibration in a file. Raises ValueError for a file that cannot be read or is in another format."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the calibration {path.name} cannot be read ({type(error).__name__}). Give the JSON file "
                         "that the calibration command wrote.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no calibration of the format {FORMAT!r}. Give the JSON file that the "
                         "calibration command wrote.")
    try:
        return parse_calibration(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def parse_calibration(content: dict) -> Calibration:
    """The calibration in the JSON object of a file, its format aside."""
    ratios = content.get("ratios", {})
    polynomials = tuple(
        Polynomial(str(one["expert"]), str(one["signal"]), tuple(one["coefficients"]), tuple(one["range"]))
        for one in content.get("polynomials", ()))
    return Calibration(str(content["preset"]), tuple(ratios.get("positive", ())), tuple(ratios.get("negative", ())),
                       polynomials)


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write a file for `read_calibration`. Raises OSError where that fails."""
    content = {"format": FORMAT, **_content(calibration)}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _content(calibration: Calibration) -> dict[str, object]:
    content: dict[str, object] = {"preset": calibration.preset}
    if calibration.positive:
        content["ratios"] = {"positive": calibration.positive}
        if calibration.negative:
            content["ratios"] = {"positive": calibration.positive, "negative": calibration.negative}
    if calibration.polynomials:
        content["polynomials"] = [asdict(one) for one in calibration.polynomials]
    return content


def write_tables(calibrations: Sequence[Calibration], path: Path) -> None:
    """Write the file that `read_tables` reads."""
    content = {"tables": [_content(calibration) for calibration in calibrations]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@cache
def read_tables(path: Path) -> Mapping[str, Calibration]:
    """The calibrations in a file that comes with the package, by preset."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return MappingProxyType({table.preset: table for table in map(parse_calibration, content["tables"])})


def bundled(preset: str) -> Calibration | None:
    """What was measured on a bundled model, None for others."""
    return read_tables(BUNDLED).get(preset)


def magnitude_ratio(new: Tensor, old: Tensor, chunk: int = 4096) -> tuple[float, float, float]:
    """How what the blocks added, [B, L, C], compares with what they added a step before: mean and standard deviation,
    over tokens, of |new| / |old| (Euclidean norms over C), and the mean of 1 - cosine similarity.

    Computed in float32, `chunk` tokens at a time. Raises ValueError for shapes that differ.
    """
    if new.shape != old.shape or new.ndim != 3:
        raise ValueError(f"residuals of shapes {list(new.shape)} and {list(old.shape)}; expected [batch, tokens, "
                         "channels], and both the same.")
    ratios, distances = [], []
    for part, before in zip(new.split(chunk, 1), old.split(chunk, 1)):
        part, before = part.float(), before.float()
        # The small number is diffusers'; beside real norms it vanishes.
        ratios.append((part.norm(dim=-1) / (before.norm(dim=-1) + 1e-8)).flatten())
        distances.append((1 - F.cosine_similarity(part, before, dim=-1, eps=1e-8)).flatten())
    ratio, distance = torch.cat(ratios), torch.cat(distances)
    return float(ratio.mean()), float(ratio.std()), float(distance.mean())


def fit_coefficients(signal_changes: Sequence[float], output_changes: Sequence[float],
                     degree: int = 4) -> tuple[float, ...]:
    """The polynomial, highest power first, that tells the output's relative change from the time embedding's best.

    Both are relative L1 changes between consecutive steps, of all steps of as many prompts as there are. Least squares
    in float64. Raises ValueError for lists of different lengths, or with fewer different values than coefficients.
    """
    if len(signal_changes) != len(output_changes) or len(set(signal_changes)) <= degree:
        raise ValueError(f"{len(set(signal_changes))} different changes of the time embedding and "
                         f"{len(output_changes)} changes of the output; expected as many of the one as of the other, "
                         f"and more than {degree} different ones. Measure more steps.")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (signal_changes, output_changes))
    powers = x[:, None] ** torch.arange(degree, -1, -1, dtype=torch.float64)
    # Columns of like size: changes are about 0.01, and their fourth powers would be lost beside 1.
    scale = powers.norm(dim=0)
    solution = torch.linalg.lstsq(powers / scale, y[:, None], driver="gelsd").solution[:, 0]
    return tuple((solution / scale).tolist())


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """The value at x in float64, coefficients with the highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _check_numbers(name: str, values: tuple[float, ...]) -> None:
    if not values or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"the {name} are {str(values)[:60]}; expected finite numbers.")
