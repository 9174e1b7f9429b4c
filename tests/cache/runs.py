"""Runs for tests of the step caches."""

from wan_core.cache import RunSteps

BOTH = ("positive", "negative")


def run_of(steps: int, preset: str = "wan21_t2v_14b", high: int = 0, **changes: object) -> RunSteps:
    """`steps` evenly spaced steps with both branches, the first `high` of them the high-noise expert's."""
    settings = {"preset": preset, "sigmas": tuple(1 - index / steps for index in range(steps)),
                "experts": ("high",) * high + ("low",) * (steps - high), "branches": (BOTH,) * steps}
    return RunSteps(**{**settings, **changes})


def steps_in(text: str) -> tuple[int, ...]:
    """'8-10 12' -> (8, 9, 10, 12)."""
    ends = [[int(end) for end in part.split("-")] for part in text.split()]
    return tuple(index for first, *last in ends for index in range(first, (last or [first])[0] + 1))


def where(plan: tuple[bool, ...]) -> tuple[int, ...]:
    """The steps at which a plan reuses."""
    return tuple(index for index, reuse in enumerate(plan) if reuse)
