"""Memory in a running ComfyUI: limits, what the nodes say of it, and runs that go on after they were stopped."""

import time

import pytest
import torch

from tests.comfy.client import ComfyClient
from tests.comfy.graphs import MODEL, SAMPLER, nano_prompt, with_nodes
from tests.comfy.server import wait_until
from wan_core.video import read_video

PAIR = {"high_noise": "nano/wan_nano_t2v_high_noise.safetensors",
        "low_noise": "nano/wan_nano_t2v_low_noise.safetensors", "precision": "auto", "attention": "sdpa"}


def limited(prompt: dict, budget_gb: float = 0.0, save_every: int = 1) -> dict:
    """The prompt with a Wan Memory between loader and sampler."""
    limited = with_nodes(prompt, n30=("WanCoreMemory", {
        "model": [MODEL, 0], "budget_gb": budget_gb, "pinned_gb": -1.0, "save_every": save_every}))
    limited[SAMPLER]["inputs"]["model"] = ["30", 0]
    return limited


def frames(server, run) -> torch.Tensor:
    assert run.status == "success", run.error
    return read_video(server.saved_path(run.saved_files()[-1]))


@pytest.fixture(scope="module")
def expected(comfy_server, pack_folder):
    """Frames of the nano workflow without limits, seed 11, by kind of loader."""
    client = ComfyClient(comfy_server.address)
    prompt = nano_prompt(pack_folder, n6={"seed": 11})
    return {"single": frames(comfy_server, client.run(prompt)),
            "pair": frames(comfy_server, client.run(with_nodes(prompt, n1=("WanCoreExpertPairLoader", PAIR))))}


@pytest.mark.parametrize(("kind", "budget"), [("single", 0.004), ("pair", 0.002)])
def test_a_run_in_little_memory_is_the_same_run(comfy_server, client, pack_folder, expected, kind, budget):
    """Promise: within a budget for less than the model, blocks come and go, the node and the log say how, and the
    video is the same."""
    prompt = nano_prompt(pack_folder, n6={"seed": 11})
    if kind == "pair":
        prompt = with_nodes(prompt, n1=("WanCoreExpertPairLoader", PAIR))
    before = len(comfy_server.log())
    run = client.run(limited(prompt, budget))
    assert torch.equal(frames(comfy_server, run), expected[kind])
    log = comfy_server.log()[before:]
    assert "blocks swapped through" in log and f"of {1000 * budget:.2f} MB at most" in log and "planned" in log


def test_a_budget_that_cannot_be_kept_is_refused(client, pack_folder):
    """Promise: the sampler says what is needed and what would help, and nothing was loaded for it."""
    run = client.run(limited(nano_prompt(pack_folder, n6={"seed": 12}), 0.001))
    assert run.status == "error"
    assert "with every block swapped, and the budget is 1.00 MB. Use a smaller size or fewer frames" in run.error


def test_a_stopped_run_goes_on(comfy_server, client, pack_folder):
    """Promise: a run that was cancelled goes on from its last saved step when it is queued again, and makes the video
    that it would have made; then nothing of it is left."""
    slow = {"seed": 13, "steps": 60}
    prompt = limited(nano_prompt(pack_folder, n6=slow))
    queued = client.queue(prompt)
    folder = comfy_server.base / "user" / "wan-checkpoints"
    wait_until(lambda: list(folder.glob("wan-*.safetensors")), 120)
    time.sleep(0.5)
    client.interrupt()
    assert client.wait(queued).interrupted
    before = len(comfy_server.log())
    again = client.run(prompt)
    assert "going on at step" in comfy_server.log()[before:]
    undisturbed = client.run(limited(nano_prompt(pack_folder, n6={**slow, "start_step": 0}), save_every=0))
    assert torch.equal(frames(comfy_server, again), frames(comfy_server, undisturbed))
    assert not list(folder.iterdir())


def test_two_workflows_in_turn_keep_nothing(comfy_server, client, pack_folder):
    """Promise: two graphs that run in turn, one of them in little memory, do not grow, and each reads the model once in
    a run and no more."""
    def run_both(seed: int) -> tuple[float, int]:
        prompt = nano_prompt(pack_folder, n6={"seed": seed, "steps": 3})
        for chosen in (prompt, limited(prompt, 0.004)):
            assert client.run(chosen).status == "success"
        return comfy_server.resident_mb(), comfy_server.log().count("Wan: reading wan_nano_t2v.safetensors")

    run_both(20)
    first_memory, first_reads = run_both(21)
    for seed in range(22, 28):
        later_memory, later_reads = run_both(seed)
    assert later_memory - first_memory < 30
    assert later_reads - first_reads <= 2 * 6
