"""The node that writes a video file."""

import json
from collections.abc import Iterator

from torch import Tensor

from ..wan_core.video import to_uint8, write_video
from .host import HOST, Advance

# Frames that are converted at a time.
CHUNK = 16


class WanCoreSaveVideo:
    """Frames to an MP4 file."""

    DESCRIPTION = ("Writes the frames as an MP4 (H.264, the right colours in every player) into ComfyUI's output "
                   "folder and shows it. The workflow is stored in the file: drop the file on the page to get it back.")
    CATEGORY = "Wan/video"
    SEARCH_ALIASES = ["wan", "save video", "video combine", "mp4", "h264", "export", "preview video"]
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The frames, of even width and height."}),
                "fps": ("FLOAT", {
                    "default": 16.0, "min": 0.1, "max": 240.0, "step": 0.1,
                    "tooltip": "Frames per second: 16 for Wan 2.1 and 2.2 14B models, 8 for nano."}),
                "filename_prefix": ("STRING", {
                    "default": "video/Wan",
                    "tooltip": "Folder and beginning of the file's name, in the output folder; a number follows. "
                               "%width%, %height%, %year%, %month%, %day% and the like are filled in."}),
                "crf": ("INT", {
                    "default": 18, "min": 1, "max": 51,
                    "tooltip": "Quality: 18 is visually lossless, 23 half the size, 51 the worst. 1 the best."}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save(self, images: Tensor, fps: float, filename_prefix: str, crf: int, prompt: dict | None = None,
             extra_pnginfo: dict | None = None) -> dict:
        if images.ndim != 4 or images.shape[-1] < 3 or 0 in images.shape:
            raise ValueError(f"the frames have shape {list(images.shape)}; expected [frames, height, width, 3].")
        target = HOST.save_target(filename_prefix, ".mp4", width=images.shape[2], height=images.shape[1])
        metadata = {}
        if HOST.stores_workflows():
            metadata = {**(extra_pnginfo or {}), **({"prompt": prompt} if prompt else {})}
            # Any JSON value may be among them; the core stores all of them as JSON, too.
            metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
        with HOST.progress(len(images), "Wan save video") as advance:
            write_video(target.path, _levels(images, advance), fps, metadata=metadata, crf=crf)
        return {"ui": {"images": [target.entry], "animated": (True,)}}


def _levels(images: Tensor, advance: Advance) -> Iterator[Tensor]:
    for chunk in images[..., :3].split(CHUNK):
        HOST.check_interrupt()
        yield to_uint8(chunk, low=0)
        for _ in chunk:
            advance()
