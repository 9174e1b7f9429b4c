"""How well the nano models do what a prompt and a picture say, measured on pixels of held-out prompts and fixed seeds.

Each prompt is sampled with the preset's settings and its own seed, decoded and looked at by `score`, which knows
nothing of the prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import QUALITIES, EasyCache, MagCache, Report, TeaCache
from ..conditioning import TextCondition
from ..models import Model, TextEncoder, VideoVAE, VisionEncoder
from ..pipeline import generate, initial_noise, latent_shape, sample
from ..sampling import Conditions, Guidance, Step, make_schedule
from ..visuals import Visuals
from ..weights import TARGETS
from .nano_vace import box_mask
from .score import Observation, agreement, score
from .shapes import COLOURS, SIZE, Scene, caption, coverage, held_out_scenes, render

BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """Percentages of clips with the right colour, direction and shape, and with all three right."""

    guidance: tuple[float, float]
    prompts: int
    colour: float
    direction: float
    shape: float


def evaluate(model: Model, vae: VideoVAE, text_encoder: TextEncoder, *, guidance: tuple[float, float] | None = None,
             prompts: int = 64, steps: int | None = None) -> Evaluation:
    """Scores over the first `prompts` held-out scenes; `guidance` (high, low) and `steps` default to the preset's."""
    guidance, scenes = guidance or _guidance(model), held_out_scenes(prompts)
    clips = _clips(model, vae, text_encoder, scenes, guidance, steps)
    return Evaluation(guidance, prompts, *_percentages([_seen(clip) for clip in clips], scenes))


@dataclass(frozen=True)
class FormatEvaluation(Evaluation):
    """The same for a model with quantised weights: bytes of its weights, and PSNR in dB of its clips to those of the
    model as it is stored, from the same noise."""

    megabytes: float
    psnr_db: float | None


# Beside the formats: the same weights multiplied in FP8 instead of being turned into numbers first.
FP8_PRODUCTS = ("fp8_scaled", "fp8_scaled_rows")


def evaluate_formats(model: Model, vae: VideoVAE, text_encoder: TextEncoder, *,
                     prompts: int = 512) -> Iterator[tuple[str, FormatEvaluation]]:
    """Scores of a text-to-video model as it is stored, in each format that it can be brought into, and multiplied in
    FP8, one after the other."""
    choices = {"stored": model, **{form: model.quantised(form) for form in TARGETS},
               **{f"{form}, FP8 products": replace(model.quantised(form), fp8_products="on") for form in FP8_PRODUCTS}}
    scenes, reference = held_out_scenes(prompts), None
    for name, chosen in choices.items():
        clips = torch.stack(list(_clips(chosen, vae, text_encoder, scenes, _guidance(model))))
        scores, reference = _compared(clips, reference, scenes)
        yield name, FormatEvaluation(_guidance(model), prompts, *scores[:3],
                                     round(chosen.low.size(torch.bfloat16) / 1e6, 3), scores[3])


@dataclass(frozen=True)
class CacheEvaluation(Evaluation):
    """The same for a model with a step cache: percentage of the transformer's passes that were reused, and PSNR in dB
    of its clips to those of the whole run from the same noise."""

    steps: int
    reused: float
    psnr_db: float | None


def evaluate_caches(model: Model, vae: VideoVAE, text_encoder: TextEncoder, *, steps: int = 30, prompts: int = 256,
                    qualities: Sequence[str] = QUALITIES) -> Iterator[tuple[str, CacheEvaluation]]:
    """Scores of a text-to-video model without a step cache and with each, in every quality, one after the other."""
    preset = model.preset.name
    choices = {"none": None}
    for quality in qualities:
        choices |= {f"TeaCache, {quality}": TeaCache.for_preset(preset, quality),
                    f"MagCache, {quality}": MagCache.for_preset(preset, quality),
                    f"EasyCache, {quality}": EasyCache.of_quality(quality)}
    scenes, reference = held_out_scenes(prompts), None
    for name, cache in choices.items():
        passes = {}

        def on_step(step: Step, passes: dict[int, tuple[Sequence[str], Sequence[str]]] = passes) -> None:
            passes[len(passes)] = step.branches, step.reused

        clips = torch.stack(list(_clips(replace(model, cache=cache), vae, text_encoder, scenes, _guidance(model),
                                        steps, on_step)))
        scores, reference = _compared(clips, reference, scenes)
        reused = round(100 * Report.of(passes).share, 1)
        yield name, CacheEvaluation(_guidance(model), prompts, *scores[:3], steps, reused, scores[3])


def _compared(clips: Tensor, reference: Tensor | None,
              scenes: Sequence[Scene]) -> tuple[tuple[float, float, float, float | None], Tensor]:
    """Percentages of `clips` and their PSNR to the reference, which they are themselves if there is none."""
    psnr = None if reference is None else round(_psnr(clips, reference), 2)
    return (*_percentages([_seen(clip) for clip in clips], scenes), psnr), clips if reference is None else reference


@dataclass(frozen=True)
class PictureEvaluation(Evaluation):
    """The same for clips that begin with a given picture, and how near their first frame is to it (mean, in dB)."""

    first_frame_psnr_db: float


