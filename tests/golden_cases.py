"""Golden cases: what the official Wan code computed for small random weights, one safetensors file a case.

They lie in tests/golden, or in the folder that the environment variable WAN_GOLDEN_DIR names; its README describes
each. A missing case is a failure, never a skip.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """config: the official constructor's arguments and notes. The rest: tensors in fp32 (integers as stored) under
    their names without the prefix `weights.`, `in.` or `out.`."""

    config: dict
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def golden_dir() -> Path:
    return Path(os.environ.get("WAN_GOLDEN_DIR") or Path(__file__).parent / "golden")


def load_case(name: str) -> Case:
    """Read case `name`. Raises FileNotFoundError where the folder has no such case."""
    path = golden_dir() / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"golden case {name!r} is missing: {path}; set WAN_GOLDEN_DIR to a folder with it")
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "in": {}, "out": {}}
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        for key in file.keys():
            part, _, rest = key.partition(".")
            tensor = file.get_tensor(key)
            parts[part][rest] = tensor.float() if tensor.is_floating_point() else tensor
    return Case(config, parts["weights"], parts["in"], parts["out"])
