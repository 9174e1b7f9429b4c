"""Video files: frames to an MP4 that every player shows in the right colours, and back.

H.264 in yuv420p is what browsers, phones and editors play. RGB has to be turned into it with a matrix and a range that
the file also names, or players guess and reds shift: here BT.709 with limited ("tv") range, converted by ffmpeg's
scaler and tagged in the stream (ITU-R BT.709-6, H.264 Annex E). A clip is written beside its target and moved there
when it is complete, so a file of that name is always whole. Settings, and ComfyUI's prompt and workflow, are stored as
container tags.

ffmpeg comes with imageio-ffmpeg. It is run directly instead of through that package's generators, which neither report
a failed end of writing nor survive log lines that resemble their own.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

Chunk = Tensor | np.ndarray
Tag = str | Mapping[str, Any] | list[Any]

# Exact rounding and full chroma resolution on the way: without them solid colours come back up to 5 levels off.
_SCALER = "accurate_rnd+full_chroma_int+full_chroma_inp"
# Tags that the container adds on its own account.
_CONTAINER_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})


def write_video(
    path: str | os.PathLike,
    frames: Chunk | Iterable[Chunk],
    fps: float,
    *,
    metadata: Mapping[str, Tag] | None = None,
    crf: int = 18,
) -> Path:
    """Write an MP4 (H.264, yuv420p, BT.709 limited range) and return its path.

    path      a file name that ends in .mp4 in an existing folder; an older file of that name is replaced at the end
    frames    uint8 RGB [F, H, W, 3] with even H and W, or an iterable of such chunks, which are written as they come
    fps       frames per second
    metadata  container tags; a str is stored as it is, a dict or list as JSON. Settings belong under "comment";
              ComfyUI reads a graph from "prompt" and "workflow". See `read_metadata`.
    crf       x264's quality, 1 (best) to 51; 18 is visually lossless

    Raises ValueError for arguments that no video can be made from, and OSError when the file cannot be written (disk
    full, no permission). In both cases, and when `frames` itself raises, nothing is left behind and an older file is
    untouched.
    """
    path = check_video_path(path)
    check_fps(fps)
    if not 1 <= crf <= 51:
        raise ValueError(f"crf is {crf!r}; expected 1 (best quality) to 51 (smallest file)")
    tags = _ffmetadata(metadata or {})
    chunks = _checked(iter([frames] if isinstance(frames, Tensor | np.ndarray) else frames))
    first = next(chunks, None)
    if first is None:
        raise ValueError(f"there are no frames to write to {path}")
    with tempfile.TemporaryDirectory(prefix=".video-", dir=path.parent) as folder:
        tag_file, part = Path(folder, "tags.txt"), Path(folder, "part.mp4")
        tag_file.write_bytes(tags.encode("utf-8", errors="replace"))
        command = _encoder(part, tag_file, first.shape[2], first.shape[1], float(fps), crf)
        _run_encoder(command, chain([first], chunks), target=path)
        os.replace(part, path)
    return path


def read_video(path: str | os.PathLike) -> Tensor:
    """Read all frames of a video file as uint8 RGB [F, H, W, 3], in any format that ffmpeg decodes.

    Raises ValueError when the file is not a video or is damaged.
    """
    path = _existing(path)
    # Every PPM image carries its own size, so rotated clips need no special care.
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-xerror", "-i", f"file:{path}", "-an",
        "-fps_mode", "passthrough", "-vf", f"scale=flags={_SCALER}:out_range=pc,format=rgb24",
        "-f", "image2pipe", "-c:v", "ppm", "pipe:1",
    ]
    pixels, height, width = bytearray(), 0, 0
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            while process.stdout.readline():
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()
                pixels += process.stdout.read(height * width * 3)
        if process.returncode or not pixels:
            raise ValueError(f"{path} cannot be read as a video; it may be incomplete or of another kind. "
                             f"ffmpeg says: {_tail(errors)}")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The container tags of a video file. JSON objects and lists are parsed, all other values are str.

    Tags that the container writes on its own account (brands, encoder) are left out. Raises ValueError when the file
    is not a video.
    """
    path = _existing(path)
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", f"file:{path}",
        "-map_metadata:g", "0:g", "-map_chapters", "-1", "-f", "ffmetadata", "pipe:1",
    ]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        message = result.stderr.decode(errors="replace").strip()
        raise ValueError(f"{path} cannot be read as a video. ffmpeg says: {message}")
    tags = _parse_ffmetadata(result.stdout.decode(errors="replace"))
    return {key: _parse_tag(value) for key, value in tags.items() if key not in _CONTAINER_TAGS}


def to_uint8(frames: Tensor, low: float = -1.0) -> Tensor:
    """Pixels in [low, 1] as uint8 of the same layout, rounded to the nearest level; values outside are clamped.

    low is -1 for what the VAE decodes and 0 for ComfyUI's IMAGE. NaN becomes black and is logged.
    """
    if low not in (-1, 0):
        raise ValueError(f"low is {low!r}; expected -1 for pixels in [-1, 1] or 0 for pixels in [0, 1]")
    if not frames.is_floating_point():
        raise ValueError(f"to_uint8 got {frames.dtype}; expected floating-point pixels in [{low}, 1]")
    scale = 255 / (1 - low)
    levels = frames.float().sub(low).mul_(scale).round_().clamp_(0, 255)
    if levels.isnan().any():
        log.warning("%d of %d pixel values are NaN and are shown black", levels.isnan().sum(), levels.numel())
        levels = levels.nan_to_num_(0)
    return levels.to(torch.uint8)


