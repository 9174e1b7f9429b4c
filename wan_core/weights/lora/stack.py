"""LoRAs as options of a model: which file, how strong for which expert and noise levels, and putting them on a module.

The strengths that hold are set anew for each step, by whoever is about to run the module. So copies of a model with
other LoRAs, or none, can share one placed module: nobody sees what another has left there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .adapters import Adapter
from .attach import Attachment
from .file import LoraFile, Matched
from .filters import parse_filter
from .keys import Target


@dataclass(frozen=True, eq=False)
class Lora:
    """A file matched with the experts of a model ('high' and 'low'; a single model is 'low').

    `strengths` are those for each expert. It holds at noise levels (sigma) from `start` down to `end`, both included,
    and for the blocks that `blocks` names (see `filters`). Raises ValueError for a range that is none, or a filter
    that cannot be read or leaves nothing.
    """

    file: LoraFile
    matched: Mapping[str, Matched]
    strengths: Mapping[str, float]
    start: float = 1.0
    end: float = 0.0
    blocks: str = ""
    adapters: Mapping[str, Mapping[Target, Adapter]] = field(init=False, repr=False)
    # Equal for LoRAs that put the same tensors on a module: the file as it lay on the disk, and the blocks.
    key: tuple[object, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start <= 1:
            raise ValueError(f"a LoRA is to hold from sigma {self.start} to {self.end}; expected 1 >= start >= end "
                             ">= 0.")
        wanted = parse_filter(self.blocks)
        kept = {expert: {target: adapter for target, adapter in matched.adapters.items() if wanted(target)}
                for expert, matched in self.matched.items()}
        if not any(kept.values()):
            raise ValueError(f"the block filter {self.blocks!r} leaves nothing of {self.file.path.name}.")
        object.__setattr__(self, "adapters", kept)
        state = self.file.path.stat()
        key = str(self.file.path.resolve()), state.st_mtime_ns, state.st_size, self.blocks
        object.__setattr__(self, "key", key)

    def strength_at(self, expert: str, sigma: float) -> float:
        """How strong it is for an expert at a noise level."""
        return self.strengths[expert] if self.start >= sigma >= self.end else 0.0


# Under this name a module keeps what is attached to it; it is no parameter and no buffer.
_ATTACHED = "_attached_loras"


def adapt(module: nn.Module, loras: tuple[Lora, ...], expert: str, sigma: float) -> bool:
    """Put exactly these LoRAs on `module`, the expert of that name, with their strengths at `sigma`.

    Where they are on it already only strengths change. Returns whether tensors were added, taken away or replaced.
    """
    # One that is off for the whole run is left away: it costs nothing, in compiled code neither.
    loras = tuple(lora for lora in loras if lora.strengths[expert])
    keys = tuple(lora.key for lora in loras)
    held, attachment = module.__dict__.get(_ATTACHED, ((), None))
    changed = held != keys
    if changed:
        if attachment:
            attachment.detach()
        attachment = Attachment(module, [lora.adapters[expert] for lora in loras]) if loras else None
        module.__dict__[_ATTACHED] = keys, attachment
    return bool(attachment and attachment.set([lora.strength_at(expert, sigma) for lora in loras])) or changed
