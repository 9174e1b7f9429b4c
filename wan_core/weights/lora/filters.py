"""Block filters: a line of text that says which blocks and kinds of layers of a LoRA are used.

Terms are separated by commas. A number or a range names blocks, a word a kind of layer, and '!' in front excludes:

    '0-9,15'         these blocks and nothing outside of them
    '!30-39'         everything but these blocks
    'self_attn,ffn'  these layers in every block
    '0-19,!ffn'      the first twenty blocks without their feed-forward layers

Blocks are chosen among the blocks named, layers among the kinds named, and both must hold; exclusions come last. VACE
blocks are no numbered blocks here but the kind 'vace', since each of them works on a block that has another number.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

from .keys import Target

# Kind -> parts of module names.
KINDS = {
    "self_attn": r"\.self_attn\.",
    "cross_attn": r"\.cross_attn\.",
    "ffn": r"\.ffn\.",
    "norm": r"\.norm(?:3|_q|_k|_k_img)\.",
    "modulation": r"\.modulation$",
    "embedding": r"^(?:patch_embedding|text_embedding|time_embedding|time_projection|img_emb)\.",
    "head": r"^head\.",
    "vace": r"^vace_",
}

_BLOCK = re.compile(r"blocks\.([0-9]+)\.")
_RANGE = re.compile(r"([0-9]{1,4})(?: *- *([0-9]{1,4}))?")


@dataclass(frozen=True)
class BlockFilter:
    """Ranges (first, last) and kinds that are wanted and not wanted; call it with a target."""

    blocks: tuple[tuple[int, int], ...] = ()
    kinds: tuple[str, ...] = ()
    no_blocks: tuple[tuple[int, int], ...] = ()
    no_kinds: tuple[str, ...] = ()

    def __call__(self, target: Target) -> bool:
        """Whether an adapter of `target` is used."""
        match = _BLOCK.match(target.name)
        number = int(match[1]) if match else None

        def among(ranges: tuple[tuple[int, int], ...]) -> bool:
            return number is not None and any(first <= number <= last for first, last in ranges)

        def of(kinds: tuple[str, ...]) -> bool:
            return any(re.search(KINDS[kind], target.name) for kind in kinds)

        return ((not self.blocks or among(self.blocks)) and (not self.kinds or of(self.kinds))
                and not among(self.no_blocks) and not of(self.no_kinds))


def parse_filter(text: str) -> Callable[[Target], bool]:
    """The filter that `text` describes; an empty one lets everything through. Raises ValueError for what it is not."""
    terms = [term.strip() for term in text.split(",")] if text.strip() else []
    found: dict[bool, tuple[list, list]] = {False: ([], []), True: ([], [])}
    for term in terms:
        excluded, word = term.startswith("!"), term.removeprefix("!").strip()
        blocks, kinds = found[excluded]
        if word in KINDS:
            kinds.append(word)
        elif match := _RANGE.fullmatch(word):
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last:
                raise ValueError(f"the block filter {text!r} has the range {word!r}, which ends before it begins; "
                                 f"write {last}-{first}")
            blocks.append((first, last))
        else:
            raise ValueError(f"the block filter {text!r} has the term {term!r}; terms are block numbers (7), ranges "
                             f"(0-9) and the kinds {', '.join(KINDS)}, each with '!' in front to leave it out, "
                             "separated by commas, for example '0-9,15' or '!30-39,self_attn'")
    return BlockFilter(*map(tuple, (*found[False], *found[True])))
