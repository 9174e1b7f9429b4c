"""Checkpoint files: opening them lazily, telling what they are, filling modules with them, writing them."""
from .build import build_module, can_run, expected_shapes
from .errors import LoadError
from .inspect import FileReport, describe, format_report
from .load import check_tensors, load_module, open_model, open_vace_module, recognise_file
from .save import save_weights
from .tensor_file import TensorFile, open_weights

__all__ = [
    "FileReport", "LoadError", "TensorFile", "build_module", "can_run", "check_tensors", "describe",
    "expected_shapes", "format_report", "load_module", "open_model", "open_vace_module", "open_weights",
    "recognise_file", "save_weights",
]
