"""One opened checkpoint: which file, and which architecture it holds."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..memory import RESIDENT, Layout, below
from ..memory.layout import block_names, by_block
from ..presets import CLIPVisionSpec, TextEncoderSpec, TinyVAESpec, TransformerSpec, VAESpec
from ..weights import TensorFile, build_module, converted, human_size, load_module, open_model

# Tensors that stay in the dtype of the file: they are small, and computed in float32 whatever the rest runs in.
_FLOAT32_ISLANDS = ("time_embedding.", "time_projection.", "head.", "norm", "modulation")

# Of these a few rows are read; they stay on the host when blocks do.
_TABLES = ("token_embedding",)


@dataclass(frozen=True, eq=False)
class Part:
    """One checkpoint: the opened file and the architecture it holds."""

    file: TensorFile
    spec: TransformerSpec | VAESpec | TinyVAESpec | TextEncoderSpec | CLIPVisionSpec
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path, kind: str) -> "Part":
        """Open a 'transformer', 'vae', 'text_encoder' or 'clip_vision'; reads no weights.

        Raises LoadError where the file is something else.
        """
        file, recognition = open_model(path, kind)
        return cls(file, recognition.spec, recognition.names)

    @property
    def label(self) -> str:
        return self.file.path.name

    @property
    def fits(self) -> str:
        """The presets or table entries of this architecture, as words."""
        return ", ".join(self.names) or "no released model"

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that most weights of the file have; a tokenizer's bytes are no weights."""
        shapes, counts = self.file.shapes(), Counter()
        for name, dtype in self.file.dtypes().items():
            if dtype.is_floating_point:
                counts[dtype] += math.prod(shapes[name])
        return counts.most_common(1)[0][0] if counts else torch.float32

    @property
    def formats(self) -> str:
        """What the numbers of its matrices are stored as, most of them first: 'Q4_K 82 %, Q6_K 16 %, F32 2 %'."""
        counts = Counter()
        for name, shape in self.file.shapes().items():
            if len(shape) > 1 and (name in self.file.quantised or self.file.dtypes()[name].is_floating_point):
                kind = self.file.quantised.get(name, str(self.file.dtypes()[name]).removeprefix("torch."))
                counts[kind] += math.prod(shape)
        total = counts.total()
        return ", ".join(f"{kind} {100 * count / total:.0f} %" if len(counts) > 1 else kind
                         for kind, count in counts.most_common() if count >= 0.005 * total)

    def summary(self) -> str:
        """One line for people: file, formats, size."""
        return f"{self.label}: {self.formats}, {human_size(self.file.nbytes)}"

    def quantised(self, form: str) -> "Part":
        """A copy whose matrices are quantised when they are read; see `wan_core.weights.converted`."""
        return replace(self, file=converted(self.file, form))

    def build(self, device: torch.device, dtype: torch.dtype, layout: Layout = RESIDENT) -> nn.Module:
        """The module on `device`, its swapped blocks on the host, computing in `dtype`; its weights are the file's."""
        module = self.hollow()
        swapped = layout.names(module)
        return load_module(module, self.file, device=device, on_host=below((*swapped, *_TABLES) if swapped else ()),
                           dtype_for=lambda name, stored: self._kept_in(name, stored, dtype)).eval()

    def hollow(self) -> nn.Module:
        """The module on the meta device: shapes and names, no numbers."""
        return build_module(self.spec)

    @cached_property
    def blocks(self) -> list[str]:
        """Names of the blocks of its module, which can come and go by themselves."""
        return block_names(self.hollow())

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the weights of the module that `build` makes."""
        return sum(self.sizes(dtype).values())

    def resident_size(self, dtype: torch.dtype, layout: Layout) -> int:
        """Bytes of its weights on the device: those that stay there, and the slots of those that come and go."""
        sizes = {name: nbytes for name, nbytes in self.sizes(dtype).items()
                 if not layout.swapped or not name.startswith(_TABLES)}
        blocks, others = by_block(sizes, self.blocks)
        return others + layout.on_device(blocks)

    def sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of each tensor of the module that `build` makes."""
        stored, shapes = self.file.dtypes(), self.file.shapes()
        return {name: self.file.size(name) if name in self.file.quantised else
                math.prod(shapes[name]) * self._kept_in(name, stored[name], dtype).itemsize for name in shapes}

    def _kept_in(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """The type of a tensor in a module that computes in `dtype`; for a quantised one, that of its numbers."""
        island = isinstance(self.spec, TransformerSpec) and any(part in name for part in _FLOAT32_ISLANDS)
        # A text encoder computes in float32 from weights kept as they are stored.
        if not island and not isinstance(self.spec, TextEncoderSpec):
            return dtype
        return torch.float32 if name in self.file.quantised else stored
