"""From a prompt to frames: the engine's parts joined for library and shell users, and the pieces that nodes share."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import nano
from .cache import CacheRun, RunSteps, begin_cache
from .checkpoint import Checkpoints, SavedRun, settings_of
from .conditioning import ImageChannels, ImageTokens, KnownLatents, TextCondition, VaceCondition, active
from .forecast import fitted, fitted_encoder, planned
from .memory import OneAtATime
from .memory.recovery import made_room
from .models import (
    Model,
    TextEncoder,
    VideoVAE,
    VisionEncoder,
    load_clip_vision,
    load_model,
    load_text_encoder,
    load_vae,
)
from .presets import VAESpec
from .sampling import (
    PURE_NOISE_SIGMA,
    Conditions,
    Guidance,
    NotFinite,
    Schedule,
    Step,
    StepGuidance,
    denoise,
    last_part,
    make_schedule,
    plan_guidance,
    sampling_named,
)
from .video import check_fps, to_uint8, write_video
from .visuals import Visuals, show

log = logging.getLogger(__name__)

# 64 bits, read with or without a sign: a negative seed is the same as that seed + 2^64.
SEEDS = (-2 ** 63, 2 ** 64 - 1)


@dataclass(frozen=True)
class Settings:
    """What decides a video, beside the models: recorded in its file. Sizes in pixels; see `Sampling` for the rest."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    seed: int
    solver: str
    shift: float
    guidance: tuple[float, float]
    fps: float


@dataclass(frozen=True, eq=False)
class Video:
    """`frames` [F, H, W, 3] uint8, and what made them."""

    frames: Tensor
    fps: float
    settings: dict[str, object]

    def save(self, path: str | Path) -> None:
        """Write an MP4 file with the settings in its `comment` metadata (see `write_video`)."""
        write_video(path, self.frames, self.fps, metadata={"comment": self.settings})


