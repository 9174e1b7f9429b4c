"""Prompts in API format for the tests of this folder, built from the shipped nano workflow."""

import copy
from pathlib import Path

from tests.comfy.client import load_workflow

NANO = "wan_nano_text_to_video"
MODEL, CLIP, VAE, TEXT, LATENT, SAMPLER, DECODE, SAVE = "1", "2", "3", "4", "5", "6", "7", "8"


def nano_prompt(pack_folder: Path, **changes: dict) -> dict[str, dict]:
    """The nano workflow; `changes` are inputs to be set, by node id with a leading "n" ("n6" for the sampler)."""
    prompt = load_workflow(pack_folder / "workflows" / "api" / f"{NANO}.json")
    for node, inputs in changes.items():
        prompt[node.removeprefix("n")]["inputs"].update(inputs)
    return prompt


def with_nodes(prompt: dict[str, dict], **nodes: tuple[str, dict]) -> dict[str, dict]:
    """A copy with nodes added or replaced: id with a leading "n" -> (class_type, inputs)."""
    prompt = copy.deepcopy(prompt)
    for node, (kind, inputs) in nodes.items():
        prompt[node.removeprefix("n")] = {"class_type": kind, "inputs": inputs}
    return prompt
