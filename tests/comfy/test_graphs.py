"""Graphs over HTTP: the shipped nano workflow, mixtures with the core's nodes, errors, cancelling, and memory."""

import json
import math
import re
import time

import pytest
import torch

from tests.comfy.client import ComfyClient, PromptRejected
from tests.comfy.graphs import CLIP, DECODE, MODEL, SAMPLER, SAVE, TEXT, VAE, nano_prompt, with_nodes
from tests.comfy.server import PACK_NAME, wait_until
from tests.weights.lora.lora_files import low_rank_file
from wan_core import nano
from wan_core.training.score import score
from wan_core.video import read_metadata, read_video
from wan_core.weights import open_model, write_quantised

READING = re.compile(r"Wan: reading (\S+)")
QUICK = {"steps": 2, "end_step": 1}


@pytest.fixture(scope="module")
def nano_frames(comfy_server, pack_folder):
    """Frames [F, H, W, 3] of the shipped nano workflow's video."""
    run = ComfyClient(comfy_server.address).run(nano_prompt(pack_folder))
    assert run.status == "success", run.error
    file, = run.saved_files()
    return read_video(comfy_server.saved_path(file))


def frames_of(server, run):
    assert run.status == "success", run.error
    return read_video(server.saved_path(run.saved_files()[-1]))


def test_nano_workflow_shows_what_was_asked_for(nano_frames):
    """Promise: the workflow that ships, over HTTP, makes a video whose pixels show its prompt's object and motion."""
    assert nano_frames.shape == (17, 64, 64, 3)
    seen = score(nano_frames.movedim(-1, 0) / 127.5 - 1)
    assert (seen.colour, seen.shape, seen.direction) == ("red", "circle", "left")


def test_expert_pair_shows_what_was_asked_for(comfy_server, client, pack_folder):
    """Promise: the same graph with the expert pair loader does so, too."""
    names = [f"nano/wan_nano_t2v_{name}_noise.safetensors" for name in ("high", "low")]
    prompt = with_nodes(nano_prompt(pack_folder), n1=("WanCoreExpertPairLoader", {
        "high_noise": names[0], "low_noise": names[1], "precision": "auto", "attention": "sdpa"}))
    seen = score(frames_of(comfy_server, client.run(prompt)).movedim(-1, 0) / 127.5 - 1)
    assert (seen.colour, seen.shape, seen.direction) == ("red", "circle", "left")
    assert "seem to be swapped" not in comfy_server.log()


def test_a_named_schedule_joins_the_sampler(comfy_server, client, pack_folder):
    """Promise: model, noise levels and solver of Wan Schedule can be connected to the sampler, the plot to the core's
    preview; the run is the one with these settings by hand."""
    plain = nano_prompt(pack_folder)
    joined = with_nodes(plain, n20=("WanCoreSchedule", {"model": [MODEL, 0], "schedule": "lightx2v", "steps": 0,
                                                        "shift": 0.0}), n21=("PreviewImage", {"images": ["20", 3]}))
    joined[SAMPLER]["inputs"] |= {"model": ["20", 0], "sigmas": ["20", 1], "solver": ["20", 2], "guidance": 0.0}
    by_hand = nano_prompt(pack_folder, n6={"solver": "euler", "steps": 4, "shift": 5.0, "guidance": 1.0})
    run = client.run(joined)
    assert run.status == "success", run.error
    assert run.outputs["21"]["images"][0]["type"] == "temp"
    file, = (file for file in run.saved_files() if file["type"] == "output")
    video = read_video(comfy_server.saved_path(file))
    assert (video.int() - frames_of(comfy_server, client.run(by_hand)).int()).abs().max() <= 1


