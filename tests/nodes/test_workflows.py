"""The workflows that ship with the pack: each runs as it is, in both formats, with the official settings."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.comfy.convert import to_prompt, widgets
from tests.comfy.core_nodes import CORE_NODES
from wan_core.presets import PRESETS
from wan_core.sampling import NAMED_SCHEDULES
from wan_core.training.shapes import BACKGROUNDS, COLOURS, all_prompts

FOLDER = Path(__file__).resolve().parent.parent.parent / "workflows"
# The workflow and the preset whose settings it holds.
WORKFLOWS = {
    "wan_nano_text_to_video": "nano_t2v",
    "wan_nano_image_to_video": "nano_i2v",
    "wan_nano_text_image_to_video": "nano_ti2v",
    "wan_nano_first_last_frame": "nano_i2v",
    "wan_nano_vace_inpaint": "nano_t2v",
    "wan_nano_vace_control": "nano_t2v",
    "wan_nano_video_to_video": "nano_t2v",
    "wan21_text_to_video": "wan21_t2v_1_3b",
    "wan21_image_to_video": "wan21_i2v_14b_480p",
    "wan21_first_last_frame": "wan21_flf2v_14b",
    "wan21_vace_control": "wan21_vace_1_3b",
    "wan21_vace_inpaint": "wan21_vace_1_3b",
    "wan21_video_to_video": "wan21_t2v_1_3b",
    "wan22_a14b_text_to_video": "wan22_t2v_a14b",
    "wan22_a14b_image_to_video": "wan22_i2v_a14b",
    "wan22_a14b_first_last_frame": "wan22_i2v_a14b",
    "wan22_a14b_lightning": "wan22_t2v_a14b",
    "wan22_5b_text_image_to_video": "wan22_ti2v_5b",
}
TITLE_BAR = 30
MODEL_WIDGETS = {"model", "module", "high_noise", "low_noise", "text_encoder", "vae", "clip_vision", "lora"}
# Nodes that say how large and how long the video is; one of them is in every workflow.
SIZES = {"WanCoreEmptyLatent", "WanCoreImageToVideo", "WanCoreImageLatent", "WanCoreVace"}
# Core nodes with a file of the user's -> how its name ends.
FILES = {"LoadImage": ".png", "LoadVideo": ".mp4"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=WORKFLOWS)
def name(request) -> str:
    return request.param


@pytest.fixture
def workflow(name) -> dict:
    return read(FOLDER / f"{name}.json")


@pytest.fixture
def prompt(name) -> dict:
    return read(FOLDER / "api" / f"{name}.json")


@pytest.fixture(scope="module")
def object_info(pack) -> dict:
    """The pack's nodes and the core's, as the server describes them."""
    ours = {name: {"input": node.INPUT_TYPES(), "display_name": pack.NODE_DISPLAY_NAME_MAPPINGS[name]}
            for name, node in pack.NODE_CLASS_MAPPINGS.items()}
    return {**CORE_NODES, **ours}


@pytest.fixture
def nodes(prompt) -> Callable[..., list[dict]]:
    """All nodes of the prompt of the given types, as their inputs."""
    return lambda *kinds: [entry["inputs"] for entry in prompt.values() if entry["class_type"] in kinds]


def test_every_workflow_is_tested():
    """Promise: the folder holds these workflows and no others, each in both formats."""
    assert {path.stem for path in FOLDER.glob("*.json")} == set(WORKFLOWS)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(WORKFLOWS)


def test_both_formats_are_one_graph(workflow, prompt, object_info):
    """Promise: the saved workflow, converted as the page converts it, is the prompt for the API, titles included."""
    plain = {node: {"class_type": entry["class_type"], "inputs": entry["inputs"]} for node, entry in prompt.items()}
    assert to_prompt(workflow, object_info) == plain
    titles = {str(node["id"]): node.get("title") or object_info[node["type"]]["display_name"]
              for node in workflow["nodes"] if node["type"] != "MarkdownNote"}
    assert titles == {node: entry["_meta"]["title"] for node, entry in prompt.items()}


def test_widget_values_are_allowed(workflow, object_info):
    """Promise: every stored value has its widget's type and range; a file that is not bundled comes with a link."""
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        linked = {model["name"] for model in node["properties"].get("models", ())}
        values = iter(node["widgets_values"])
        for name, options, unused in widgets(object_info[node["type"]]):
            value, kind = next(values), options["type"]
            if node["type"] in FILES:
                assert value.endswith(FILES[node["type"]])
            elif name in MODEL_WIDGETS and isinstance(kind, list):
                assert value in kind or value in linked, (node["type"], name)
            elif isinstance(kind, list):
                assert value in kind, (node["type"], name)
            else:
                assert type(value) is {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}[kind], name
                if kind in ("INT", "FLOAT"):
                    assert options["min"] <= value <= options["max"], name
            assert [next(values) for _ in range(unused)] in ([], ["randomize"], ["fixed"], ["image"])
        assert list(values) == []


