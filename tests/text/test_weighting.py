"""ComfyUI's prompt weights: the notation and its corner cases."""

import pytest

from wan_core.text import parse_weights


@pytest.mark.parametrize(("text", "pieces"), [
    ("", []),
    ("a red circle", [("a red circle", 1.0)]),
    ("a (red:1.2) circle", [("a ", 1.0), ("red", 1.2), (" circle", 1.0)]),
    ("(red:0)", [("red", 0.0)]),
    ("(red:-0.5)", [("red", -0.5)]),
    ("(red: 1.3 )", [("red", 1.3)]),
    ("(red)", [("red", 1.1)]),
    ("((red))", [("red", 1.1 * 1.1)]),
    # A number stands for itself inside parentheses, and is what parentheses inside it multiply.
    ("((red:1.5))", [("red", 1.5)]),
    ("((red) circle:2)", [("red", 2 * 1.1), (" circle", 2.0)]),
    ("(a (red:1.5) circle)", [("a ", 1.1), ("red", 1.5), (" circle", 1.1)]),
    ("(a)(b:2)", [("a", 1.1), ("b", 2.0)]),
    ("time 12:30 (at 12:30)", [("time 12:30 ", 1.0), ("at 12", 30.0)]),
    ("(ratio 16:9:1.2)", [("ratio 16:9", 1.2)]),
    # Without a number, or without text before it, the colon is text.
    ("(red:)", [("red:", 1.1)]),
    ("(red:big)", [("red:big", 1.1)]),
    ("(:1.2)", [(":1.2", 1.1)]),
    ("()", []),
    # A weight that would make embeddings infinite or NaN is text.
    ("(a:nan)", [("a:nan", 1.1)]),
    ("(a:inf)", [("a:inf", 1.1)]),
    ("[a] [[b]]", [("[a] [[b]]", 1.0)]),
    (r"\(a\) (b\):1.2)", [("(a) ", 1.0), ("b)", 1.2)]),
    (r"(a\)", [("(a)", 1.0)]),
    (r"a\b \\(c", [("a\\b \\(c", 1.0)]),
    # Unbalanced parentheses stay as text.
    ("(red:1.2", [("(red:1.2", 1.0)]),
    ("red) circle", [("red) circle", 1.0)]),
    ("a (b (c:1.2) d", [("a ", 1.0), ("(b (c:1.2) d", 1.0)]),
])
def test_notation(text, pieces):
    """Each text is cut into exactly these pieces and weights, ComfyUI's own (but for nan and inf, which it accepts)."""
    parsed = parse_weights(text)
    assert [piece for piece, _ in parsed] == [piece for piece, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


def test_deep_nesting_is_no_error():
    """Nesting far beyond Python's recursion limit is parsed."""
    [(text, weight)] = parse_weights("(" * 1200 + "x" + ")" * 1200)
    assert text == "x" and weight == pytest.approx(1.1 ** 1200)