def latent_shape(spec: VAESpec, width: int, height: int, frames: int, batch: int = 1) -> tuple[int, ...]:
    """[batch, C, T, H, W] of a video's latents. Raises ValueError for sizes off the grid and names the nearest."""
    grid = spec.spatial_stride * 2  # the transformer's patches are two latents wide
    for name, value in (("width", width), ("height", height)):
        if value < grid or value % grid:
            raise ValueError(f"{name} is {value} pixels; it must be a multiple of {grid}. "
                             f"Use {max(grid, round(value / grid) * grid)}.")
    step = spec.temporal_stride
    if frames < 1 or (frames - 1) % step:
        nearest = max(0, round((frames - 1) / step)) * step + 1
        raise ValueError(f"frames is {frames}; it must be {step}n + 1. Use {nearest}.")
    return batch, spec.z_dim, 1 + (frames - 1) // step, height // spec.spatial_stride, width // spec.spatial_stride


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is one of the whole numbers that PyTorch's generators take."""
    if type(seed) is not int or not SEEDS[0] <= seed <= SEEDS[1]:
        raise ValueError(f"the seed is {seed!r}; it must be a whole number from {SEEDS[0]} to {SEEDS[1]}.")


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 noise on the CPU, so that a seed gives the same video on every device.

    Raises ValueError for a seed that is no whole number of 64 bits.
    """
    check_seed(seed)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model: Model, latents: Tensor, schedule: Schedule, conditions: Conditions, guidance: Guidance, *,
           noise: Tensor | None = None, mask: Tensor | None = None, solver: str = "unipc", seed: int = 0,
           checkpoints: Checkpoints | None = None, on_step: Callable[[Step], None] | None = None,
           on_block: Callable[[int], None] | None = None) -> Tensor:
    """Denoise raw `latents` [B, C, T, H, W] (zeros for an empty clip) with `model`; returns raw latents on the host.

    `noise`, of the same shape, is mixed in at the schedule's first level; None leaves the latents as they are, for a
    run that goes on from another. `mask` [B, 1, T, H, W] in 0..1 says what is made anew (1) and what is kept of the
    latents (0). `seed` is of the noise that some solvers add at every step. `checkpoints` says where the run is saved
    while it goes on, and an equal one goes on from there.
    Raises ValueError, before weights are loaded, for what does not fit the model, and where a step gives NaN or
    infinite values.
    """
    result, saved = _sampled(model, latents, schedule, conditions, guidance, noise, mask, solver, seed, checkpoints, {},
                             on_step=on_step, on_block=on_block)
    if saved:
        saved.remove()
    return result


def _sampled(model: Model, latents: Tensor, schedule: Schedule, conditions: Conditions, guidance: Guidance,
             noise: Tensor | None, mask: Tensor | None, solver: str, seed: int, checkpoints: Checkpoints | None,
             named: Mapping[str, object], **callbacks: Callable | None) -> tuple[Tensor, SavedRun | None]:
    """See `sample`; and the checkpoint, which stays until the caller has made use of the result. `named` are settings
    for people to read in it."""
    model.check_latents(latents)
    conditions = _completed(model, conditions, tuple(latents.shape))
    check_coverage(model, schedule, conditions, guidance)
    model, told = planned(model, tuple(latents.shape), [*conditions.positive, *conditions.negative])
    if told:
        log.info("%s: %s", model.preset.title, told)
    stats, device = model.latent_stats, model.placement.device
    empty = not latents.count_nonzero()
    start = torch.zeros(latents.shape) if empty else stats.normalise(latents.float().cpu())
    if noise is not None and noise.shape != latents.shape:
        raise ValueError(f"noise has shape {list(noise.shape)}, the latents {list(latents.shape)}; they must be equal.")
    if mask is not None:
        sees_clean = model.spec.model_type == "ti2v"
        if noise is None and not sees_clean:
            raise ValueError("a mask of what is kept needs noise to be added in the same run: from latents with noise "
                             "in them the kept part cannot be told.")
        known = KnownLatents(start, mask.float().cpu(), None if sees_clean else noise)
        conditions = replace(conditions, known=known)
    if noise is not None:
        sigma = float(schedule.sigmas[0])
        start = noise if sigma >= PURE_NOISE_SIGMA else (1 - sigma) * start + sigma * noise
    cache = _cache_of(model, schedule, guidance, mask is not None)
    saved = begin = None
    if checkpoints:
        settings = settings_of(model, schedule, conditions, guidance, solver, start, named, seed)
        saved = SavedRun(checkpoints, settings, schedule, solver, seed, cache)
        begin = saved.load()
    if begin:
        model = replace(model, plan=replace(model.plan, chunk=begin.chunk))
    try:
        result = denoise(model, start, schedule, conditions, guidance, options=model.guidance, solver=solver,
                         seed=seed, backend=model.attention, ranges=model.attention_ranges,
                         radial=model.radial, cache=cache, device=device, begin=begin,
                         on_progress=saved.save if saved else None, **callbacks)
    except NotFinite as error:
        raise _explained(error, model) from error
    return _on_host(model, result), saved


def _cache_of(model: Model, schedule: Schedule, guidance: Guidance, has_known_frames: bool) -> CacheRun | None:
    """The state of the model's step cache before a run."""
    sigmas, experts, steps = _guided_steps(model, schedule, guidance)
    branches = tuple(step.cached for step in steps)
    cache, told = begin_cache(model.cache, RunSteps(model.preset.name, sigmas, experts, branches, has_known_frames))
    if told:
        log.info("%s: %s", model.preset.title, told)
    return cache


def _explained(error: NotFinite, model: Model) -> ValueError:
    part = model.high if error.expert == "high" else model.low
    dtype = model.computes_in(part)
    loras = ", ".join(lora.file.path.name for lora in (*model.folded, *model.loras))
    return ValueError(f"{error}, computed by {part.label} in {str(dtype).removeprefix('torch.')}. Use another "
                      f"precision or another attention{f', leave a LoRA away ({loras})' if loras else ''}, or download "
                      "the file again.")


def _on_host(model: Model, result: Tensor) -> Tensor:
    """The raw latents of a run's result on the host; a run is not lost because there is no room for them beside the
    weights, which have done their work."""
    try:
        return model.latent_stats.restore(result.cpu())
    except Exception as error:
        if not made_room(error, model.placement):
            raise
    return model.latent_stats.restore(result.cpu())


