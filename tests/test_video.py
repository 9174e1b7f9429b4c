"""Video files: pixels, colours and tags survive; a file is whole or not there; bad input is named."""

import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from wan_core.video import check_video_path, read_metadata, read_video, to_uint8, write_video

SOLID = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (210, 40, 220)]


def _moving_square(frames=9, height=48, width=64):
    clip = torch.full((frames, height, width, 3), 30, dtype=torch.uint8)
    for index in range(frames):
        clip[index, 16:32, 4 * index : 4 * index + 16] = torch.tensor([200, 60, 40], dtype=torch.uint8)
    return clip


def _planes(path):
    """Width, height and the untouched Y, Cb, Cr planes of the first frame, read by imageio-ffmpeg itself."""
    reader = imageio_ffmpeg.read_frames(path, pix_fmt="yuv420p", bits_per_pixel=12)
    info = next(reader)
    data = np.frombuffer(next(reader), dtype=np.uint8)
    reader.close()
    count = info["size"][0] * info["size"][1]
    return info, data[:count], data[count : count * 5 // 4], data[count * 5 // 4 :]


def _snr(first, second):
    """Peak signal-to-noise ratio in dB of two uint8 clips."""
    return -10 * torch.log10((first.float() - second.float()).square().mean() / 255**2).item()


@pytest.mark.parametrize("colour", SOLID)
def test_solid_colours_come_back(tmp_path, colour):
    """Red stays red: no channel of a solid colour is off by more than two levels."""
    clip = torch.tensor(colour, dtype=torch.uint8).expand(5, 32, 32, 3)
    back = read_video(write_video(tmp_path / "solid.mp4", clip, 16))
    assert back.shape == clip.shape and back.dtype == torch.uint8
    assert (back.float() - clip.float()).abs().max() <= 2


@pytest.mark.parametrize("colour", SOLID)
def test_stored_planes_are_bt709_limited_range(tmp_path, colour):
    """The stored luma and chroma are what ITU-R BT.709 prescribes for 8 bits and limited range."""
    clip = np.broadcast_to(np.array(colour, dtype=np.uint8), (2, 32, 32, 3))
    info, *planes = _planes(write_video(tmp_path / "solid.mp4", clip, 16))
    red, green, blue = (level / 255 for level in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
    for plane, level in zip(planes, expected, strict=True):
        assert abs(plane.astype(float).mean() - level) <= 1.5


def test_stream_is_tagged(tmp_path):
    """The stream says H.264, yuv420p, limited range, BT.709, its size and its rate: players have nothing to guess."""
    info, *_ = _planes(write_video(tmp_path / "clip.mp4", _moving_square(), 24))
    assert info["codec"] == "h264"
    assert info["pix_fmt"].startswith("yuv420p(tv, bt709")
    assert "unknown" not in info["pix_fmt"]
    assert info["size"] == (64, 48) and info["fps"] == 24


@pytest.mark.parametrize("fps", [1, 16, 23.976, np.float32(30), 60])
def test_every_frame_comes_back_at_its_rate(tmp_path, fps):
    """The number of frames and the duration are right for whole and fractional rates."""
    clip = _moving_square()
    path = write_video(tmp_path / "clip.mp4", clip, fps)
    back = read_video(path)
    assert back.shape == clip.shape
    assert _snr(back, clip) > 28
    info, *_ = _planes(path)
    assert info["fps"] == pytest.approx(float(fps), rel=1e-3)


def test_one_frame_is_a_video(tmp_path):
    """A still image of one frame can be written and read."""
    assert read_video(write_video(tmp_path / "one.MP4", _moving_square(1), 16)).shape == (1, 48, 64, 3)


def test_chunks_give_the_same_file_as_the_whole(tmp_path):
    """Frames may come in chunks of any length, as arrays or tensors; the bytes are those of one write."""
    clip = _moving_square()
    whole = write_video(tmp_path / "whole.mp4", clip, 16)
    pieces = (piece for piece in (clip[:1], clip[1:1], clip[1:5].numpy(), clip.flip(0).flip(0)[5:]))
    assert write_video(tmp_path / "pieces.mp4", pieces, 16).read_bytes() == whole.read_bytes()


def test_frames_are_taken_one_chunk_at_a_time(tmp_path):
    """The writer asks for the next chunk after it has passed the last one on, and holds none back."""
    clip, held = _moving_square(64, 256, 256), []

    def chunks():
        for index in range(64):
            held.append(list(tmp_path.iterdir()))
            yield clip[index : index + 1]

    write_video(tmp_path / "clip.mp4", chunks(), 16)
    assert [len(names) for names in held[1:]] == [1] * 63
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_quality_follows_crf(tmp_path):
    """A lower crf gives a larger file that is closer to the frames."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (4, 64, 64, 3), generator=generator).to(torch.uint8)
    fine = write_video(tmp_path / "fine.mp4", clip, 16, crf=5)
    coarse = write_video(tmp_path / "coarse.mp4", clip, 16, crf=45)
    assert fine.stat().st_size > 2 * coarse.stat().st_size
    assert _snr(read_video(fine), clip) > _snr(read_video(coarse), clip)


def test_metadata_round_trip(tmp_path):
    """Settings, a workflow longer than any command line, and awkward letters come back exactly."""
    metadata = {
        "comment": {"prompt": "a red circle; moving = left #1 \\ \n\r\t\"quoted\" 红色的圆", "steps": 20, "shift": 5.0,
                    "solver": None},
        "workflow": {"nodes": [{"id": index, "text": "=;#\\\n" * 50} for index in range(1000)]},
        "prompt": [1, "two", {"three": []}],
        "title": " = back\\slash; [hash] # \r\n second line ",
        "odd=key;#": "plain",
    }
    path = write_video(tmp_path / "clip.mp4", _moving_square(2), 16, metadata=metadata)
    assert read_metadata(path) == metadata


def test_tags_are_where_comfyui_looks(tmp_path):
    """Workflow tags are stored by their name in the index, before the pictures, as ComfyUI's own files have them."""
    path = write_video(tmp_path / "clip.mp4", _moving_square(2), 16, metadata={"workflow": {"version": 0.4}})
    data = path.read_bytes()
    assert b"mdta" in data and b'{"version": 0.4}' in data
    assert data.index(b"moov") < data.index(b"workflow") < data.index(b"mdat")


def test_text_that_only_looks_like_json_stays_text(tmp_path):
    """A tag in brackets that is no JSON is read as the text that it is; without tags there are none."""
    path = write_video(tmp_path / "clip.mp4", _moving_square(2), 16, metadata={"comment": "[not json"})
    assert read_metadata(path) == {"comment": "[not json"}
    assert read_metadata(write_video(tmp_path / "bare.mp4", _moving_square(2), 16)) == {}


def test_a_failing_source_leaves_the_old_file(tmp_path):
    """When the frames stop with an error, that error arrives, the old file is untouched and nothing is left over."""
    path = write_video(tmp_path / "clip.mp4", _moving_square(2), 16)
    before = path.read_bytes()

    def chunks():
        yield _moving_square(2)
        raise OSError("the decoder failed")

    with pytest.raises(OSError, match="the decoder failed"):
        write_video(path, chunks(), 16)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_permissions_are_the_usual_ones(tmp_path):
    """The moved file is as readable as any file that the user creates."""
    (tmp_path / "usual").touch()
    path = write_video(tmp_path / "clip.mp4", _moving_square(2), 16)
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_full_disk(tmp_path):
    """When the file cannot grow, an OSError says so, the old file is untouched and nothing is left over."""
    pytest.importorskip("resource", reason="limits on file size are a POSIX feature")
    path = write_video(tmp_path / "clip.mp4", _moving_square(2), 16)
    before = path.read_bytes()
    script = """
import resource, sys
import torch
from wan_core.video import write_video
noise = torch.randint(0, 256, (2, 128, 128, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_video(sys.argv[1], (noise for _ in range(100)), 16)
except OSError as error:
    sys.stdout.write(str(error))
"""
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", script, os.fspath(path)], cwd=root, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout and "disk full" in result.stdout and "MiB are free" in result.stdout
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _clip(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(("frames", "message"), [
    (_clip(2, 31, 32, 3), "32x31"),
    (_clip(2, 32, 31, 3), "31x32"),
    (_clip(2, 0, 32, 3), "32x0"),
    (_clip(2, 32, 32, 3, dtype=torch.float32), "float32"),
    (_clip(2, 3, 32, 32), r"\[2, 3, 32, 32\]"),
    (_clip(32, 32, 3), r"\[32, 32, 3\]"),
    (_clip(0, 32, 32, 3), "no frames"),
    ([], "no frames"),
    ([_clip(1, 32, 32, 3), _clip(1, 32, 64, 3)], "changed from 32x32 to 64x32"),
])
def test_bad_frames_are_named(tmp_path, frames, message):
    """Frames that no video can be made of are a ValueError that says what came; no file appears."""
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames, 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [
    ({"fps": 0}, "fps is 0"),
    ({"fps": -16}, "fps is -16"),
    ({"fps": float("nan")}, "fps is nan"),
    ({"fps": "16"}, "fps is '16'"),
    ({"crf": 0}, "crf is 0"),
    ({"crf": 52}, "crf is 52"),
    ({"metadata": {"comment": 5}}, "int; expected str, dict or list"),
    ({"metadata": {"comment": {"tensor": torch.zeros(1)}}}, "cannot be stored as JSON"),
    ({"metadata": {"": "x"}}, "the key ''"),
    ({"metadata": {"encoder": "x"}}, "the key 'encoder'"),
])
def test_bad_options_are_named(tmp_path, options, message):
    """A wrong rate, quality or tag is a ValueError before any frame is asked for."""

    def untouched():
        raise AssertionError("frames were asked for")
        yield

    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", untouched(), **{"fps": 16, **options})


def test_bad_paths_are_named(tmp_path):
    """Other suffixes, missing folders and folders are refused before any frame is asked for."""
    (tmp_path / "folder.mp4").mkdir()
    for name, message in (("clip.gif", "'.gif'"), ("clip", "no suffix"), ("folder.mp4", "is a folder"),
                          ("missing/clip.mp4", "does not exist")):
        with pytest.raises(ValueError, match=message):
            check_video_path(tmp_path / name)
    with pytest.raises(ValueError, match="'.webm'"):
        write_video(tmp_path / "clip.webm", [], 16)


def test_names_that_ffmpeg_could_misread(tmp_path, monkeypatch):
    """Names that look like options, protocols or patterns are plain file names."""
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "http:clip.mp4", "clip%03d.mp4", "mit Leerzeichen 'ü'.mp4"):
        write_video(name, _moving_square(2), 16, metadata={"comment": {"name": name}})
        assert read_video(name).shape[0] == 2 and read_metadata(name) == {"comment": {"name": name}}


def test_files_that_are_no_videos(tmp_path):
    """A missing, foreign or truncated file is a ValueError that names the file."""
    foreign, cut = tmp_path / "foreign.mp4", tmp_path / "cut.mp4"
    foreign.write_text("not a video")
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (8, 64, 64, 3), generator=generator).to(torch.uint8)
    whole = write_video(tmp_path / "whole.mp4", clip, 16).read_bytes()
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    for path, message in ((tmp_path / "missing.mp4", "is not a file"), (foreign, "foreign.mp4 cannot be read"),
                          (cut, "cut.mp4 cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_video(path)
    for path in (tmp_path / "missing.mp4", foreign):
        with pytest.raises(ValueError, match=path.name):
            read_metadata(path)


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_to_uint8_is_the_nearest_level(low):
    """All 256 levels survive in every layout, halfway values go to a neighbour, and values outside are clamped."""
    levels = torch.arange(256).view(4, 8, 8)
    pixels = levels / 255 * (1 - low) + low
    assert torch.equal(to_uint8(pixels, low), levels.to(torch.uint8))
    assert torch.equal(to_uint8(pixels + 0.4 / 255 * (1 - low), low), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([low - 1, 2.0, torch.inf, -torch.inf]), low).tolist() == [0, 255, 255, 0]
    assert to_uint8(torch.ones(2, dtype=torch.bfloat16), low).tolist() == [255, 255]


def test_to_uint8_leaves_its_input_alone():
    """The frames handed in are not changed."""
    pixels = torch.linspace(-2, 2, 9)
    before = pixels.clone()
    to_uint8(pixels)
    assert torch.equal(pixels, before)


def test_nan_becomes_black_and_is_logged(caplog):
    """NaN from a failed run does not become random pixels, and the log says how many there were."""
    assert to_uint8(torch.tensor([torch.nan, 1.0])).tolist() == [0, 255]
    assert "1 of 2 pixel values are NaN" in caplog.text


@pytest.mark.parametrize(("frames", "low", "message"), [(torch.zeros(1), 0.5, "low is 0.5"),
                                                        (_clip(1), -1.0, "torch.uint8")])
def test_to_uint8_refuses_other_ranges(frames, low, message):
    """Only the two pixel ranges in use are accepted, and only floating point."""
    with pytest.raises(ValueError, match=message):
        to_uint8(frames, low)
