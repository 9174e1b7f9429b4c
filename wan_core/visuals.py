"""What a model is shown beside the prompt, and what becomes of it: conditions, a latent to start from, a mask.

Each kind of model takes pictures in its own way: image-to-video models as channels and CLIP features, TI2V as the first
latent frames, VACE as controls, and all of them a video to start from. Everything is checked before it is encoded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditioning import (
    FITS,
    Condition,
    ImageChannels,
    ImageTokens,
    VaceCondition,
    best_size,
    check_room,
    check_values,
    encode_control,
    encode_known_frames,
    fit,
    known_start,
    masks_for,
    size_for_area,
)
from .models import Model, VideoVAE, VisionEncoder

# What each type of model takes.
_TAKES = {"t2v": (), "i2v": ("start", "end"), "flf2v": ("start", "end"), "ti2v": ("start",),
          "vace": ("control", "mask", "references")}
_MEANING = {"start": "a start image", "end": "an end image", "control": "a control video", "mask": "a control mask",
            "references": "a reference image"}


@dataclass(frozen=True, eq=False)
class Visuals:
    """Pictures and videos given with a prompt, all [F, 3, H, W] in [-1, 1] and of any size.

    `start` and `end`: the first and the last frame, or several. `control`: the control video of VACE, with `mask` [F,
    1, H, W] in 0..1 (1 where the video is made anew; one frame holds for all) and `references`, one picture a frame.
    What of both goes beyond the video is left away, and where they are shorter the rest of the video is free.
    `video`: a clip to start from, of which `denoise` (0..1) is made anew. `how` is "crop" or "stretch"; None takes the
    official way of the model: stretched where the video's size follows the picture, else cut. Raises ValueError for
    other shapes, types or values.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    control: Tensor | None = None
    mask: Tensor | None = None
    references: Tensor | None = None
    video: Tensor | None = None
    denoise: float = 1.0
    how: str | None = None

    def __post_init__(self) -> None:
        for name in (*_MEANING, "video"):
            if getattr(self, name) is not None:
                _check_pictures(name, getattr(self, name))
        if self.how not in (None, *FITS):
            raise ValueError(f"unknown way to fit a picture {self.how!r}; choose one of {', '.join(FITS)}.")

    def check(self, model: Model, frames: int) -> None:
        """Raise ValueError for what `model` does not take, and for pictures without room in a clip of `frames`."""
        taken = _TAKES[model.spec.model_type]
        for name, meaning in _MEANING.items():
            if getattr(self, name) is not None and name not in taken:
                can = ", ".join(kind for kind, takes in _TAKES.items() if name in takes)
                raise ValueError(f"{model.preset.title} takes no {meaning.partition(' ')[2]}; models of type {can} do.")
        check_room(frames, *(0 if part is None else len(part) for part in (self.start, self.end)))
        if self.mask is not None and self.control is None:
            raise ValueError("a control mask was given without the control video that it belongs to; give both.")
        if self.video is None and self.denoise != 1:
            raise ValueError(f"denoise is {self.denoise}, and there is no video to keep a part of; give one, or leave "
                             "denoise at 1.")
        if self.video is not None and len(self.video) < frames:
            raise ValueError(f"the video to start from has {len(self.video)} frames, and {frames} are to be made; "
                             "make fewer, or give a longer one.")

    def size(self, model: Model) -> tuple[int, int]:
        """Width and height of the video: the preset's, or at its area with the aspect ratio of the first picture."""
        sampling = model.preset.sampling
        pictures = (self.start, self.end, self.video, self.control)
        picture = next((picture for picture in pictures if picture is not None), None)
        if picture is None:
            return sampling.width, sampling.height
        choose = best_size if model.spec.model_type == "ti2v" else size_for_area
        grid = 2 * model.vae_spec.spatial_stride
        return choose(picture.shape[3], picture.shape[2], sampling.width * sampling.height, grid)


