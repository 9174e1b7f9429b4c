"""The shipped workflows in ComfyUI's page: what it makes of them, and a run from pressing the button to the video."""

import pytest

from tests.comfy.client import load_workflow
from tests.comfy.graphs import MODEL, NANO, SAMPLER
from wan_core.video import read_video


def plain(prompt: dict[str, dict]) -> dict[str, tuple]:
    """A prompt without what is for display only."""
    return {node: (entry["class_type"], entry["inputs"]) for node, entry in prompt.items()}


@pytest.fixture
def names(pack_folder) -> list[str]:
    """Names of all shipped workflows."""
    return sorted(path.stem for path in (pack_folder / "workflows").glob("*.json"))


@pytest.fixture
def shipped(pack_folder):
    """The named workflow in the UI format and in the API's."""
    folder = pack_folder / "workflows"
    return lambda name: (load_workflow(folder / f"{name}.json"), load_workflow(folder / "api" / f"{name}.json"))


def test_page_reads_the_workflows_as_meant(comfy_page, shipped, names):
    """Promise: the page turns each saved workflow into exactly the prompt that is shipped for the API."""
    for name in names:
        workflow, prompt = shipped(name)
        comfy_page.load(workflow)
        assert plain(comfy_page.prompt()) == plain(prompt), name
    assert comfy_page.errors == []


def test_nodes_are_as_large_as_they_are_drawn(comfy_page, shipped, names):
    """Promise: the stored size of every node has room for its widgets, so the layout stays as it was drawn."""
    for name in names:
        workflow, _ = shipped(name)
        comfy_page.load(workflow)
        drawn = comfy_page.page.evaluate("() => window.app.graph.nodes.map(node => [node.id, [...node.size]])")
        stored = {node["id"]: node["size"] for node in workflow["nodes"]}
        assert {node: [round(side) for side in size] for node, size in drawn} == stored


def test_run_from_the_page(comfy_page, client, comfy_server, shipped):
    """Promise: the nano workflow runs from the page: live previews, the video in its node, the graph in its file."""
    workflow, prompt = shipped(NANO)
    workflow["nodes"][int(SAMPLER) - 1]["widgets_values"][0] = 4000
    # Not as in other tests, or the loader's result would come from ComfyUI's cache and the node would say nothing.
    workflow["nodes"][int(MODEL) - 1]["widgets_values"][2] = prompt[MODEL]["inputs"]["precision"] = "float32"
    comfy_page.load(workflow)
    run = client.wait(comfy_page.queue())
    assert run.status == "success", run.error
    comfy_page.wait_for_media("video")
    comfy_page.page.get_by_text("Nano T2V").first.wait_for()
    assert len(comfy_page.preview_frames) >= 15, "a preview after each of the 20 steps, or nearly"
    file, = run.saved_files()
    assert read_video(comfy_server.saved_path(file)).shape == (17, 64, 64, 3)
    comfy_page.load({"version": 0.4, "nodes": [], "links": []})
    comfy_page.open_saved(file)
    prompt[SAMPLER]["inputs"]["seed"] = 4000
    assert plain(comfy_page.prompt()) == plain(prompt)
    assert comfy_page.errors == []
