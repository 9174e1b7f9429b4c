"""The one error of everything that reads checkpoints, and how it writes numbers."""


class LoadError(ValueError):
    """A checkpoint cannot be used. The text names the file, what was found in it and what to do."""


def human_size(count: int) -> str:
    """Bytes in decimal units, as download pages and file managers state them: 28577000000 -> '28.58 GB'."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def first_few(names: list[str]) -> str:
    """'a, b, c and 7 more': enough to recognise the pattern, short enough for one message."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