def evaluate_pictures(model: Model, vae: VideoVAE, text_encoder: TextEncoder, clip_vision: VisionEncoder | None = None,
                      *, prompts: int = 64) -> PictureEvaluation:
    """Scores over held-out scenes of which the first frame is given."""
    scenes, observations, psnr = held_out_scenes(prompts), [], []
    for seed, scene in enumerate(scenes):
        start = render([scene], side=model.preset.sampling.width)[0, :, :1].movedim(1, 0)
        clip = _made(caption(scene), Visuals(start=start), seed, model, vae, text_encoder, clip_vision)
        observations.append(_seen(clip))
        psnr.append(_psnr(clip[:, :1], start.movedim(1, 0)))
    return PictureEvaluation(_guidance(model), prompts, *_percentages(observations, scenes),
                             round(sum(psnr) / prompts, 2))


@dataclass(frozen=True)
class InpaintingEvaluation(Evaluation):
    """The same for clips of which a box is made anew, and how near all outside of it stays to the given clip, in dB."""

    unmasked_psnr_db: float


def evaluate_inpainting(model: Model, vae: VideoVAE, text_encoder: TextEncoder, *,
                        prompts: int = 64) -> InpaintingEvaluation:
    """Scores of a VACE model over held-out scenes that are repainted in part.

    Where the box covers all of the shape's way the prompt asks for another colour in it; elsewhere for what is there.
    """
    generator = torch.Generator().manual_seed(0)
    scenes, observations, psnr = [], [], []
    for seed, scene in enumerate(held_out_scenes(prompts)):
        clip, mask = render([scene])[0], box_mask(scene, generator)
        if not (coverage([scene])[0] * (1 - mask)).any():
            colours = tuple(COLOURS)
            scene = replace(scene, colour=colours[(colours.index(scene.colour) + len(colours) // 2) % len(colours)])
        visuals = Visuals(control=(clip * (1 - mask)).movedim(1, 0), mask=mask.movedim(1, 0))
        made = _made(caption(scene), visuals, seed, model, vae, text_encoder)
        scenes.append(scene)
        observations.append(_seen(made))
        psnr.append(_psnr(made, clip, 1 - mask))
    return InpaintingEvaluation(_guidance(model), prompts, *_percentages(observations, scenes),
                                round(sum(psnr) / prompts, 2))


def _made(prompt: str, visuals: Visuals, seed: int, model: Model, vae: VideoVAE, text_encoder: TextEncoder,
          clip_vision: VisionEncoder | None = None) -> Tensor:
    """A clip [3, F, H, W] in [-1, 1] as a user gets it, but for the file's compression."""
    video = generate(prompt, model=model, vae=vae, text_encoder=text_encoder, clip_vision=clip_vision,
                     visuals=visuals, seed=seed)
    return video.frames.movedim(-1, 0) / 127.5 - 1


def _seen(clip: Tensor) -> Observation:
    """What a clip of any size shows; `score` counts in pixels of the size that scenes are described in."""
    return score(F.interpolate(clip.movedim(1, 0), (SIZE, SIZE), mode="area").movedim(0, 1))


def _percentages(observations: Sequence[Observation], scenes: Sequence[Scene]) -> tuple[float, float, float]:
    scores = agreement(observations, scenes)
    return tuple(round(100 * part, 1) for part in (scores.colour, scores.direction, scores.shape))


def _psnr(made: Tensor, given: Tensor, weight: Tensor | float = 1.0) -> float:
    """PSNR in dB (peak to peak 2) of the pixels that `weight` [1, F, H, W] counts."""
    weight = torch.as_tensor(weight).expand_as(given)
    return 10 * math.log10(4 / (((made - given).square() * weight).sum() / weight.sum()).item())


def _guidance(model: Model) -> tuple[float, float]:
    """The preset's scales for high and low noise."""
    return model.preset.sampling.guidance_high, model.preset.sampling.guidance_low


def _clips(model: Model, vae: VideoVAE, text_encoder: TextEncoder, scenes: Sequence[Scene],
           guidance: tuple[float, float], steps: int | None = None,
           on_step: Callable[[Step], None] | None = None) -> Iterator[Tensor]:
    """A clip [3, F, H, W] for the caption of each scene, seeded 0, 1, 2, ..."""
    defaults = model.preset.sampling
    schedule = make_schedule(defaults.solver, steps or defaults.steps, defaults.shift)
    shape = latent_shape(model.vae_spec, defaults.width, defaults.height, defaults.frames)
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start:start + BATCH]
        noise = torch.cat([initial_noise(shape, start + index) for index in range(len(batch))])
        positive = text_encoder.encode([caption(scene) for scene in batch])
        negative = text_encoder.encode([defaults.negative_prompt] * len(batch))
        conditions = Conditions([TextCondition(positive)], [TextCondition(negative)])
        latents = sample(model, torch.zeros_like(noise), schedule, conditions, Guidance(*guidance), noise=noise,
                         solver=defaults.solver, on_step=on_step)
        yield from vae.decode(latents)