def _completed(model: Model, conditions: Conditions, shape: tuple[int, ...]) -> Conditions:
    """`conditions` after a check against model and latents, with empty channels for a model that has no picture.

    What a model could be given and is not is logged, with what happens then. Raises ValueError for what it cannot take.
    """
    given = {type(other) for prompt in conditions.positive for other in prompt.beside}
    if model.spec.in_dim > shape[1] and ImageChannels not in given:
        log.warning("%s is given no start or end image; it makes one up.", model.preset.title)
    if model.spec.image_dim and ImageTokens not in given:
        log.warning("%s is given no CLIP vision features; its attention to the picture is left out, which costs "
                    "likeness.", model.preset.title)
    counts = {other.features.shape[1] for prompt in conditions.positive for other in prompt.beside
              if isinstance(other, ImageTokens)}
    if model.spec.image_dim and counts - {model.spec.image_tokens}:
        log.warning("%s was trained with %d CLIP vision tokens and is given %s; it attends to all that are there.",
                    model.preset.title, model.spec.image_tokens, " or ".join(map(str, sorted(counts))))
    if model.spec.model_type == "vace" and VaceCondition not in given:
        log.info("%s is given no VACE control; it works as the text-to-video model it was made from.",
                 model.preset.title)

    def complete(prompt: TextCondition) -> TextCondition:
        model.check_context(prompt.context)
        for other in prompt.beside:
            other.check(model.spec, shape)
        if model.spec.in_dim > shape[1] and not any(isinstance(other, ImageChannels) for other in prompt.beside):
            return replace(prompt, beside=(ImageChannels.nothing_known(model.spec, shape), *prompt.beside))
        return prompt

    return replace(conditions, positive=[complete(prompt) for prompt in conditions.positive],
                   negative=[complete(prompt) for prompt in conditions.negative])


def check_coverage(model: Model, schedule: Schedule, conditions: Conditions, guidance: Guidance) -> None:
    """Raise ValueError unless at every step a prompt is active, and a negative one where guidance asks for it."""
    sigmas, _, steps = _guided_steps(model, schedule, guidance)
    for sigma, step in zip(sigmas, steps):
        active(conditions.positive, sigma)
        if conditions.negative and step.needs_negative:
            active(conditions.negative, sigma)


def _guided_steps(model: Model, schedule: Schedule, guidance: Guidance
                  ) -> tuple[tuple[float, ...], tuple[str, ...], tuple[StepGuidance, ...]]:
    """The noise levels that a run's steps begin at, their experts, and what guides them."""
    sigmas, experts = tuple(schedule.sigmas[:-1].tolist()), tuple(map(model.name_at, schedule.timesteps.tolist()))
    return sigmas, experts, plan_guidance(guidance, model.guidance, sigmas, experts)


def generate(prompt: str, *, model: Model | None = None, vae: VideoVAE | None = None,
             text_encoder: TextEncoder | None = None, clip_vision: VisionEncoder | None = None,
             visuals: Visuals | None = None, negative_prompt: str | None = None, width: int | None = None,
             height: int | None = None, frames: int | None = None, steps: int | None = None, seed: int = 0,
             solver: str | None = None, shift: float | None = None, guidance: float | tuple[float, float] | None = None,
             schedule: str | None = None, fps: float | None = None, checkpoints: Checkpoints | None = None,
             on_step: Callable[[Step], None] | None = None, on_block: Callable[[int], None] | None = None) -> Video:
    """Make a video of `prompt` and, if given, of `visuals`.

    Parts that are not given are the bundled nano models that go with `model`; settings that are not given are the
    preset's, but for the size, which follows a given picture. `guidance` is one scale or (high-noise, low-noise).
    `schedule` names noise levels in NAMED_SCHEDULES; settings that are not given are then those that go with it.
    With `checkpoints` the run is saved while it goes on, until its frames are decoded.
    Raises ValueError, before anything is loaded, for an empty prompt, sizes off the grid, or parts that do not fit
    together.
    """
    shared, visuals = OneAtATime(), visuals or Visuals()
    model, levels = model or load_model(placement=shared), None
    if schedule is not None:
        model, levels = scheduled(model, schedule, steps, shift)
    vae = vae or load_vae(bundled_vae(model), placement=shared)
    text_encoder = text_encoder or load_text_encoder(placement=shared)
    if clip_vision is None and model.preset.clip_vision == "nano_clip":
        clip_vision = load_clip_vision(placement=shared)
    own = visuals.size(model)
    width, height = own[0] if width is None else width, own[1] if height is None else height
    settings = resolve_settings(model, prompt, negative_prompt=negative_prompt, width=width, height=height,
                                frames=frames, steps=steps, seed=seed, solver=solver, shift=shift, guidance=guidance,
                                fps=fps)
    check_fit(model, vae, text_encoder, clip_vision)
    check_fps(settings.fps)
    shape = latent_shape(model.vae_spec, settings.width, settings.height, settings.frames)
    visuals.check(model, settings.frames)
    if levels is None:
        levels = make_schedule(settings.solver, settings.steps, settings.shift, visuals.denoise)
    else:
        levels = last_part(levels, visuals.denoise)
    scales = Guidance(*settings.guidance)
    started = time.perf_counter()
    contexts = fitted_encoder(text_encoder, 2).encode([settings.prompt, settings.negative_prompt], on_block)
    vae = fitted(vae, shape)[0]
    shown = show(visuals, model, vae, clip_vision, shape)
    conditions = Conditions([TextCondition(contexts[:1], beside=shown.beside)],
                            [TextCondition(contexts[1:], beside=shown.beside)])
    noise = initial_noise(tuple(shown.latents.shape), settings.seed)
    named = {name: getattr(settings, name) for name in ("prompt", "negative_prompt", "seed")}
    latents, saved = _sampled(model, shown.latents, levels, conditions, scales, noise, shown.mask, settings.solver,
                              settings.seed, checkpoints, named, on_step=on_step, on_block=on_block)
    pixels = vae.decode(latents[:, :, shown.trim:])[0]
    if saved:
        saved.remove()
    record = {**asdict(settings), **({"schedule": schedule} if schedule else {}), **model.record(),
              "seconds": round(time.perf_counter() - started, 1)}
    return Video(to_uint8(pixels.movedim(0, -1)), settings.fps, record)