def check_video_path(path: str | os.PathLike) -> Path:
    """Refuse, before hours of work, a name that no video can be written to. Returns the path."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'!r}; videos are written as .mp4")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; create it or choose another one")
    return path


def check_fps(fps: float) -> None:
    """Raise ValueError for a rate that no video can have."""
    if not (isinstance(fps, Real) and 0 < fps <= 1000):
        raise ValueError(f"fps is {fps!r}; expected a number above 0 and up to 1000")


def _checked(chunks: Iterator[Chunk]) -> Iterator[np.ndarray]:
    """Chunks as contiguous arrays [n, H, W, 3] of one size; those without frames are passed over."""
    size = None
    for chunk in chunks:
        array = chunk.cpu().numpy() if isinstance(chunk, Tensor) else np.asarray(chunk)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"frames came as {array.dtype} {list(array.shape)}; expected uint8 [F, H, W, 3] "
                             "(see to_uint8)")
        height, width = array.shape[1:3]
        if height % 2 or width % 2 or not height * width:
            raise ValueError(f"frames are {width}x{height}; H.264 in yuv420p needs an even width and height")
        if size not in (None, (height, width)):
            raise ValueError(f"frames changed from {size[1]}x{size[0]} to {width}x{height}; all need one size")
        size = height, width
        if len(array):
            yield np.ascontiguousarray(array)


def _encoder(part: Path, tag_file: Path, width: int, height: int, fps: float, crf: int) -> list[str]:
    """The command that turns RGB frames on standard input into a tagged MP4."""
    return [
        imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", str(fps), "-i", "pipe:0",
        # From a file, as a workflow can be longer than a command line may be.
        "-f", "ffmetadata", "-i", f"file:{tag_file}", "-map", "0:v", "-map_metadata", "1",
        "-vf", f"scale=flags={_SCALER}:in_range=pc:out_range=tv:out_color_matrix=bt709,format=yuv420p,"
               "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
        "-c:v", "libx264", "-crf", str(crf),
        # The index first, so that a browser plays while it loads; tags of any name, as ComfyUI writes them.
        "-movflags", "+faststart+use_metadata_tags", "-f", "mp4", f"file:{part}",
    ]


def _run_encoder(command: list[str], arrays: Iterable[np.ndarray], target: Path) -> None:
    """Feed the encoder; kill it when `arrays` raises, and turn its failure into an OSError that says why."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            for array in arrays:
                try:
                    process.stdin.write(array)
                except OSError:
                    # The encoder has stopped reading; its exit status and messages tell why.
                    break
        except BaseException:
            process.kill()
            raise
        finally:
            with suppress(OSError):
                process.stdin.close()
            code = process.wait()
        if code:
            reason = f"signal {-code}" if code < 0 else f"status {code}"
            free = shutil.disk_usage(target.parent).free / 2**20
            raise OSError(f"could not write {target}: ffmpeg ended with {reason} and says: {_tail(errors)}. "
                          f"Is the disk full ({free:.0f} MiB are free), or is there a limit on the size of files?")


def _tail(errors: IO[bytes]) -> str:
    """The end of what ffmpeg wrote to a file; the last lines name the cause."""
    errors.seek(0)
    return " / ".join(errors.read().decode(errors="replace").strip().splitlines()[-3:]) or "nothing"


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the name of a video file")
    return path


def _ffmetadata(tags: Mapping[str, Tag]) -> str:
    """Tags in ffmpeg's metadata format, in which = ; # \\ and line ends are escaped by a backslash."""
    lines = [";FFMETADATA1"]
    for key, value in tags.items():
        if not isinstance(key, str) or not key or key in _CONTAINER_TAGS:
            raise ValueError(f"metadata has the key {key!r}; expected a non-empty str other than "
                             f"{', '.join(sorted(_CONTAINER_TAGS))}")
        if not isinstance(value, str | Mapping | list):
            raise ValueError(f"metadata[{key!r}] is a {type(value).__name__}; expected str, dict or list")
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata[{key!r}] cannot be stored as JSON: {error}") from error
        lines.append(f"{_escape(key)}={_escape(text)}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return re.sub(r"[=;#\\\n\r]", r"\\\g<0>", text)


def _parse_ffmetadata(text: str) -> dict[str, str]:
    """Keys and values of ffmpeg's metadata format, where a backslash may also precede the end of a line."""
    pairs = re.findall(r"^([^\\\n=]*(?:\\.[^\\\n=]*)*)=([^\\\n]*(?:\\.[^\\\n]*)*)$", text, re.DOTALL | re.MULTILINE)
    return {_unescape(key): _unescape(value) for key, value in pairs}


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _parse_tag(value: str) -> Any:
    if value.startswith(("{", "[")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