def test_options_of_speed_are_chained(comfy_server, client, pack_folder, nano_frames):
    """Promise: a step cache, an attention backend and guidance options on one model make a video that is near the one
    without them, and the sampler's node says which steps were reused."""
    chained = with_nodes(
        nano_prompt(pack_folder),
        n20=("WanCoreStepCache", {"model": [MODEL, 0], "cache": "auto", "quality": "balanced"}),
        n21=("WanCoreAttention", _defaults(client, "WanCoreAttention") | {"model": ["20", 0], "backend": "sdpa-math"}),
        n22=("WanCoreGuidance", _defaults(client, "WanCoreGuidance") | {"model": ["21", 0]}))
    chained[SAMPLER]["inputs"] |= {"model": ["22", 0], "steps": 20}
    frames = frames_of(comfy_server, client.run(chained))
    assert "steps reused: " in comfy_server.log()
    error = (frames.float() - nano_frames.float()).square().mean().item()
    assert 10 * math.log10(255 ** 2 / error) >= 25


def _defaults(client, node):
    """The widgets of a node as a new one has them."""
    info = client.object_info(node)[node]["input"]
    widgets = {name: spec for kind in ("required", "optional") for name, spec in info.get(kind, {}).items()}
    return {name: spec[1]["default"] for name, spec in widgets.items() if len(spec) > 1 and "default" in spec[1]}


def test_a_lora_stays_on_its_own_branch(comfy_server, client, pack_folder):
    """Promise: two samplers on one GGUF loader, one with a LoRA, give what each of them gives alone, bit for bit."""
    file, _ = open_model(nano.T2V, "transformer")
    write_quantised(file, "q8_0", comfy_server.models_folder("diffusion_models") / "branch.gguf", lambda done, of: None)
    torch.manual_seed(0)
    low_rank_file(comfy_server.models_folder("loras") / "branch.safetensors", {
        name.removesuffix(".weight"): shape for name, shape in file.shapes().items() if ".self_attn.q.weight" in name})
    plain = nano_prompt(pack_folder, n1={"model": "branch.gguf"}, n6=QUICK)
    lora = {"lora": "branch.safetensors", "strength": 3.0, "low_noise": "same strength", "strength_low": 1.0,
            "start_sigma": 1.0, "end_sigma": 0.0, "blocks": ""}
    both = with_nodes(plain, n20=("WanCoreLora", {"model": [MODEL, 0], **lora}),
                      n21=("WanCoreSampler", {**plain[SAMPLER]["inputs"], "model": ["20", 0]}),
                      n22=("WanCoreDecode", {**plain[DECODE]["inputs"], "samples": ["21", 0]}),
                      n23=("WanCoreSaveVideo", {**plain[SAVE]["inputs"], "images": ["22", 0],
                                                "filename_prefix": "branch"}))
    adapted = {name: node for name, node in both.items() if name not in (SAMPLER, DECODE, SAVE)}
    videos = {}
    for name, prompt in (("both", both), ("plain", plain), ("adapted", adapted)):
        client.free()
        run = client.run(prompt)
        assert run.status == "success", run.error
        for saved in run.saved_files():
            branch = "adapted" if saved["filename"].startswith("branch") else "plain"
            videos[name, branch] = read_video(comfy_server.saved_path(saved))
    assert torch.equal(videos["both", "plain"], videos["plain", "plain"])
    assert torch.equal(videos["both", "adapted"], videos["adapted", "adapted"])
    assert not torch.equal(videos["both", "plain"], videos["both", "adapted"])
    assert "Wan: branch.safetensors: 6 of 6 adapters matched, strength 3" in comfy_server.log()