def test_links_are_whole(workflow):
    """Promise: each link is named at both of its ends, with one type, and no id is used twice."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(links)
    for link, origin, slot, target, socket, kind in workflow["links"]:
        output, entry = nodes[origin]["outputs"][slot], nodes[target]["inputs"][socket]
        assert link in output["links"] and entry["link"] == link
        assert output["type"] == entry["type"] == kind
    assert sum(len(output["links"]) for node in nodes.values() for output in node["outputs"]) == len(links)


def test_official_settings(name, prompt, nodes):
    """Promise: steps, shift, guidance, frame rate and negative prompt are the preset's, in each sampler of a graph."""
    preset = PRESETS[WORKFLOWS[name]]
    official = preset.sampling
    for sampler in nodes("WanCoreSampler"):
        if "sigmas" in sampler:
            continue
        assert (sampler["steps"], sampler["shift"]) == (official.steps, official.shift)
        assert (sampler["solver"], sampler["guidance"]) == (official.solver, official.guidance_high)
        assert (sampler["guidance_low"] or sampler["guidance"]) == official.guidance_low
        from_video = prompt[sampler["latent"][0]]["class_type"] == "VAEEncode"
        assert (sampler["denoise"] < 1) == from_video, "a given video is denoised in part, all else from noise"
    assert {save["fps"] for save in nodes("WanCoreSaveVideo")} == {official.fps}
    assert {text["negative"] for text in nodes("WanCoreTextEncode")} == {official.negative_prompt}
    assert bool(nodes("WanCoreExpertPairLoader")) == preset.experts


@pytest.mark.parametrize("name", ["wan22_a14b_lightning"])
def test_few_step_settings(prompt, nodes):
    """Promise: the sampler takes model and levels of the schedule, as published, with its solver, and leaves the rest
    to it; each LoRA acts on the expert that it was made for, and on no other one."""
    (sampler,), (schedule,) = nodes("WanCoreSampler"), nodes("WanCoreSchedule")
    assert [prompt[sampler[key][0]]["class_type"] for key in ("model", "sigmas")] == ["WanCoreSchedule"] * 2
    named = NAMED_SCHEDULES[schedule["schedule"]]
    assert (schedule["steps"], schedule["shift"], sampler["solver"]) == (0, 0.0, named.solver)
    assert (sampler["steps"], sampler["shift"], sampler["guidance"], sampler["guidance_low"]) == (named.steps, 0, 0, 0)
    for lora in nodes("WanCoreLora"):
        strengths = (lora["strength"], lora["strength_low"])
        assert strengths == ((1.0, 0.0) if "high_noise" in lora["lora"] else (0.0, 1.0))


def test_official_size(name, prompt, nodes, module):
    """Promise: size and length are the preset's; where a picture decides on the size, its area is the preset's."""
    official = PRESETS[WORKFLOWS[name]].sampling
    areas = module("nodes.image").AREAS
    sized, cut = nodes(*SIZES, "ImageScale"), nodes(*SIZES, "ImageFromBatch")
    assert sized and {node["length"] for node in cut} == {official.frames}
    for node in sized:
        width, height = node["width"], node["height"]
        if isinstance(width, list):
            chooser = prompt[width[0]]
            assert chooser["class_type"] == "WanCoreVideoSize" and (width[1], height) == (0, [width[0], 1])
            area = areas[chooser["inputs"]["area"]]
            width, height = area.width, area.height
        assert (width, height) == (official.width, official.height)


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name.startswith("wan_nano_")])
def test_nano_workflows_need_nothing(nodes):
    """Promise: a nano workflow asks for no file of the user's, and only for what the models were trained on."""
    assert not nodes(*FILES)
    for loader in nodes("WanCoreModelLoader", "WanCoreVaceModule", "WanCoreTextEncoderLoader", "WanCoreVAELoader",
                        "WanCoreCLIPVisionLoader"):
        files = [value for key, value in loader.items() if key in MODEL_WIDGETS and isinstance(value, str)]
        assert files and all(file.startswith("nano/") for file in files)
    prompts = {text["positive"] for text in nodes("WanCoreTextEncode")}
    assert prompts <= set(all_prompts())
    known = {(red << 16) + (green << 8) + blue: word
             for word, (red, green, blue) in {**BACKGROUNDS, **COLOURS}.items()}
    drawn = {known[picture["color"]] for picture in nodes("EmptyImage")} & set(COLOURS)
    assert all(colour in prompt for colour in drawn for prompt in prompts)


def test_downloads(workflow):
    """Promise: the links of a node's files lead to files of that name for that folder, and stand in the note, too."""
    note, = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/Comfy-Org/")
            assert model["url"].endswith(f"/resolve/main/split_files/{model['directory']}/{model['name']}")
            assert f"({model['url']})" in note and f"models/{model['directory']}" in note
            assert "fp8" not in model["name"], "official settings are shown with weights of full quality"


def test_layout(workflow):
    """Promise: no node lies on another one, and every node but the note lies in one group."""
    boxes = {node["id"]: (node["pos"][0], node["pos"][1] - TITLE_BAR, node["pos"][0] + node["size"][0],
                          node["pos"][1] + node["size"][1]) for node in workflow["nodes"]}
    for (_, a), (_, b) in itertools.combinations(boxes.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    groups = [(x, y, x + width, y + height) for x, y, width, height in
              (group["bounding"] for group in workflow["groups"])]
    for node in workflow["nodes"]:
        left, top, right, bottom = boxes[node["id"]]
        inside = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
        assert len(inside) == (0 if node["type"] == "MarkdownNote" else 1), node["type"]
