"""LoRAs in words: what a file holds, and what a model uses of it."""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...presets import TRANSFORMERS, TransformerSpec
from ..errors import first_few
from ..layers import layer_kind
from .adapters import Adapter, Delta, DoRA, LoHa, LoKr, LowRank, Replacement
from .file import LoraFile, open_lora, size_of, size_phrase
from .stack import Lora

_KINDS = {LowRank: "LoRA", LoHa: "LoHa", LoKr: "LoKr", Delta: "full difference", Replacement: "replacement"}

# Reasons that a report has room for: a LoRA of another size has one for every layer.
_MOST_REASONS = 8


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA file holds, without a model.

    `kinds`, `ranks` and `layers` count adapters by kind ('LoRA', 'DoRA of LoRA'), by rank (of those that have one) and
    by the layers that they are for; `width` and `blocks` are those of the model that they fit (None: cannot be told),
    `fits` the architectures that have all of it. `experts` is that of `LoraFile`.
    """

    kinds: tuple[tuple[str, int], ...]
    ranks: tuple[tuple[int, int], ...]
    layers: tuple[tuple[str, int], ...]
    width: int | None
    blocks: int
    fits: tuple[str, ...]
    experts: tuple[str, ...]
    unknown: tuple[str, ...]


def describe_lora(path: str | Path) -> LoraReport:
    """Opens a LoRA and reports on it; reads no factors. Raises LoadError where `open_lora` does."""
    file = open_lora(path)
    ranks = Counter(rank for entry in file.entries if (rank := _rank(entry.adapter)) is not None)
    shapes = {entry.target.name: entry.adapter.shape for entry in file.entries}
    width, blocks = size_of(shapes)
    return LoraReport(
        kinds=tuple(Counter(_kind(entry.adapter) for entry in file.entries).most_common()),
        ranks=tuple(sorted(ranks.items())),
        layers=tuple(Counter(layer_kind(entry.target.name) for entry in file.entries).most_common()),
        width=width, blocks=blocks, fits=tuple(_fitting(file, width, blocks)), experts=file.experts,
        unknown=file.unknown)


def format_lora(report: LoraReport) -> list[str]:
    """The report as lines for a terminal."""
    made_for = size_phrase((report.width, report.blocks))
    lines = [f"  adapters    {_counted(report.kinds)}",
             f"  layers      {_counted(report.layers)}",
             f"  made for    a model {made_for}{f': {first_few(list(report.fits))}' if report.fits else ''}",
             f"  experts     {'high and low noise inside' if report.experts != ('both',) else 'one set of adapters'}"]
    if report.ranks:
        lines.insert(1, f"  ranks       {', '.join(f'{rank} ({count})' for rank, count in report.ranks[:12])}"
                        f"{' ...' if len(report.ranks) > 12 else ''}")
    if report.unknown:
        lines.append(f"  unknown     {len(report.unknown)}: {first_few(list(report.unknown))}")
    return lines


def format_match(lora: Lora) -> str:
    """What a model uses of a LoRA, as lines of text: matched adapters and strengths, then what is left out and why."""
    parts = []
    for expert, matched in lora.matched.items():
        count = sum(entry.expert in ("both", expert) for entry in lora.file.entries)
        noise = f"{expert} noise " if len(lora.matched) > 1 else ""
        used = f", {len(lora.adapters[expert])} of them in {lora.blocks!r}" if lora.blocks.strip() else ""
        parts.append(f"{noise}{len(matched.adapters)} of {count} adapters matched{used}, "
                     f"strength {lora.strengths[expert]:g}")
    held = "" if (lora.start, lora.end) == (1, 0) else f"; from sigma {lora.start:g} to {lora.end:g}"
    lines = [f"{lora.file.path.name}: {'; '.join(parts)}{held}"]
    # What both experts leave out for the same reason is said once.
    reasons: dict[str, set[str]] = {}
    for matched in lora.matched.values():
        for skipped in matched.skipped:
            reasons.setdefault(skipped.reason, set()).update(skipped.keys)
    unknown = dict.fromkeys(key for matched in lora.matched.values() for key in matched.unknown)
    lines += [f"  skipped {len(keys)} keys: {reason}" for reason, keys in list(reasons.items())[:_MOST_REASONS]]
    if len(reasons) > _MOST_REASONS:
        lines.append(f"  and others, for {len(reasons) - _MOST_REASONS} more reasons")
    if unknown:
        lines.append(f"  unknown {len(unknown)} keys: {first_few(list(unknown))}")
    return "\n".join(lines)


def _kind(adapter: Adapter) -> str:
    return f"DoRA of {_kind(adapter.inner)}" if isinstance(adapter, DoRA) else _KINDS[type(adapter)]


def _rank(adapter: Adapter) -> int | None:
    match adapter:
        case DoRA():
            return _rank(adapter.inner)
        case LowRank():
            return adapter.down.shape[0]
        case LoHa():
            return adapter.first[1].shape[0]
        case LoKr(right=(_, factor)) | LoKr(left=(_, factor)):
            return factor.shape[0]
    return None


def _fitting(file: LoraFile, width: int | None, blocks: int) -> list[str]:
    """Names of architectures of that width with the blocks and branches that the file's adapters are for."""
    names = [entry.target.name for entry in file.entries]
    pictures = any(".k_img." in name or ".v_img." in name or name.startswith("img_emb.") for name in names)
    vace = any(name.startswith("vace_") for name in names)

    def suits(spec: TransformerSpec) -> bool:
        return (spec.dim == width and spec.num_layers >= blocks and (not pictures or bool(spec.image_dim))
                and (not vace or bool(spec.vace_layers)))

    return [name for name, spec in TRANSFORMERS.items() if suits(spec)]


def _counted(counts: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts)
