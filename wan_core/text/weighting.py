"""Prompt weights in ComfyUI's notation: "a (red:1.3) circle on ((grey))".

- ``(text:1.3)`` sets the weight 1.3, whatever surrounds it;
- ``(text)`` multiplies the surrounding weight by 1.1, so ``((text))`` is 1.21;
- ``\\(`` and ``\\)`` are literal parentheses; square brackets mean nothing;
- a parenthesis that is never closed is ordinary text.

Behaviour reference: ComfyUI's documentation and ``comfy/sd1_clip.py``, so that a prompt means the same in both.
"""

import math
import re
from collections.abc import Iterator

GROUP_FACTOR = 1.1

# Escaped parentheses travel through the parser as two code points that Unicode reserves for such internal use.
_ESCAPES = {r"\(": "\ufdd0", r"\)": "\ufdd1"}
_LITERALS = str.maketrans({"\ufdd0": "(", "\ufdd1": ")"})


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight) pieces in order of appearance.

    Nothing is stripped from the pieces. A prompt without parentheses gives one piece of weight 1, an empty one none.
    """
    for escape, stand_in in _ESCAPES.items():
        text = text.replace(escape, stand_in)
    pieces = []
    # An explicit stack and not recursion: nesting depth is the user's choice.
    stack = [(_sections(text), 1.0)]
    while stack:
        sections, weight = stack[-1]
        section = next(sections, None)
        if section is None:
            stack.pop()
        elif len(section) >= 2 and section[0] == "(" and section[-1] == ")":
            inner, inner_weight = _enter(section, weight)
            stack.append((_sections(inner), inner_weight))
        else:
            pieces.append((section.translate(_LITERALS), weight))
    return pieces


def _sections(text: str) -> Iterator[str]:
    """Cut a text into its outermost parenthesised groups and what stands between them."""
    depth = start = 0
    for match in re.finditer(r"[()]", text):
        if match[0] == "(":
            if depth == 0 and match.start() > start:
                yield text[start:match.start()]
                start = match.start()
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                yield text[start:match.end()]
                start = match.end()
    if start < len(text):
        yield text[start:]


def _enter(group: str, weight: float) -> tuple[str, float]:
    """Inner text and weight of a parenthesised group standing in text of the given weight."""
    inner = group[1:-1]
    text, _, number = inner.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if text and math.isfinite(value):
        return text, value
    return inner, weight * GROUP_FACTOR
