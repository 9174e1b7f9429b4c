"""Prompt cleaning: the official steps, with and without ftfy."""

import sys

import pytest

from wan_core.text import clean_prompt


@pytest.mark.parametrize(("text", "cleaned"), [
    ("", ""), ("   \n ", ""), ("a red circle", "a red circle"),
    ("  a \t red\r\n\n circle ", "a red circle"), ("a\u00a0red\u3000circle", "a red circle"),
    ("cats &amp; dogs", "cats & dogs"), ("cats &amp;amp; dogs", "cats & dogs"),
    ("&lt;b&gt;&nbsp;x&#39;s", "<b> x's"), ("&nbsp; a", "a"), ("日本語、 赤い円", "日本語、 赤い円")])
@pytest.mark.parametrize("with_ftfy", [True, False])
def test_entities_and_spaces(monkeypatch, text, cleaned, with_ftfy):
    """Entities are resolved twice and white space is collapsed, whether or not ftfy is installed."""
    if not with_ftfy:
        monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(text) == cleaned


@pytest.mark.parametrize("with_ftfy", [True, False])
def test_entities_are_resolved_only_twice(monkeypatch, with_ftfy):
    """A third level of escaping stays (in text with a tag: where there is none, ftfy resolves entities, too)."""
    if not with_ftfy:
        monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt("<b> cats &amp;amp;amp; dogs") == "<b> cats &amp; dogs"


def test_ftfy_is_used_where_installed(monkeypatch):
    """Mojibake and curly quotes are repaired with ftfy and, as documented, kept without it."""
    text = "a cafÃ© “scene”"
    assert clean_prompt(text) == 'a café "scene"'
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(text) == text


def test_cleaning_is_for_strings():
    """Anything but a string is a ValueError."""
    with pytest.raises(ValueError, match="NoneType"):
        clean_prompt(None)
