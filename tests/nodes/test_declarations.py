"""What saved workflows and the page rely on: ids, the order of widgets, tooltips, help pages; and a clean import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent.parent

# Saved workflows store widget values by position. Lines may be appended to a list, never inserted, moved or removed.
WIDGETS = {
    "WanCoreModelLoader": ["model", "preset", "precision", "attention", "weights", "fp8_products"],
    "WanCoreExpertPairLoader": ["high_noise", "low_noise", "precision", "attention", "weights", "fp8_products"],
    "WanCoreTextEncoderLoader": ["text_encoder"],
    "WanCoreCLIPVisionLoader": ["clip_vision", "precision"],
    "WanCoreVAELoader": ["vae", "precision", "tile_size", "tile_overlap"],
    "WanCoreTextEncode": ["positive", "negative", "official_negative"],
    "WanCoreEmptyLatent": ["width", "height", "length", "batch_size"],
    "WanCoreSampler": ["seed", "steps", "solver", "shift", "guidance", "guidance_low", "denoise", "start_step",
                       "end_step", "add_noise"],
    "WanCoreSchedule": ["schedule", "steps", "shift"],
    "WanCoreImageToVideo": ["width", "height", "length", "batch_size", "fit"],
    "WanCoreImageLatent": ["width", "height", "length", "batch_size", "fit"],
    "WanCoreVideoSize": ["area"],
    "WanCoreVace": ["width", "height", "length", "batch_size", "fit", "strength", "start_percent", "end_percent"],
    "WanCoreVaceModule": ["module", "module_low"],
    "WanCoreDecode": ["tile_size", "tile_overlap", "trim_latent"],
    "WanCoreSaveVideo": ["fps", "filename_prefix", "crf"],
    "WanCoreGuidance": ["start_sigma", "end_sigma", "scales", "cfg_zero_star", "zero_steps", "apg", "apg_eta",
                        "apg_momentum", "apg_threshold", "apg_unit", "batched"],
    "WanCoreNAG": ["scale", "tau", "alpha", "end_sigma"],
    "WanCoreSkipLayers": ["blocks", "start_sigma", "end_sigma", "scale"],
    "WanCoreAttention": ["backend", "start_sigma", "end_sigma", "radial", "radial_start", "dense_blocks", "decay"],
    "WanCoreMemory": ["budget_gb", "pinned_gb", "save_every"],
    "WanCoreCompile": ["mode", "any_size"],
    "WanCoreStepCache": ["cache", "quality"],
    "WanCoreTeaCache": ["quality", "threshold", "retention", "start_sigma", "end_sigma", "calibration"],
    "WanCoreMagCache": ["quality", "threshold", "longest", "retention", "start_sigma", "end_sigma", "calibration"],
    "WanCoreEasyCache": ["quality", "threshold", "warm_up", "start_sigma", "end_sigma"],
    "WanCoreLora": ["lora", "strength", "low_noise", "strength_low", "start_sigma", "end_sigma", "blocks",
                    "merge"],
}
SOCKETS = {
    "WanCoreModelLoader": ([], ["WAN_MODEL"]),
    "WanCoreExpertPairLoader": ([], ["WAN_MODEL"]),
    "WanCoreTextEncoderLoader": ([], ["CLIP"]),
    "WanCoreCLIPVisionLoader": ([], ["CLIP_VISION"]),
    "WanCoreVAELoader": ([], ["VAE"]),
    "WanCoreTextEncode": (["clip CLIP"], ["CONDITIONING", "CONDITIONING"]),
    "WanCoreEmptyLatent": ([], ["LATENT"]),
    "WanCoreSampler": (["model WAN_MODEL", "positive CONDITIONING", "negative CONDITIONING", "latent LATENT",
                        "sigmas SIGMAS"], ["LATENT"]),
    "WanCoreSchedule": (["model WAN_MODEL"], ["WAN_MODEL", "SIGMAS", ["unipc", "dpm++", "euler", "lcm", "res_multistep",
                                                                       "deis", "sa_ode"], "IMAGE"]),
    "WanCoreImageToVideo": (["positive CONDITIONING", "negative CONDITIONING", "vae VAE", "start_image IMAGE",
                             "end_image IMAGE", "clip_vision CLIP_VISION", "clip_vision_output CLIP_VISION_OUTPUT"],
                            ["CONDITIONING", "CONDITIONING", "LATENT"]),
    "WanCoreImageLatent": (["vae VAE", "start_image IMAGE"], ["LATENT"]),
    "WanCoreVideoSize": (["image IMAGE"], ["INT", "INT"]),
    "WanCoreVace": (["positive CONDITIONING", "negative CONDITIONING", "vae VAE", "control_video IMAGE",
                     "control_masks MASK", "reference_image IMAGE"],
                    ["CONDITIONING", "CONDITIONING", "LATENT", "INT"]),
    "WanCoreVaceModule": (["model WAN_MODEL"], ["WAN_MODEL"]),
    "WanCoreDecode": (["samples LATENT", "vae VAE"], ["IMAGE"]),
    "WanCoreSaveVideo": (["images IMAGE"], []),
    "WanCoreGuidance": (["model WAN_MODEL"], ["WAN_MODEL"]),
    "WanCoreNAG": (["model WAN_MODEL"], ["WAN_MODEL"]),
    "WanCoreSkipLayers": (["model WAN_MODEL"], ["WAN_MODEL"]),
    "WanCoreAttention": (["model WAN_MODEL"], ["WAN_MODEL"]),
    "WanCoreMemory": (["model WAN_MODEL"], ["WAN_MODEL"]),
    "WanCoreCompile": (["model WAN_MODEL"], ["WAN_MODEL"]),
    **dict.fromkeys(("WanCoreStepCache", "WanCoreTeaCache", "WanCoreMagCache", "WanCoreEasyCache"),
                    (["model WAN_MODEL"], ["WAN_MODEL"])),
    "WanCoreLora": (["model WAN_MODEL", "lora_stack LORA_STACK"], ["WAN_MODEL", "STRING"]),
}
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN")


def inputs(node: type) -> dict[str, tuple]:
    """All visible inputs of a node in their order."""
    declared = node.INPUT_TYPES()
    return {**declared["required"], **declared.get("optional", {})}


def is_widget(kind: object) -> bool:
    return isinstance(kind, list) or kind in WIDGET_TYPES


@pytest.fixture(params=sorted(WIDGETS))
def node(request, pack) -> type:
    return pack.NODE_CLASS_MAPPINGS[request.param]


def test_ids_and_widgets_stay(pack):
    """Promise: ids never change, widgets are only ever appended, sockets keep names and types."""
    nodes = pack.NODE_CLASS_MAPPINGS
    assert set(nodes) >= set(WIDGETS), "a node has gone; saved workflows need it"
    assert set(nodes) == set(WIDGETS), "a new node: add it to the tables of this test"
    for name, node in nodes.items():
        assert [key for key, (kind, _) in inputs(node).items() if is_widget(kind)] == WIDGETS[name]
        sockets = [f"{key} {kind}" for key, (kind, _) in inputs(node).items() if not is_widget(kind)]
        assert (sockets, list(node.RETURN_TYPES)) == SOCKETS[name]


def test_names(pack):
    """Promise: ids begin with WanCore, display names with Wan, and categories with Wan/."""
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(pack.NODE_CLASS_MAPPINGS)
    assert all(name.startswith("WanCore") for name in pack.NODE_CLASS_MAPPINGS)
    assert all(name.startswith("Wan ") for name in pack.NODE_DISPLAY_NAME_MAPPINGS.values())
    assert all(node.CATEGORY.startswith("Wan/") for node in pack.NODE_CLASS_MAPPINGS.values())


def test_everything_is_explained(node):
    """Promise: a tooltip on every input and output, a description, search aliases."""
    assert all(options.get("tooltip") for _, options in inputs(node).values())
    assert len(getattr(node, "OUTPUT_TOOLTIPS", ())) == len(node.RETURN_TYPES)
    assert len(getattr(node, "RETURN_NAMES", ())) == len(node.RETURN_TYPES)
    assert node.DESCRIPTION and node.SEARCH_ALIASES
    assert callable(getattr(node, node.FUNCTION))


def test_declarations_are_json(node):
    """Promise: the server can describe the node to the page; every default is allowed by its own widget."""
    json.dumps(node.INPUT_TYPES(), allow_nan=False)
    for name, (kind, options) in inputs(node).items():
        default = options.get("default")
        if isinstance(kind, list) and default is not None:
            assert default in kind, name
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= default <= options["max"], name


def test_help_page(node):
    """Promise: each node has a help page that names every input and output."""
    page = (PACK / "web" / "docs" / f"{node.__name__}.md").read_text(encoding="utf-8")
    names = [*inputs(node), *getattr(node, "RETURN_NAMES", ())]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_class_attributes_are_not_shared_state(node):
    """Promise: a node class has no attribute that a run could change for all others but its list of aliases."""
    mutable = [name for name, value in vars(node).items() if isinstance(value, list | dict | set)]
    assert mutable == ["SEARCH_ALIASES"]


def test_import_is_cheap_and_clean():
    """Promise: beyond torch the import takes under half a second of processor time, touches no device, warns of nothing
    and imports none of ComfyUI, diffusers or transformers."""
    probe = f"""
import gc, importlib.util, sys, time, warnings
import torch
# Or looking through what torch has made would be counted.
gc.freeze()
warnings.simplefilter("error")
begin = time.process_time()
spec = importlib.util.spec_from_file_location("a_pack", {str(PACK / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["a_pack"] = module
spec.loader.exec_module(module)
seconds = time.process_time() - begin
heavy = {{"comfy", "folder_paths", "diffusers", "transformers", "accelerate", "torchvision"}} & sys.modules.keys()
assert not heavy and not torch.cuda.is_initialized(), heavy
sys.stdout.write(str(seconds))
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert float(run.stdout) < 0.5


def test_only_the_host_knows_comfyui():
    """Promise: no file but nodes/host.py imports a module of ComfyUI."""
    hosts = ("comfy", "folder_paths", "latent_preview", "nodes", "execution", "server", "node_helpers")
    found = set()
    for path in [*PACK.glob("nodes/**/*.py"), *PACK.glob("wan_core/**/*.py"), PACK / "__init__.py"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and words[1].split(".")[0] in hosts:
                found.add(path.relative_to(PACK).as_posix())
    assert found == {"nodes/host.py"}
    assert importlib.util.find_spec("folder_paths") is None, "these tests are meant to run without ComfyUI"
