"""The core's conditioning nodes in front of our sampler, against our own: the same latents, to 1e-3.

Both graphs of a case run as one prompt with the same loaders, seed and pictures. Pictures are random pixels, where a
frame or a mask at the wrong place shows most; they have the video's size, since only there the nodes resize alike (the
core with a bilinear filter, ours as in the official code).
Reference: ComfyUI's `comfy_extras/nodes_wan.py` (0.3.64) and `nodes.py` (SetLatentNoiseMask).
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from wan_core import nano

TOLERANCE = 1e-3
FOLDER = "core_conditioning"
SIDE, FRAMES = 32, 9
SIZE = {"width": SIDE, "height": SIDE, "length": FRAMES, "batch_size": 1}
FIT = {**SIZE, "fit": "crop"}
WHOLE_RUN = {"start_percent": 0.0, "end_percent": 1.0}
SAMPLER = {"seed": 5, "steps": 4, "solver": "unipc", "shift": 0.0, "guidance": 3.0, "guidance_low": 0.0,
           "denoise": 1.0, "start_step": 0, "end_step": 1000, "add_noise": True}
NANO_VAE = "nano/wan_nano_vae.safetensors"


@dataclass
class Graph:
    """A prompt in API format with the text encoded and a VAE loaded, for one model."""

    model_file: str
    vae_file: str = NANO_VAE
    nodes: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.add("WanCoreModelLoader", model=self.model_file, preset="auto", precision="float32",
                              attention="sdpa")[0]
        self.vae = self.add("WanCoreVAELoader", vae=self.vae_file, precision="float32", tile_size=0,
                            tile_overlap=64)[0]
        clip = self.add("WanCoreTextEncoderLoader", text_encoder="nano/wan_nano_umt5.safetensors")[0]
        self.positive, self.negative = self.add("WanCoreTextEncode", clip=clip, positive="a red circle moving left",
                                                negative="a blue square", official_negative=True)[:2]

    def add(self, kind: str, **inputs: object) -> list[list]:
        """Add a node; returns links to its first four outputs."""
        name = f"{len(self.nodes)} {kind}"
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [[name, slot] for slot in range(4)]

    def picture(self, name: str) -> list:
        """The picture or pictures of a file made by the fixture `pictures`."""
        return self.add("LoadImage", image=f"{FOLDER}/{name}.tiff")[0]

    def pair(self, kind: str, before: tuple[list, list] | None = None, **inputs: object) -> list[list]:
        """A conditioning node of `kind` on both prompts, or on those that another one gave."""
        positive, negative = before or (self.positive, self.negative)
        return self.add(kind, positive=positive, negative=negative, vae=self.vae, **inputs)

    def sample(self, name: str, positive: list, negative: list, latent: list, trim: list | None = None) -> None:
        """Sample, leave `trim` latent frames away, and save what is left as `name`."""
        latent = self.add("WanCoreSampler", model=self.model, positive=positive, negative=negative, latent=latent,
                          **SAMPLER)[0]
        if trim is not None:
            latent = self.add("TrimVideoLatent", samples=latent, trim_amount=trim)[0]
        self.nodes[name] = {"class_type": "SaveLatent", "inputs": {"samples": latent, "filename_prefix": FOLDER}}


@pytest.fixture(scope="module")
def pictures(comfy_server) -> None:
    """Files in the server's input folder: single pictures, clips and masks."""
    folder = comfy_server.input_folder / FOLDER
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, frames: np.ndarray) -> None:
        # An animated PNG would merge equal frames; TIFF keeps each as a page of its own.
        first, *rest = [Image.fromarray(frame) for frame in frames.astype(np.uint8)]
        first.save(folder / f"{name}.tiff", save_all=True, append_images=rest)

    for name, count in (("start", 1), ("end", 1), ("three", 3), ("five", 5), ("clip", FRAMES), ("other", 5)):
        write(name, random.integers(0, 256, (count, SIDE, SIDE, 3)))
    write("wide", random.integers(0, 256, (1, 48, 80, 3)))
    for name, count in (("masks", FRAMES), ("other_masks", 5)):
        masks = np.zeros((count, SIDE, SIDE, 3))
        for frame, mask in enumerate(masks):
            mask[4:20, 2 * frame:2 * frame + 13] = 255
        write(name, masks)
    first_kept = np.full((FRAMES, SIDE, SIDE, 3), 255)
    first_kept[:4] = 0
    write("first_kept", first_kept)


