"""Options that give pictures and videos."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..conditioning import FITS
from ..video import read_video
from ..visuals import Visuals


def add_pictures(make: argparse.ArgumentParser) -> None:
    """Add the options of pictures and videos."""
    shown = make.add_argument_group("pictures and videos", "files of any format that ffmpeg reads")
    shown.add_argument("--image", type=Path, help="start image (of a video: all of its frames are continued)")
    shown.add_argument("--end-image", type=Path, help="end image")
    shown.add_argument("--control", type=Path, help="VACE: control video, or the video to change")
    shown.add_argument("--mask", type=Path, help="VACE: picture or video that is white where the video is made anew")
    shown.add_argument("--reference", type=Path, action="append", help="VACE: picture of what is to appear; repeatable")
    shown.add_argument("--video", type=Path, help="video to start from, with --denoise")
    shown.add_argument("--denoise", type=float, default=1.0, help="how much of --video is made anew, 0 to 1")
    shown.add_argument("--fit", choices=list(FITS), help="how pictures are brought to the video's size")


def visuals(options: argparse.Namespace) -> Visuals:
    """What is given of pictures and videos."""
    def pictures(path: Path | None) -> Tensor | None:
        return None if path is None else read_video(path).movedim(-1, 1).float() / 127.5 - 1

    references = [pictures(path) for path in options.reference or ()]
    if len({reference.shape[2:] for reference in references}) > 1:
        raise ValueError("reference pictures must have one size, got "
                         f"{', '.join(f'{r.shape[3]}x{r.shape[2]}' for r in references)}.")
    mask = pictures(options.mask)
    return Visuals(start=pictures(options.image), end=pictures(options.end_image), control=pictures(options.control),
                   mask=None if mask is None else (mask.mean(1, keepdim=True) + 1) / 2,
                   references=torch.cat(references) if references else None, video=pictures(options.video),
                   denoise=options.denoise, how=options.fit)