def _check_pictures(name: str, given: Tensor) -> None:
    channels, low = (1, 0) if name == "mask" else (3, -1)
    expected = f"expected a floating-point tensor [frames, {channels}, height, width] with values from {low} to 1."
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}; {expected}")
    if given.ndim != 4 or given.shape[1] != channels or 0 in given.shape:
        raise ValueError(f"{name} has shape {list(given.shape)}; {expected}")
    # Masks are often boolean; whole numbers in a picture mean another range.
    if name != "mask" and not given.is_floating_point():
        raise ValueError(f"{name} holds {str(given.dtype).removeprefix('torch.')}; {expected}")
    check_values(name, given, low, 1)


@dataclass(frozen=True, eq=False)
class Shown:
    """What visuals become for one run: conditions beside both prompts, raw latents [1, C, T, H, W] to start from, the
    mask of what of them is made anew, and how many latent frames at the beginning are not part of the video."""

    beside: tuple[Condition, ...]
    latents: Tensor
    mask: Tensor | None = None
    trim: int = 0


def show(visuals: Visuals, model: Model, vae: VideoVAE, clip_vision: VisionEncoder | None, shape: tuple[int, ...],
         on_piece: Callable[[], None] | None = None) -> Shown:
    """Encode checked `visuals` for latents of `shape` [1, C, T, H, W].

    `clip_vision` is used where the model takes CLIP features. `on_piece` is called after each piece that the VAE has
    encoded and may raise to stop.
    """
    spec, stride = model.spec, model.vae_spec.spatial_stride
    height, width = shape[3] * stride, shape[4] * stride
    frames = 1 + (shape[2] - 1) * model.vae_spec.temporal_stride
    follows = visuals.start is not None and visuals.size(model) == (width, height)
    how = visuals.how or ("stretch" if follows and spec.model_type in ("i2v", "flf2v") else "crop")

    def encode(video: Tensor) -> Tensor:
        return vae.encode(video, on_piece)

    def fitted(pictures: Tensor | None) -> Tensor | None:
        return None if pictures is None else fit(pictures, width, height, how)

    latents = torch.zeros(shape)
    if visuals.video is not None:
        latents = encode(fitted(visuals.video[:frames]).movedim(0, 1)[None])
    start, end = fitted(visuals.start), fitted(visuals.end)
    if spec.model_type in ("i2v", "flf2v") and (start is not None or end is not None):
        channels = ImageChannels.of(encode_known_frames(encode, frames, start, end), model.latent_stats)
        return Shown((channels, *_image_tokens(visuals, clip_vision)), latents)
    if spec.model_type == "ti2v" and start is not None:
        return Shown((), *known_start(encode, latents, start))
    if spec.model_type == "vace" and (visuals.control is not None or visuals.references is not None):
        return _controlled(visuals, encode, model, latents, (frames, height, width), how)
    return Shown((), latents)


def _image_tokens(visuals: Visuals, clip_vision: VisionEncoder | None) -> tuple[Condition, ...]:
    """CLIP features of the first start and the last end image, as they were given: the encoder resizes by itself."""
    if clip_vision is None:
        return ()
    shown = [picture[[index]] for picture, index in ((visuals.start, 0), (visuals.end, -1)) if picture is not None]
    return (ImageTokens(torch.cat([clip_vision.encode(picture).cpu() for picture in shown], 1)),)


def _controlled(visuals: Visuals, encode: Callable[[Tensor], Tensor], model: Model, latents: Tensor,
                size: tuple[int, int, int], how: str) -> Shown:
    frames, height, width = size
    video = torch.zeros(frames, 3, height, width)
    mask = None
    if visuals.control is not None:
        given = fit(visuals.control[:frames], width, height, how)
        video[:len(given)] = given
    if visuals.mask is not None:
        mask = masks_for(visuals.mask, width, height, frames, how)
    references = []
    if visuals.references is not None:
        references = [picture[:, None] for picture in fit(visuals.references, width, height, how)]
    control = encode_control(encode, model.latent_stats, model.vae_spec.spatial_stride, video.movedim(0, 1), mask,
                             references)
    room = latents.new_zeros(*latents.shape[:2], control.references, *latents.shape[3:])
    if latents.count_nonzero():
        room = control.frames[:, :latents.shape[1], :control.references]
    return Shown((VaceCondition.of(control, model.latent_stats),), torch.cat([room, latents], 2),
                 trim=control.references)