@pytest.fixture
def latents(comfy_server, client, pictures):
    """Runs a graph: the latents that were sampled under each name."""
    def run(graph: Graph) -> dict:
        ended = client.run(graph.nodes)
        assert ended.status == "success", ended.error
        return {name: load_file(comfy_server.saved_path(shown["latents"][0]))["latent_tensor"]
                for name, shown in ended.outputs.items() if "latents" in shown}

    return run


@pytest.fixture
def image_model(pictures) -> Graph:
    return Graph("nano/wan_nano_i2v.safetensors")


@pytest.fixture
def vace_model(pictures) -> Graph:
    graph = Graph("nano/wan_nano_t2v.safetensors")
    graph.model = graph.add("WanCoreVaceModule", model=graph.model, module="nano/wan_nano_vace_module.safetensors",
                            module_low="same")[0]
    return graph


def difference(first, second) -> float:
    """Largest absolute error."""
    assert first.shape == second.shape and first.isfinite().all()
    return (first - second).abs().max().item()


def seen_by_clip(graph: Graph, *names: str) -> list[list]:
    """The core's CLIPVisionEncode of these pictures."""
    clip_vision = graph.add("WanCoreCLIPVisionLoader", clip_vision="nano/wan_nano_clip_vision.safetensors",
                            precision="float32")[0]
    return [clip_vision, *(graph.add("CLIPVisionEncode", clip_vision=clip_vision, image=graph.picture(name),
                                     crop="none")[0] for name in names)]


@pytest.mark.parametrize("start", ["start", "five"])
def test_start_image(latents, image_model, start):
    """Promise: WanImageToVideo gives what Wan Image to Video gives, for one start frame and for several, with CLIP
    features and without; the features count."""
    graph = image_model
    shown = graph.picture(start)
    clip_vision, seen = seen_by_clip(graph, "start")
    # The core's node takes features alone, ours the model as well, and encodes the first frame with it.
    ours = {"clip_vision": clip_vision} if start == "start" else {"clip_vision_output": seen}
    graph.sample("core", *graph.pair("WanImageToVideo", **SIZE, start_image=shown)[:3])
    graph.sample("ours", *graph.pair("WanCoreImageToVideo", **FIT, start_image=shown)[:3])
    graph.sample("core, clip", *graph.pair("WanImageToVideo", **SIZE, start_image=shown, clip_vision_output=seen)[:3])
    graph.sample("ours, clip", *graph.pair("WanCoreImageToVideo", **FIT, start_image=shown, **ours)[:3])
    found = latents(graph)
    assert difference(found["core"], found["ours"]) <= TOLERANCE
    assert difference(found["core, clip"], found["ours, clip"]) <= TOLERANCE
    assert difference(found["core"], found["core, clip"]) > 100 * TOLERANCE


def test_first_and_last_frame(latents, image_model):
    """Promise: WanFirstLastFrameToVideo gives what Wan Image to Video gives with a start and an end image, CLIP
    features of both included."""
    graph = image_model
    shown = {"start_image": graph.picture("start"), "end_image": graph.picture("end")}
    clip_vision, first, last = seen_by_clip(graph, "start", "end")
    graph.sample("core", *graph.pair("WanFirstLastFrameToVideo", **SIZE, **shown, clip_vision_start_image=first,
                                     clip_vision_end_image=last)[:3])
    graph.sample("ours", *graph.pair("WanCoreImageToVideo", **FIT, **shown, clip_vision=clip_vision)[:3])
    found = latents(graph)
    assert difference(found["core"], found["ours"]) <= TOLERANCE


@pytest.mark.parametrize("given", [{"end_image": "end"}, {"start_image": "three", "end_image": "five"}])
def test_several_first_and_last_frames(latents, image_model, given):
    """Promise: the same for an end image alone, and where known frames end within a latent frame."""
    graph = image_model
    shown = {socket: graph.picture(name) for socket, name in given.items()}
    graph.sample("core", *graph.pair("WanFirstLastFrameToVideo", **SIZE, **shown)[:3])
    graph.sample("ours", *graph.pair("WanCoreImageToVideo", **FIT, **shown)[:3])
    found = latents(graph)
    assert difference(found["core"], found["ours"]) <= TOLERANCE


def test_pictures_of_another_size(latents, image_model):
    """Promise: what differs for a picture that is to be resized is the filter and nothing else: scaled by the core
    before, it gives the core's latents; the core's CLIP features go into our node."""
    graph = image_model
    wide = graph.picture("wide")
    _, seen = seen_by_clip(graph, "wide")
    scaled = graph.add("ImageScale", image=wide, upscale_method="bilinear", width=SIDE, height=SIDE, crop="center")[0]
    graph.sample("core", *graph.pair("WanImageToVideo", **SIZE, start_image=wide, clip_vision_output=seen)[:3])
    graph.sample("ours", *graph.pair("WanCoreImageToVideo", **FIT, start_image=scaled, clip_vision_output=seen)[:3])
    found = latents(graph)
    assert difference(found["core"], found["ours"]) <= TOLERANCE


