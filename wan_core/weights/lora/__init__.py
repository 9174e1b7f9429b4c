"""LoRA files of every trainer, read into one neutral form: adapters of official tensors."""
from .adapters import Adapter, Additive, Delta, DoRA, LoHa, LoKr, LowRank, Replacement
from .file import Entry, LoraFile, Matched, Skipped, open_lora
from .filters import BlockFilter, parse_filter
from .keys import Target
from .merge import fold
from .report import LoraReport, describe_lora, format_lora, format_match
from .stack import Lora, adapt

__all__ = [
    "Adapter", "Additive", "BlockFilter", "Delta", "DoRA", "Entry", "LoHa", "LoKr", "Lora", "LoraFile", "LoraReport",
    "LowRank", "Matched", "Replacement", "Skipped", "Target", "adapt", "describe_lora", "fold", "format_lora",
    "format_match", "open_lora", "parse_filter",
]
