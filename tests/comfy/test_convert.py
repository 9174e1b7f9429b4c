"""The conversion of saved workflows to prompts, on a made-up node; needs no ComfyUI."""
import copy

import pytest

from tests.comfy.convert import to_prompt

OBJECT_INFO = {
    "Loader": {"input": {"required": {"name": [["a", "b"]]}}},
    "Sampler": {"input": {
        "required": {"model": ["MODEL"], "steps": ["INT", {"default": 20}], "seed": ["INT", {"default": 0}],
                     "cfg": ["FLOAT", {"default": 1.0}]},
        "optional": {"mask": ["MASK"], "width": ["INT", {"forceInput": True}],
                     "tile": ["BOOLEAN", {"default": True}]}}},
}
WORKFLOW = {
    "nodes": [
        {"id": 1, "type": "Loader", "widgets_values": ["b"]},
        {"id": 2, "type": "Reroute", "inputs": [{"name": "", "link": 1}]},
        {"id": 3, "type": "Sampler", "inputs": [{"name": "model", "link": 2}, {"name": "mask", "link": None}],
         "widgets_values": [7, 42, "randomize", 3.5]},
        {"id": 4, "type": "Note", "widgets_values": ["text"]},
    ],
    "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]],
}


def changed(node: int, **values: object) -> dict:
    """WORKFLOW with other values in one node."""
    workflow = copy.deepcopy(WORKFLOW)
    workflow["nodes"][node].update(values)
    return workflow


def test_values_links_and_defaults():
    """Promise: values land on their inputs, links skip reroutes, a widget appended since has its default."""
    assert to_prompt(WORKFLOW, OBJECT_INFO) == {
        "1": {"class_type": "Loader", "inputs": {"name": "b"}},
        "3": {"class_type": "Sampler", "inputs": {"steps": 7, "seed": 42, "cfg": 3.5, "tile": True, "model": ["1", 0]}}}


def test_a_linked_widget_takes_the_link():
    """Promise: an input that has both a stored value and a link gets the link, and later values keep their places."""
    workflow = changed(2, inputs=[{"name": "model", "link": 2}, {"name": "steps", "link": 1}])
    inputs = to_prompt(workflow, OBJECT_INFO)["3"]["inputs"]
    assert inputs["steps"] == ["1", 0] and inputs["cfg"] == 3.5


@pytest.mark.parametrize(("workflow", "message"), [
    (changed(0, type="Unknown"), "does not know"),
    (changed(0, mode=4), "muted or bypassed"),
    (changed(2, widgets_values=[7, 42, "fixed", 3.5, True, "left over"]), "stores 6 widget values"),
    (changed(1, inputs=[{"name": "", "link": None}]), "connected to nothing"),
])
def test_what_is_not_covered_is_refused(workflow, message):
    """Promise: a workflow that would be converted wrongly is refused, with the reason."""
    with pytest.raises(ValueError, match=message):
        to_prompt(workflow, OBJECT_INFO)
