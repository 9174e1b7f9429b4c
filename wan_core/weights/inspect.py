"""Says what a checkpoint file is and whether it is complete, without reading its weights."""
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..presets import Recognition, strip_prefix
from .build import can_run, expected_shapes
from .errors import LoadError, first_few, human_size
from .layers import LAYER_KINDS, layer_kind
from .load import EXTRAS, compare_shapes, recognise_file, unsupported_types
from .lora import LoraReport, describe_lora, format_lora
from .tensor_file import TensorFile, open_weights


@dataclass(frozen=True)
class FileReport:
    """What `describe` finds in a file.

    `missing`, `unexpected` and `misshapen` are tensor names against the recognised architecture; they are empty and
    `checked` is False where it is unknown or not built yet, and then `remark` says so. `dtypes` counts tensors, most
    frequent first, and `layers` does so for each kind of layer of a model, by its official name; `parameters` counts
    numbers in all of them but the extras. `tokenizer` says as what the file holds one, '' if it does not. `lora` is
    what a LoRA file holds, where it can be read as one.
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
    tokenizer: str
    checked: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    remark: str
    layers: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    lora: LoraReport | None = None

    @property
    def complete(self) -> bool:
        """Whether the file fills its model; false where that could not be checked."""
        return self.checked and not self.missing + self.unexpected + self.misshapen


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
    counts, layers, lora = Counter(kinds.values()), {}, None
    if recognition.kind == "lora":
        try:
            lora = describe_lora(path)
        except LoadError as error:
            remark = str(error)
    elif recognition.spec is not None or recognition.kind == "vace_module":
        for name in shapes:
            layers.setdefault(layer_kind(name), Counter())[kinds[name]] += 1
    return FileReport(
        name=file.path.name, format=file.format, nbytes=file.nbytes, prefix=prefix, recognition=recognition,
        tensors=len(file), parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=tuple(counts.most_common()), metadata_keys=tuple(sorted(file.metadata)),
        tokenizer=_tokenizer(file), checked=checked, missing=tuple(differences[0]),
        unexpected=tuple(differences[1]), misshapen=tuple(differences[2]), remark=remark,
        layers=tuple((kind, tuple(layers[kind].most_common())) for kind in LAYER_KINDS if kind in layers), lora=lora)


def format_report(report: FileReport, memory: Mapping[str, int] | None = None) -> str:
    """The report as lines of text for a terminal, with the memory (bytes) that choices of weight formats need."""
    lines = [
        f"{report.name}: {report.recognition.reason}",
        f"  kind        {report.recognition.kind.replace('_', ' ')}",
        f"  format      {report.format}, {human_size(report.nbytes)}"
        + (f", prefix {report.prefix!r}" if report.prefix else "")
        + (f", {report.recognition.dialect} key names" if report.recognition.dialect != "official" else ""),
        f"  tensors     {report.tensors} ({_counted(report.dtypes)})",
        f"  parameters  {report.parameters:,}",
    ]
    if report.recognition.names:
        lines.insert(2, f"  presets     {', '.join(report.recognition.names)}")
    if report.tokenizer:
        lines.append(f"  tokenizer   inside ({report.tokenizer})")
    if report.metadata_keys:
        lines.append(f"  metadata    {', '.join(report.metadata_keys)}")
    for what in ("missing", "unexpected", "misshapen"):
        names = getattr(report, what)
        if names:
            lines.append(f"  {what:<11} {len(names)}: {first_few(list(names))}")
    if report.complete:
        lines.append("  complete    every tensor is there and has the right shape")
    if report.remark:
        lines.append(f"  note        {report.remark}")
    lines += format_lora(report.lora) if report.lora else []
    if report.layers:
        lines += ["  layers"] + [f"    {kind:<15} {_counted(formats)}" for kind, formats in report.layers]
    if memory:
        lines += ["  memory of the weights on a GPU"]
        lines += [f"    {choice:<15} {human_size(size)}" for choice, size in memory.items()]
    return "\n".join(lines)


def _tokenizer(file: TensorFile) -> str:
    if "spiece_model" in file:
        return "spiece_model"
    pieces = file.header_values.get("tokenizer.ggml.tokens")
    return f"vocabulary of {len(pieces):,} pieces" if isinstance(pieces, list) else ""


def _counted(counts: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts)