@pytest.mark.parametrize("kinds", [("WanVaceToVideo",), ("WanVaceToVideo", "WanVaceToVideo"),
                                   ("WanVaceToVideo", "WanCoreVace")])
def test_vace(latents, vace_model, kinds):
    """Promise: WanVaceToVideo gives what Wan VACE gives: with control video, masks, reference image and strength; in a
    chain, also with one of ours behind it; where frames of video and masks are missing; and as many frames to trim."""
    graph = vace_model
    controls = [{"control_video": graph.picture(name), "reference_image": graph.picture(reference),
                 "control_masks": graph.add("ImageToMask", image=graph.picture(masks), channel="red")[0],
                 "strength": strength}
                for name, masks, reference, strength in (("clip", "masks", "start", 0.8),
                                                         ("other", "other_masks", "end", 0.4))]
    core = ours = None
    for kind, control in zip(kinds, controls):
        options = SIZE if kind == "WanVaceToVideo" else {**FIT, **WHOLE_RUN}
        core = graph.pair(kind, core and core[:2], **options, **control)
        ours = graph.pair("WanCoreVace", ours and ours[:2], **FIT, **WHOLE_RUN, **control)
    graph.sample("core", *core)
    graph.sample("ours", *ours)
    graph.sample("text only", graph.positive, graph.negative, ours[2], ours[3])
    found = latents(graph)
    assert found["core"].shape[2] == 1 + (FRAMES - 1) // 4
    assert difference(found["core"], found["ours"]) <= TOLERANCE
    assert difference(found["text only"], found["ours"]) > 100 * TOLERANCE


def test_vace_without_masks(latents, vace_model):
    """Promise: the same for a control video that is too short, and alone."""
    graph = vace_model
    control = {"control_video": graph.picture("other"), "strength": 1.0}
    graph.sample("core", *graph.pair("WanVaceToVideo", **SIZE, **control))
    graph.sample("ours", *graph.pair("WanCoreVace", **FIT, **WHOLE_RUN, **control))
    found = latents(graph)
    assert difference(found["core"], found["ours"]) <= TOLERANCE


@pytest.mark.skipif(not (nano.TI2V.is_file() and nano.VAE22.is_file()),
                    reason="nano TI2V and its VAE are not bundled; test_inside.py compares the latents alone")
@pytest.mark.parametrize(("start", "batch"), [("start", 1), ("five", 2), (None, 1)])
def test_ti2v(latents, pictures, start, batch):
    """Promise: Wan22ImageToVideoLatent gives what Wan Image Latent gives for TI2V, with one start frame, several or
    none, and in a batch."""
    graph = Graph("nano/wan_nano_ti2v.safetensors", "nano/wan_nano_vae22.safetensors")
    given = {"vae": graph.vae, **SIZE, "batch_size": batch}
    if start is not None:
        given["start_image"] = graph.picture(start)
    prompts = graph.positive, graph.negative
    graph.sample("core", *prompts, graph.add("Wan22ImageToVideoLatent", **given)[0])
    graph.sample("ours", *prompts, graph.add("WanCoreImageLatent", **given, fit="crop")[0])
    found = latents(graph)
    assert found["ours"].shape[0] == batch
    assert difference(found["core"], found["ours"]) <= TOLERANCE


def test_noise_mask(latents, pictures):
    """Promise: SetLatentNoiseMask on an encoded clip keeps its first frame as Wan Image Latent does."""
    graph = Graph("nano/wan_nano_t2v.safetensors")
    clip = graph.picture("clip")
    masks = graph.add("ImageToMask", image=graph.picture("first_kept"), channel="red")[0]
    encoded = graph.add("VAEEncode", pixels=clip, vae=graph.vae)[0]
    first = graph.add("ImageFromBatch", image=clip, batch_index=0, length=1)[0]
    prompts = graph.positive, graph.negative
    graph.sample("core", *prompts, graph.add("SetLatentNoiseMask", samples=encoded, mask=masks)[0])
    graph.sample("ours", *prompts, graph.add("WanCoreImageLatent", vae=graph.vae, **FIT, start_image=first)[0])
    graph.sample("unmasked", *prompts, encoded)
    found = latents(graph)
    assert difference(found["core"], found["ours"]) <= TOLERANCE
    assert difference(found["core"], found["unmasked"]) > 100 * TOLERANCE
