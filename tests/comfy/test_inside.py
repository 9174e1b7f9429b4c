"""Our placement under ComfyUI's memory manager, and our conventions beside the core's own code."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.comfy.server import LAUNCHER

PROBE = Path(__file__).resolve().parent / "probe_inside.py"
PROMISES = {
    "is_managed": "in ComfyUI models are placed through its memory manager",
    "size_is_known": "the manager knows how much memory a model takes",
    "not_built_again": "a model that is there is not built again, whatever working memory a run asks for",
    "one_at_a_time": "placing one expert frees the other",
    "evicted": "unloading frees the weights at once",
    "comes_back": "an unloaded model comes back by itself",
    "gone_with_its_handle": "nothing outlives the handle, neither weights nor the manager's entry",
    "swapped_run_is_the_same": "a run whose blocks come and go gives the same latent bit for bit",
    "counts_slots_and_not_blocks": "the manager is told the memory of the slots and of what stays, not of all blocks",
    "experts_share_an_entry": "experts that take turns in the same slots are one entry of the manager",
    "swapped_run_survives_unloading": "unloading everything between two steps changes nothing but the time",
    "slots_are_given_back": "unloading frees slots and weights at once",
    "previews_can_be_off": "no preview is computed where the user wants none",
    "previews_are_pictures": "released models of both families preview in the core's way",
    "nano_previews_are_decoded": "nano models of both families preview a decoded frame",
    "tiny_vaes_decode_previews": "preview VAEs in models/vae_approx decode the previews of released models",
    "same_noise": "a seed gives the same noise as in the core's samplers",
    "same_latent_range": "LATENT has the core's range: normalising and restoring are the core's",
    "same_percents": "start and end percents of a prompt mean the same noise levels",
    "same_image_latent": "Wan Image Latent gives the samples and the noise mask of the core's Wan22ImageToVideoLatent",
    "same_noise_mask": "a noise mask of any shape is brought to the latent's size as in the core's samplers",
    "same_start_from_noise": "a latent with noise in it from a core sampler is taken as the core takes it",
    "gguf_files_are_listed": "GGUF files and indexes of models in several files stand in the lists that can use them",
    "lists_follow_the_folders": "a file that comes or goes does so in the lists",
    "listed_files_are_found": "a listed name, with its subfolder, is found again",
    "other_files_are_not": "a name that leads out of the model folders is refused",
    "same_end_with_noise": "a latent with noise in it is handed over as the core does it",
}


@pytest.fixture(scope="module")
def found(comfyui, pack_folder) -> dict[str, bool]:
    probe = subprocess.run([comfyui.python, LAUNCHER, PROBE, comfyui.checkout, pack_folder], capture_output=True,
                           text=True, check=False)
    assert probe.returncode == 0, probe.stderr[-4000:]
    return json.loads(probe.stdout.splitlines()[-1])


@pytest.mark.parametrize("fact", PROMISES)
def test_inside(found, fact):
    """Promise: the one that stands beside each fact above."""
    assert found[fact], PROMISES[fact]
