"""The workflows that ship with the pack: each runs as it is, in both formats, with the official settings."""

import itertools
import json
from pathlib import Path

import pytest

from tests.comfy.convert import to_prompt, widgets
from wan_core.presets import PRESETS

FOLDER = Path(__file__).resolve().parent.parent.parent / "workflows"
# The workflow and the preset whose settings it holds.
WORKFLOWS = {
    "wan_nano_text_to_video": "nano_t2v",
    "wan21_text_to_video": "wan21_t2v_1_3b",
    "wan22_a14b_text_to_video": "wan22_t2v_a14b",
}
TITLE_BAR = 30
MODEL_WIDGETS = {"model", "high_noise", "low_noise", "text_encoder", "vae"}


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
    """The pack's nodes as the server describes them."""
    return {name: {"input": node.INPUT_TYPES()} for name, node in pack.NODE_CLASS_MAPPINGS.items()}


def test_every_workflow_is_tested():
    """Promise: the folder holds these workflows and no others, each in both formats."""
    assert {path.stem for path in FOLDER.glob("*.json")} == set(WORKFLOWS)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(WORKFLOWS)


def test_both_formats_are_one_graph(workflow, prompt, object_info):
    """Promise: the saved workflow, converted as the page converts it, is the prompt for the API; all nodes are ours."""
    plain = {node: {"class_type": entry["class_type"], "inputs": entry["inputs"]} for node, entry in prompt.items()}
    assert to_prompt(workflow, object_info) == plain
    titles = {entry["class_type"]: entry["_meta"]["title"] for entry in prompt.values()}
    assert len(titles) == len(prompt) and all(title.startswith("Wan ") for title in titles.values())


def test_widget_values_are_allowed(workflow, object_info):
    """Promise: every stored value has its widget's type and range; a file that is not bundled comes with a link."""
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        linked = {model["name"] for model in node["properties"].get("models", ())}
        values = iter(node["widgets_values"])
        for name, options, unused in widgets(object_info[node["type"]]):
            value, kind = next(values), options["type"]
            if name in MODEL_WIDGETS and isinstance(kind, list):
                assert value in kind or value in linked, (node["type"], name)
            elif isinstance(kind, list):
                assert value in kind, (node["type"], name)
            else:
                assert type(value) is {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}[kind], name
                if kind in ("INT", "FLOAT"):
                    assert options["min"] <= value <= options["max"], name
            assert [next(values) for _ in range(unused)] in ([], ["randomize"])
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


def test_official_settings(name, prompt):
    """Promise: size, length, steps, shift, guidance, frame rate and negative prompt are the preset's."""
    inputs = {entry["class_type"]: entry["inputs"] for entry in prompt.values()}
    preset = PRESETS[WORKFLOWS[name]]
    official, sampler, latent = preset.sampling, inputs["WanCoreSampler"], inputs["WanCoreEmptyLatent"]
    assert (latent["width"], latent["height"], latent["length"]) == (official.width, official.height, official.frames)
    assert (sampler["steps"], sampler["shift"], sampler["solver"]) == (official.steps, official.shift, official.solver)
    assert sampler["guidance"] == official.guidance_high
    assert (sampler["guidance_low"] or sampler["guidance"]) == official.guidance_low
    assert inputs["WanCoreSaveVideo"]["fps"] == official.fps
    assert inputs["WanCoreTextEncode"]["negative"] == official.negative_prompt
    assert ("WanCoreExpertPairLoader" in inputs) == preset.experts


def test_downloads(workflow):
    """Promise: the links of a node's files lead to files of that name for that folder, and stand in the note, too."""
    note, = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/Comfy-Org/")
            assert model["url"].endswith(f"/resolve/main/split_files/{model['directory']}/{model['name']}")
            assert f"({model['url']})" in note and f"models/{model['directory']}" in note
            assert "fp8" not in model["name"], "this version does not read FP8 files"


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
