"""Checkpoint files: opening them lazily, telling what they are, filling modules with them, writing them."""
from .build import build_module, can_run, expected_shapes
from .convert import TARGETS, converted
from .errors import LoadError, human_size
from .inspect import FileReport, describe, format_report
from .load import check_tensors, load_module, open_model, open_vace_module, recognise_file
from .save import save_weights
from .tensor_file import TensorFile, open_weights
from .write import write_quantised

__all__ = [
    "FileReport", "LoadError", "TARGETS", "TensorFile", "build_module", "can_run", "check_tensors", "converted",
    "describe", "expected_shapes", "format_report", "human_size", "load_module", "open_model", "open_vace_module",
    "open_weights", "recognise_file", "save_weights", "write_quantised",
]
