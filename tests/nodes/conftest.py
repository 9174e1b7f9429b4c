"""The pack as ComfyUI imports it, without ComfyUI: under a made-up package name, its modules by relative imports.

Names of the pack's own modules (the nodes' engine among them) come from the `module` fixture: a plain `import wan_core`
would be another copy of the same code.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.small_models import SMALL, write_clip_vision, write_transformer, write_vae
from wan_core.presets import TRANSFORMERS

PACK = Path(__file__).resolve().parent.parent.parent
NAME = str(PACK).replace(".", "_x_") + "_under_test"


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The root module of the pack."""
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module(pack: ModuleType) -> Callable[[str], ModuleType]:
    """Imports a module of the pack by its name inside it, such as "wan_core.models"."""
    return lambda name: importlib.import_module(f"{NAME}.{name}")


@pytest.fixture(scope="session")
def call(pack: ModuleType) -> Callable[..., object]:
    """Runs a node as ComfyUI does: by its id, widgets that are not given at their defaults; returns what it returns."""
    def run(node_id: str, **inputs: object) -> object:
        node = pack.NODE_CLASS_MAPPINGS[node_id]
        return getattr(node(), node.FUNCTION)(**{**defaults(node), **inputs})

    return run


def defaults(node: type) -> dict[str, object]:
    """What the widgets of a new node hold."""
    values = {}
    for name, declared in {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES().get("optional", {})}.items():
        kind, options = declared
        if isinstance(kind, list):
            values[name] = options.get("default", kind[0])
        elif kind in ("INT", "FLOAT", "BOOLEAN", "STRING"):
            values[name] = options.get("default", "")
    return values


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: without ComfyUI the nodes look for models and write their output there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(module, workspace) -> Callable[[str], object]:
    """Makes a model of `tests.small_models.SMALL` with random weights and the nano settings."""
    def make(name: str) -> object:
        models, presets = module("wan_core.models"), module("wan_core.presets")
        part = models.Part.open(write_transformer(workspace / f"{name}.safetensors", spec=SMALL[name]), "transformer")
        preset = replace(presets.PRESETS["nano_t2v"], title=f"Small {name.upper()}",
                         vae="nano_vae22" if name == "ti2v" else "nano_vae")
        return models.Model(part, part, preset, module("wan_core.memory").OneAtATime("cpu"))

    return make


@pytest.fixture
def listed(call, workspace) -> Callable[[str], object]:
    """What the loader nodes give for files with random weights: "model" (nano I2V), "clip_vision", "vae22"."""
    def load(name: str) -> object:
        node, key, folder, write = {
            "model": ("WanCoreModelLoader", "model", "diffusion_models",
                      lambda path: write_transformer(path, spec=TRANSFORMERS["nano_i2v"])),
            "clip_vision": ("WanCoreCLIPVisionLoader", "clip_vision", "clip_vision", write_clip_vision),
            "vae22": ("WanCoreVAELoader", "vae", "vae", lambda path: write_vae(path, name="nano_vae22")),
        }[name]
        path = workspace / "models" / folder / "small.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return call(node, **{key: path.name})[0]

    return load


@pytest.fixture(scope="session")
def nano(call) -> dict[str, object]:
    """What the loader nodes give for the bundled models, and two encoded prompts."""
    clip, = call("WanCoreTextEncoderLoader")
    positive, negative = call("WanCoreTextEncode", clip=clip, positive="a red circle moving left")
    return {"model": call("WanCoreModelLoader")[0], "pair": call("WanCoreExpertPairLoader")[0], "clip": clip,
            "vae": call("WanCoreVAELoader")[0], "positive": positive, "negative": negative}
