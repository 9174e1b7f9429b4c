"""Prompt cleaning: the 'whitespace' mode of the official Wan tokenizer.

Mis-decoded text is repaired (ftfy), HTML entities are resolved twice (web captions are often escaped twice), and runs
of white space become one space. ftfy is used where it is installed and not required: without it mojibake ("cafÃ©"),
curly quotes, ligatures, full-width letters and control characters stay as typed. The tokenizer's own NFKC
normalisation still folds the last three kinds; mojibake and curly quotes give other tokens than the official code's.
"""

import html


def clean_prompt(text: str) -> str:
    """Clean one prompt as the official code does. Raises ValueError if it is not a string."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt is {type(text).__name__}, expected a string")
    try:
        from ftfy import fix_text
    except ImportError:
        pass
    else:
        text = fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())
