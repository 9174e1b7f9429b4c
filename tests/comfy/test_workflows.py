"""The shipped nano workflows in a real ComfyUI, judged from the pixels that they make; and the table of core nodes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.comfy.client import ComfyClient, load_workflow
from tests.comfy.core_nodes import CORE_NODES
from wan_core.training.score import score
from wan_core.training.shapes import SIZE
from wan_core.video import read_video

# Workflow -> what its videos show, in the order in which they are saved.
SHOWN = {
    "wan_nano_text_to_video": [("red", "circle", "left")],
    "wan_nano_image_to_video": [("red", "square", "right")],
    "wan_nano_text_image_to_video": [("red", "square", "right")],
    "wan_nano_first_last_frame": [("red", "square", "right")],
    "wan_nano_vace_inpaint": [("red", "square", "right"), ("green", "circle", "right")],
    "wan_nano_vace_control": [("red", "circle", "right"), ("blue", "circle", "right")],
    "wan_nano_video_to_video": [("red", "square", "right"), ("purple", "square", "right")],
}


@pytest.fixture(scope="module")
def prompts(pack_folder) -> dict[str, dict]:
    """The shipped nano prompts by name."""
    return {path.stem: load_workflow(path) for path in (pack_folder / "workflows" / "api").glob("wan_nano_*.json")}


@pytest.fixture(scope="module")
def videos(comfy_server, prompts) -> Callable[[str], list[Tensor]]:
    """Runs a workflow once and gives its videos, frames [F, H, W, 3] in 0..255, in the order of the nodes."""
    made = {}

    def run(name: str) -> list[Tensor]:
        if name not in made:
            ended = ComfyClient(comfy_server.address).run(prompts[name])
            assert ended.status == "success", ended.error
            files = [file for node in sorted(ended.outputs, key=int) for file in ended.outputs[node]["images"]]
            made[name] = [read_video(comfy_server.saved_path(file)).float() for file in files]
        return made[name]

    return run


def inputs_of(prompt: dict, title: str) -> dict:
    """The inputs of the node that has this title."""
    found, = (node["inputs"] for node in prompt.values() if node["_meta"]["title"] == title)
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(255**2 / (a - b).square().mean().item())


def drawn(prompt: dict, title: str) -> Tensor:
    """The picture [H, W, 3] in 0..255 that the composite node of this title makes."""
    place, ground, square = (inputs_of(prompt, name) for name in (title, "Background", "Square"))
    picture = torch.empty(ground["height"], ground["width"], 3)
    picture[:] = channels(ground["color"])
    picture[place["y"]:place["y"] + square["height"], place["x"]:place["x"] + square["width"]] = channels(
        square["color"])
    return picture


def channels(colour: int) -> Tensor:
    return torch.tensor([colour >> 16 & 255, colour >> 8 & 255, colour & 255], dtype=torch.float32)


def test_core_nodes_are_as_the_table_says(client):
    """Promise: inputs, their order, types, choices and limits, outputs and titles in our table are the server's."""
    for name, described in CORE_NODES.items():
        real = client.object_info(name)[name]
        for key in ("display_name", "output", "output_name"):
            assert described[key] == real[key], name
        assert {group: list(inputs) for group, inputs in described["input"].items()} == {
            group: list(inputs) for group, inputs in real["input"].items() if inputs and group != "hidden"}, name
        for group, inputs in described["input"].items():
            for key, (kind, options) in inputs.items():
                real_kind, real_options = (*real["input"][group][key], {})[:2]
                if real_kind == "COMBO":
                    real_kind = real_options["options"]
                is_file = any(option.endswith("_upload") for option in options)
                assert isinstance(real_kind, list) if is_file else kind == real_kind, (name, key)
                assert options.items() <= real_options.items(), (name, key)


def test_all_nano_workflows_are_run(prompts):
    """Promise: no nano workflow ships without a run below."""
    assert set(SHOWN) == set(prompts)


@pytest.mark.parametrize("name", SHOWN)
def test_nano_workflow_shows_what_was_asked_for(videos, prompts, name):
    """Promise: each nano workflow runs as it is, and its videos show the object, colour and motion of their prompts."""
    size, *_ = (node["inputs"] for node in prompts[name].values() if {"width", "length"} <= node["inputs"].keys())
    for video, shown in zip(videos(name), SHOWN[name], strict=True):
        assert video.shape == (size["length"], size["height"], size["width"], 3)
        clip = F.interpolate(video.movedim(-1, 1) / 127.5 - 1, (SIZE, SIZE), mode="area").movedim(1, 0)
        seen = score(clip)
        assert (seen.colour, seen.shape, seen.direction) == shown


def test_given_pictures_are_the_first_and_the_last_frame(videos, prompts):
    """Promise: the picture that the graph draws begins the video, and with two the other one ends it.

    The VAE alone keeps this picture at 27.9 dB; a square that lies two pixels aside is at 23 dB at best.
    """
    single, double = ("wan_nano_image_to_video", "wan_nano_first_last_frame")
    assert psnr(videos(single)[0][0], drawn(prompts[single], "First frame")) > 26
    assert psnr(videos(double)[0][0], drawn(prompts[double], "First frame")) > 26
    assert psnr(videos(double)[0][-1], drawn(prompts[double], "Last frame")) > 23


def test_inpainting_leaves_the_rest_alone(videos, prompts):
    """Promise: outside the mask the second clip is the first one, at 30 dB or more; inside it is not."""
    before, after = videos("wan_nano_vace_inpaint")
    place, box = (inputs_of(prompts["wan_nano_vace_inpaint"], title) for title in ("Mask", "Box"))
    inside = torch.zeros(before.shape[1:3], dtype=torch.bool)
    inside[place["y"]:place["y"] + box["height"], place["x"]:place["x"] + box["width"]] = True
    assert psnr(before[:, ~inside], after[:, ~inside]) > 30
    assert psnr(before[:, inside], after[:, inside]) < 20


@pytest.mark.parametrize("name", ["wan_nano_vace_control", "wan_nano_video_to_video"])
def test_second_clip_moves_as_the_first(videos, name):
    """Promise: a control video, and a video that is denoised in part, hand their object's place on in every frame."""
    before, after = (torch.stack([centre(frame) for frame in video]) for video in videos(name))
    assert (before - after).norm(dim=1).max() < 3


def centre(frame: Tensor) -> Tensor:
    """Mean place (row, column) of the pixels that differ from the border's colour."""
    border = torch.cat([frame[0], frame[-1], frame[:, 0], frame[:, -1]]).median(0).values
    return ((frame - border).norm(dim=-1) > 100).nonzero().float().mean(0)