def test_core_nodes_in_our_places(comfy_server, client, pack_folder, nano_frames):
    """Promise: the core's CLIPTextEncode, EmptyHunyuanLatentVideo and VAEDecode give the same video as our nodes; so
    does a prompt that the core's nodes cut into two ranges and combine again."""
    text = nano_prompt(pack_folder)[TEXT]["inputs"]["positive"]
    prompt = with_nodes(
        nano_prompt(pack_folder, n6={"positive": ["23", 0], "negative": ["24", 0]}),
        n20=("CLIPTextEncode", {"clip": [CLIP, 0], "text": text}),
        n21=("ConditioningSetTimestepRange", {"conditioning": ["20", 0], "start": 0.0, "end": 0.5}),
        n22=("ConditioningSetTimestepRange", {"conditioning": ["20", 0], "start": 0.5, "end": 1.0}),
        n23=("ConditioningCombine", {"conditioning_1": ["21", 0], "conditioning_2": ["22", 0]}),
        n24=("CLIPTextEncode", {"clip": [CLIP, 0], "text": ""}),
        n5=("EmptyHunyuanLatentVideo", {"width": 64, "height": 64, "length": 17, "batch_size": 1}),
        n7=("VAEDecode", {"samples": [SAMPLER, 0], "vae": [VAE, 0]}))
    del prompt[TEXT]
    frames = frames_of(comfy_server, client.run(prompt))
    assert (frames.int() - nano_frames.int()).abs().float().mean() < 0.5


def test_our_vae_in_the_cores_nodes(comfy_server, client, pack_folder, nano_frames):
    """Promise: a video goes through the core's VAEEncode, VAEDecodeTiled and SaveVideo with our VAE, and is itself."""
    prompt = with_nodes(
        nano_prompt(pack_folder, n8={"images": ["21", 0]}),
        n20=("VAEEncode", {"pixels": [DECODE, 0], "vae": [VAE, 0]}),
        n21=("VAEDecodeTiled", {"samples": ["20", 0], "vae": [VAE, 0], "tile_size": 64, "overlap": 0,
                                "temporal_size": 8, "temporal_overlap": 4}),
        n22=("CreateVideo", {"images": ["21", 0], "fps": 8.0}),
        n23=("SaveVideo", {"video": ["22", 0], "filename_prefix": "core", "format": "auto", "codec": "auto"}))
    run = client.run(prompt)
    frames = frames_of(comfy_server, run)
    assert len(run.saved_files()) == 2 and frames.shape == nano_frames.shape
    assert (frames.int() - nano_frames.int()).abs().float().mean() < 12


def test_saved_file_holds_the_graph(comfy_server, client, pack_folder):
    """Promise: the video file carries prompt and workflow, as the core's own savers write them."""
    workflow = {"version": 0.4, "nodes": [], "links": [], "extra": {"note": "ünïcode = ; # \\ \n"}}
    prompt = nano_prompt(pack_folder, n6={**QUICK, "seed": 99})
    run = client.run(prompt, workflow)
    tags = read_metadata(comfy_server.saved_path(run.saved_files()[0]))
    assert tags["workflow"] == workflow
    stored = {node: {key: entry[key] for key in ("class_type", "inputs")} for node, entry in tags["prompt"].items()}
    assert stored == {node: {key: entry[key] for key in ("class_type", "inputs")} for node, entry in prompt.items()}


@pytest.mark.parametrize(("changes", "node", "message"), [
    ({"n5": {"width": 100}}, "WanCoreEmptyLatent", "width is 100 pixels; it must be a multiple of 16. Use 96."),
    ({"n5": {"length": 18}}, "WanCoreEmptyLatent", "must be 4n + 1. Use 17."),
    ({"n4": {"positive": " "}}, "WanCoreTextEncode", "the prompt is empty"),
    ({"n3": {"tile_size": 100}}, "WanCoreVAELoader", "must be a positive multiple of 8"),
    ({"n6": {"start_step": 20}}, "WanCoreSampler", "hold no step"),
])
def test_bad_input_is_told_at_its_node(client, pack_folder, changes, node, message):
    """Promise: what cannot run ends at the node that it concerns, with a text that says what to change."""
    run = client.run(nano_prompt(pack_folder, **changes))
    assert run.status == "error" and message in run.error
    failure = run.event("execution_error")
    assert failure["node_type"] == node and failure["exception_type"].split(".")[-1] in ("ValueError", "LoadError")


