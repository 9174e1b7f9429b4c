"""Says what a checkpoint file is and whether it is complete, without reading its weights."""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..presets import Recognition, strip_prefix
from .build import can_run, expected_shapes
from .errors import first_few, human_size
from .load import EXTRAS, compare_shapes, recognise_file, unsupported_types
from .tensor_file import open_weights


@dataclass(frozen=True)
class FileReport:
    """What `describe` finds in a file.

    `missing`, `unexpected` and `misshapen` are tensor names against the recognised architecture; they are empty and
    `checked` is False where it is unknown or not built yet, and then `remark` says so. `dtypes` counts tensors, most
    frequent first; `parameters` counts numbers in all of them but the extras.
    """

    name: str
    format: str
    nbytes: int
    prefix: str
    recognition: Recognition
    tensors: int
    parameters: int
    dtypes: tuple[tuple[str, int], ...]
    metadata_keys: tuple[str, ...]
    has_spiece_model: bool
    checked: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    remark: str


def describe(path: str | Path) -> FileReport:
    """Opens `path` and reports on it; raises LoadError where `open_weights` does."""
    with open_weights(path) as original:
        prefix = strip_prefix(original.names)[0]
        file, recognition = recognise_file(original)
    kinds = {name: file.quantised.get(name, str(dtype).removeprefix("torch.")) for name, dtype in file.dtypes().items()}
    shapes = {name: shape for name, shape in file.shapes().items() if not name.startswith(EXTRAS)}
    checked, differences, remark = False, ([], [], []), ""
    if recognition.spec is not None and not can_run(recognition.spec):
        remark = "This version recognises the architecture and cannot run it yet."
    elif recognition.spec is not None:
        try:
            differences, checked = compare_shapes(expected_shapes(recognition.spec), shapes), True
        except ValueError as error:
            remark = str(error)
    odd = unsupported_types(dtype for name, dtype in file.dtypes().items() if name in shapes)
    if odd:
        remark = f"{remark} {odd[0].upper()}{odd[1:]}.".strip()
    counts = Counter(kinds.values())
    return FileReport(
        name=file.path.name, format=file.format, nbytes=file.nbytes, prefix=prefix, recognition=recognition,
        tensors=len(file), parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=tuple(counts.most_common()), metadata_keys=tuple(sorted(file.metadata)),
        has_spiece_model="spiece_model" in file, checked=checked, missing=tuple(differences[0]),
        unexpected=tuple(differences[1]), misshapen=tuple(differences[2]), remark=remark)


def format_report(report: FileReport) -> str:
    """The report as lines of text for a terminal."""
    lines = [
        f"{report.name}: {report.recognition.reason}",
        f"  kind        {report.recognition.kind.replace('_', ' ')}",
        f"  format      {report.format}, {human_size(report.nbytes)}"
        + (f", prefix {report.prefix!r}" if report.prefix else "")
        + (f", {report.recognition.dialect} key names" if report.recognition.dialect != "official" else ""),
        f"  tensors     {report.tensors} ({', '.join(f'{count} {dtype}' for dtype, count in report.dtypes)})",
        f"  parameters  {report.parameters:,}",
    ]
    if report.recognition.names:
        lines.insert(2, f"  presets     {', '.join(report.recognition.names)}")
    if report.has_spiece_model:
        lines.append("  tokenizer   inside (spiece_model)")
    if report.metadata_keys:
        lines.append(f"  metadata    {', '.join(report.metadata_keys)}")
    for what in ("missing", "unexpected", "misshapen"):
        names = getattr(report, what)
        if names:
            lines.append(f"  {what:<11} {len(names)}: {first_few(list(names))}")
    if report.checked and not report.missing + report.unexpected + report.misshapen:
        lines.append("  complete    every tensor is there and has the right shape")
    if report.remark:
        lines.append(f"  note        {report.remark}")
    return "\n".join(lines)
