"""How strongly an adapter was trained: alpha and rank, from the file's tensors and its metadata.

A LoRA is multiplied by alpha / rank, or by alpha / sqrt(rank) where training was rank-stabilised (Kalajdzievski 2023,
arXiv 2312.03732). Trainers state it in three ways:

- a tensor `.alpha` beside the factors (kohya, musubi, LyCORIS). LyCORIS multiplies it by sqrt(rank) when it trains
  rank-stabilised, so that everybody's alpha / rank is right; its metadata therefore change nothing. Other networks
  that state it in `ss_network_args` store the plain alpha.
- PEFT's configuration as JSON in the metadata (`lora_adapter_metadata`, written by diffusers): `lora_alpha`,
  `alpha_pattern`, `use_rslora`, each with the prefix of its part. The rank is that of the tensors.
- not at all: then alpha is the rank. `ss_network_alpha` without `.alpha` tensors counts as this case: tools that
  convert such files multiply alpha into the weights and keep the metadata.
"""
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import LoadError

_PEFT = "lora_adapter_metadata"
_STATED = ("rs_lora", "rslora", "use_rslora")


@dataclass(frozen=True)
class Scaling:
    """What the metadata say for one expert. `alpha` None: nothing. `patterns`: layers with an alpha of their own."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def scale(self, rank: int, own_alpha: float | None, layer: str) -> float:
        """The factor of an adapter. `own_alpha`: that of its tensor `.alpha`, if any. `layer`: as the file writes it.

        A pattern is the end of a layer's name; it is compared as text, because a file's regular expressions could be
        made to run forever.
        """
        alpha = own_alpha
        if alpha is None:
            alpha = next((value for pattern, value in self.patterns.items()
                          if layer == pattern or layer.endswith(f".{pattern}")), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_scaling(metadata: Mapping[str, str], label: str, *, low_noise: bool = False) -> Scaling:
    """The scaling that a file's metadata state for one expert; `label` is the file's name.

    Raises LoadError for metadata that are no JSON or state an alpha that is no finite number.
    """
    peft = _table(metadata, _PEFT, label)
    prefixes = ("transformer_2.", "") if low_noise else ("transformer.", "")

    def stated(name: str) -> object:
        return next((peft[prefix + name] for prefix in prefixes if prefix + name in peft), None)

    alpha, patterns = stated("lora_alpha"), stated("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoadError(f"{label} has metadata {_PEFT} whose alpha_pattern is no table of layers. {_ADVICE}")
    stabilised = _is_true(stated("use_rslora"))
    if "lycoris" not in metadata.get("ss_network_module", "").lower():
        arguments = _table(metadata, "ss_network_args", label)
        stabilised = stabilised or any(_is_true(arguments.get(name)) for name in _STATED)
    return Scaling(None if alpha is None else _number(alpha, "lora_alpha", label),
                   {str(key): _number(value, f"alpha_pattern {key!r}", label) for key, value in patterns.items()},
                   stabilised)


_ADVICE = "Download the file again, or save it anew without metadata."


def _table(metadata: Mapping[str, str], key: str, label: str) -> dict[str, object]:
    try:
        table = json.loads(metadata.get(key) or "{}")
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{label} has metadata {key} that are not JSON ({type(error).__name__}). {_ADVICE}") from error
    # kohya writes "null" where there are no arguments.
    if table is not None and not isinstance(table, dict):
        raise LoadError(f"{label} has metadata {key} that are no table. {_ADVICE}")
    return table or {}


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() in ("true", "1")


def _number(value: object, what: str, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or value != value:
        raise LoadError(f"{label} has metadata {_PEFT} with {what} {value!r}, which is no usable number. {_ADVICE}")
    return float(value)