def scheduled(model: Model, name: str, steps: int | None = None, shift: float | None = None) -> tuple[Model, Schedule]:
    """The model with the defaults that go with the schedule called `name`, and this (see `sampling_named`)."""
    schedule, sampling = sampling_named(name, model.preset.sampling, steps, shift)
    return replace(model, preset=replace(model.preset, sampling=sampling)), schedule


def resolve_settings(model: Model, prompt: str, *, seed: int, guidance: float | tuple[float, float] | None = None,
                     **given: object) -> Settings:
    """Settings with the preset's values for all that is None. Raises ValueError for an empty prompt or a bad seed."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the video should show.")
    check_seed(seed)
    defaults = model.preset.sampling
    if guidance is None:
        guidance = (defaults.guidance_high, defaults.guidance_low)
    elif not isinstance(guidance, tuple):
        guidance = (guidance, guidance)
    chosen = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
    return Settings(prompt=prompt, seed=seed, guidance=guidance, **chosen)


def check_fit(model: Model, vae: VideoVAE, text_encoder: TextEncoder, clip_vision: VisionEncoder | None = None) -> None:
    """Raise ValueError unless VAE, text encoder and CLIP vision model (if there is one) belong to the model."""
    # Nano and released VAEs have latents of the same statistics but not of the same meaning, so specs are compared.
    if not vae.fits(model.vae_spec):
        raise ValueError(f"{vae.part.label} ({', '.join(vae.part.names) or vae.spec.kind}) is not the VAE that "
                         f"{model.preset.title} was trained with. Use {model.preset.vae}.")
    if text_encoder.part.spec.dim != model.spec.text_dim:
        raise ValueError(f"{text_encoder.part.label} gives embeddings of width {text_encoder.part.spec.dim}; "
                         f"{model.preset.title} takes {model.spec.text_dim}. Use {model.preset.text_encoder}.")
    if clip_vision is not None and clip_vision.spec.dim != model.spec.image_dim:
        takes = f"takes {model.spec.image_dim}" if model.spec.image_dim else "takes no CLIP vision features"
        raise ValueError(f"{clip_vision.part.label} gives features of width {clip_vision.spec.dim}; "
                         f"{model.preset.title} {takes}. "
                         f"{f'Use {model.preset.clip_vision}' if model.preset.clip_vision else 'Leave it away'}.")


def bundled_vae(model: Model) -> str | Path:
    """The bundled VAE that goes with `model`; for a released model any, which `check_fit` then refuses by name."""
    return nano.VAE22 if model.preset.vae == "nano_vae22" else nano.VAE
