"""Looks names up in a table of patterns in which `{}` stands for a number."""
from collections.abc import Callable, Iterable, Mapping


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """The name that `table` has for `name` or, where it has none, for all of it but the last part, which is kept.

    So that one row serves a layer's weight, its bias and whatever else a packager puts beside them. `{}` in a key
    stands for a number between dots, and each `{}` of the value for one of them in turn. None where there is no row.
    """
    stem, _, leaf = name.rpartition(".")
    whole = _look_up(name, table)
    if whole is not None or not stem:
        return whole
    part = _look_up(stem, table)
    return None if part is None else f"{part}.{leaf}"


def _look_up(name: str, table: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    # Numbers of blocks come before those that are part of a layer's name, as in `to_out.0`.
    for count in range(len(numbers) + 1):
        found = table.get(".".join(parts))
        if found is not None:
            return found.format(*(name.split(".")[index] for index in numbers[:count]))
        if count < len(numbers):
            parts[numbers[count]] = "{}"
    return None


def renaming(names: Iterable[str], translated: Callable[[str], str | None]) -> dict[str, str]:
    """Maps what `translated` gives for each of `names`, or the name itself where that is None, to the name.

    Raises ValueError, with a phrase that completes "the file ...", where two of them become the same.
    """
    mapping: dict[str, str] = {}
    for name in names:
        new = translated(name) or name
        if new in mapping:
            raise ValueError(f"holds {new!r} twice, as {mapping[new]!r} and as {name!r}: two models were mixed")
        mapping[new] = name
    return mapping