@pytest.mark.parametrize(("changes", "kind"), [
    ({"n6": {"steps": 0}}, "value_smaller_than_min"),
    ({"n1": {"model": "nano/none.safetensors"}}, "value_not_in_list"),
    ({"n8": {"crf": 99}}, "value_bigger_than_max"),
])
def test_impossible_widgets_are_refused_at_once(client, pack_folder, changes, kind):
    """Promise: ComfyUI's own check of widget values is in force for our nodes."""
    with pytest.raises(PromptRejected) as refused:
        client.queue(nano_prompt(pack_folder, **changes))
    assert [error["type"] for found in refused.value.node_errors.values() for error in found["errors"]] == [kind]


def test_second_run_reads_and_keeps_nothing(comfy_server, client, pack_folder):
    """Promise: further runs of a graph read no weights and let the server's memory grow by no more than 40 MB."""
    def run_with(seed):
        assert client.run(nano_prompt(pack_folder, n6={"steps": 3, "seed": seed})).status == "success"
        return comfy_server.resident_mb(), len(READING.findall(comfy_server.log()))

    run_with(1000)
    first_memory, first_reads = run_with(1001)
    assert first_reads >= 3, "model, text encoder and VAE have been read, and the log says so"
    for seed in (1002, 1003, 1004):
        later_memory, later_reads = run_with(seed)
    assert later_reads == first_reads
    assert later_memory - first_memory < 40


def test_unloaded_models_come_back(comfy_server, client, pack_folder):
    """Promise: ComfyUI's memory manager can unload us; the next run reads the files again and gives the same video."""
    prompt, other = (nano_prompt(pack_folder, n6={"steps": 3, "seed": seed}) for seed in (2000, 2001))
    before = frames_of(comfy_server, client.run(prompt))
    # Another result in between, or the first one would be served from ComfyUI's cache.
    client.run(other)
    reads = READING.findall(comfy_server.log())
    client.free(unload_models=True, forget_results=False)
    # The server unloads after the next prompt at the latest; this one is cached and runs no node.
    client.run(other)
    after = frames_of(comfy_server, client.run(prompt))
    assert set(READING.findall(comfy_server.log())[len(reads):]) == {
        "wan_nano_t2v.safetensors", "wan_nano_vae.safetensors"}
    assert (before == after).all()


def test_cancel_stops_within_a_block(client, pack_folder):
    """Promise: the cancel button ends a run in the middle of a step, and the next prompt runs."""
    large = {"width": 256, "height": 256, "length": 81}
    one_step = with_nodes(nano_prompt(pack_folder, n5=large, n6={"steps": 50, "end_step": 1}),
                          n8=("SaveLatent", {"samples": [SAMPLER, 0], "filename_prefix": "cancel"}))
    for node in (DECODE, VAE):
        del one_step[node]
    client.run(one_step)
    one_step[SAMPLER]["inputs"]["seed"] += 1
    step_seconds = client.run(one_step).seconds
    one_step[SAMPLER]["inputs"].update(end_step=50)
    queued = client.queue(one_step)
    wait_until(lambda: client.is_running(queued), 60)
    time.sleep(step_seconds / 3)
    begin = time.monotonic()
    client.interrupt()
    run = client.wait(queued)
    assert run.interrupted and run.event("execution_interrupted")["node_type"] == "WanCoreSampler"
    assert time.monotonic() - begin < 0.5 * step_seconds + 0.3, f"a step takes {step_seconds:.1f} s"
    assert client.run(nano_prompt(pack_folder, n6={**QUICK, "seed": 3000})).status == "success"


def test_templates_and_help_are_served(client, pack_folder):
    """Promise: the template browser lists the workflows, and the help page of every node is there."""
    names = sorted(path.stem for path in (pack_folder / "workflows").glob("*.json"))
    assert sorted(json.loads(client.fetch("/workflow_templates"))[PACK_NAME]) == names
    for page in (pack_folder / "web" / "docs").glob("*.md"):
        served = client.fetch(f"/extensions/{PACK_NAME}/docs/{page.name}")
        assert served.decode() == page.read_text(encoding="utf-8")
