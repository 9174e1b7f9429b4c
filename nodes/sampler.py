"""The sampler: one node for single models and for expert pairs.

Partly denoised latents are exchanged as ComfyUI's samplers do for flow models: noise included, divided by 1 - sigma.
So a run can be split between two samplers, ours or the core's. Reference: ComfyUI's `comfy/model_sampling.py`, class
CONST.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..wan_core.cache import Report
from ..wan_core.checkpoint import Checkpoints
from ..wan_core.conditioning import check_values
from ..wan_core.forecast import planned
from ..wan_core.memory.budget import measured_peak, reset_peak
from ..wan_core.memory.recovery import is_out_of_memory, release
from ..wan_core.models import Model
from ..wan_core.pipeline import initial_noise, sample
from ..wan_core.sampling import SOLVERS, Conditions, Guidance, Schedule, Step, make_schedule, partial
from ..wan_core.sampling import schedule_from_sigmas as from_sigmas
from .conditioning import text_conditions
from .host import HOST, Preview
from .latent import MADE_FOR

log = logging.getLogger(__name__)

KEPT_RUNS = 5


@dataclass(frozen=True)
class Widgets:
    """The node's widgets; see their tooltips. A shift or guidance of 0 stands for the model's own."""

    seed: int
    steps: int
    solver: str
    shift: float
    guidance: float
    guidance_low: float
    denoise: float
    start_step: int
    end_step: int
    add_noise: bool

    def shift_for(self, model: Model) -> float:
        return self.shift or model.preset.sampling.shift

    def guidance_for(self, model: Model) -> Guidance:
        """The scales of both experts. A single model has one scale, which the engine calls the low expert's."""
        official = model.preset.sampling
        if not model.preset.experts:
            if self.guidance_low:
                log.warning("Wan: guidance_low is for expert pairs; %s is sampled with guidance alone.",
                            model.preset.title)
            scale = self.guidance or official.guidance_low
            return Guidance(scale, scale)
        return Guidance(self.guidance or official.guidance_high,
                        self.guidance_low or self.guidance or official.guidance_low)

    def schedule_for(self, model: Model, sigmas: Tensor | None) -> Schedule:
        """The noise levels to be run, from the widgets or from `sigmas`."""
        whole = (make_schedule(self.solver, self.steps, self.shift_for(model), self.denoise) if sigmas is None
                 else from_sigmas(sigmas))
        return partial(whole, self.start_step, self.end_step)


class WanCoreSampler:
    """Denoises a latent."""

    DESCRIPTION = ("Makes the video, as a latent. With an expert pair it switches from the high- to the low-noise "
                   "expert at the model's boundary by itself. The same seed gives the same video on every machine but "
                   "for rounding.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "ksampler", "ksampler advanced", "denoise", "unipc", "dpm++", "euler", "lcm",
                      "res_multistep", "deis", "sa_ode", "moe sampler"]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The denoised latent, for Wan Decode or VAE Decode.",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("WAN_MODEL", {
                    "tooltip": "The model, from Wan Model Loader or Wan Expert Pair Loader."}),
                "positive": ("CONDITIONING", {
                    "tooltip": "What the video should show, from Wan Text Encode or CLIP Text Encode."}),
                "negative": ("CONDITIONING", {
                    "tooltip": "What it should not show. Not used where guidance is 1, unless there is a Wan NAG."}),
                "latent": ("LATENT", {
                    "tooltip": "Size and length of the video (Wan Empty Latent, EmptyHunyuanLatentVideo), or a video "
                               "to start from (VAE Encode) with denoise below 1."}),
                **_widgets(),
            },
            "optional": {
                "sigmas": ("SIGMAS", {
                    "tooltip": "Noise levels from another node, 1 falling to 0. They take the place of steps, shift "
                               "and denoise."}),
            },
            "hidden": {
                "node_id": "UNIQUE_ID",
            },
        }

    def sample(self, model: Model, positive: list, negative: list, latent: dict, sigmas: Tensor | None = None,
               node_id: str | None = None, **widgets: object) -> tuple[dict]:
        options = Widgets(**widgets)
        samples = latent["samples"]
        model.check_latents(samples)
        mask = _noise_mask(latent.get("noise_mask"), samples)
        shift, guidance = options.shift_for(model), options.guidance_for(model)
        schedule = options.schedule_for(model, sigmas)
        shape = tuple(samples.shape)
        conditions = Conditions(text_conditions(positive, model, shift, shape, "positive"),
                                text_conditions(negative, model, shift, shape, "negative"))
        noise = initial_noise(shape, options.seed) if options.add_noise else None
        log.info("Wan: %s, %d steps of %s from sigma %.3f to %.3f, shift %g, guidance %s", model.preset.title,
                 schedule.steps, options.solver, schedule.sigmas[0], schedule.sigmas[-1], shift,
                 f"{guidance.high:g} and {guidance.low:g}" if model.preset.experts else f"{guidance.low:g}")
        if guided := model.guidance.record():
            log.info("Wan: guidance options: %s", ", ".join(f"{name} {value}" for name, value in guided.items()))
        model, told = planned(model, shape, [*conditions.positive, *conditions.negative])
        if told:
            HOST.say(node_id, told.bars())
            model = HOST.with_room(model, told.peak - model.placed_size())
            # What of this model is there already belongs to the run.
            others = reset_peak(model.placement.device) - model.placement.nbytes
        previewer = HOST.previewer(model.vae_spec, model.placement.device)
        passes = {}
        with HOST.progress(schedule.steps, "Wan sampler") as advance:
            def on_step(step: Step) -> None:
                passes[step.index] = step.branches, step.reused
                # A run that goes on from where it was saved begins in the middle.
                advance(step.index + 1, _preview(previewer, step))

            result = sample(model, samples if noise is not None else _noisy(model, samples, schedule), schedule,
                            conditions, guidance, noise=noise, mask=mask, solver=options.solver,
                            seed=options.seed, checkpoints=_checkpoints(model), on_step=on_step,
                            on_block=lambda block: HOST.check_interrupt())
        said = [str(Report.of(passes))] if model.cache else []
        if told:
            said.append(told.bars(measured_peak(model.placement.device, others)))
        if said:
            HOST.say(node_id, "\n".join(said))
        result = _exchanged(model, result, schedule).to(HOST.result_device())
        return ({**latent, "samples": result, MADE_FOR: model.preset.vae},)


def _widgets() -> dict:
    return {
        "seed": ("INT", {
            "default": 0, "min": 0, "max": 0xffffffffffffffff, "control_after_generate": True,
            "tooltip": "The noise that the video begins as. The same seed and settings give the same video."}),
        "steps": ("INT", {
            "default": 50, "min": 1, "max": 1000,
            "tooltip": "Steps from noise to video: officially 50 for Wan 2.1, 40 for Wan 2.2 A14B, 20 for nano. Fewer "
                       "are faster and coarser."}),
        "solver": (list(SOLVERS), {
            "default": "unipc",
            "tooltip": "unipc: Wan's own. dpm++: official as well. euler: simplest, for models distilled to few steps. "
                       "Each has its official noise schedule. lcm: fresh noise at every step, for models distilled "
                       "that way (Wan Schedule says for which). res_multistep: much like unipc. deis, sa_ode: mostly "
                       "the closest to the exact result from 12 steps on, sa_ode where shift is 5 or more."}),
        "shift": ("FLOAT", {
            "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
            "tooltip": "How many of the steps are spent at high noise, on layout and motion. 0: the model's own (5 for "
                       "Wan 2.1 T2V and I2V, I2V-A14B and TI2V 5B, 16 for FLF2V and VACE, 12 for T2V-A14B, 3 for "
                       "nano)."}),
        "guidance": ("FLOAT", {
            "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
            "tooltip": "How strongly the video follows the prompt (CFG); with an expert pair, at high noise. 1: no "
                       "guidance, twice as fast. 0: the model's own (5 for Wan 2.1 and TI2V 5B, 4 for T2V-A14B, "
                       "3.5 for I2V-A14B)."}),
        "guidance_low": ("FLOAT", {
            "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
            "tooltip": "Expert pairs only: the guidance of the low-noise expert. 0: the same as guidance or, if that "
                       "is 0 too, the model's own (3 for T2V-A14B, 3.5 for I2V-A14B)."}),
        "denoise": ("FLOAT", {
            "default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01,
            "tooltip": "1: from pure noise. Below: how much of a given latent is made anew; all steps are then taken "
                       "in that last part of the schedule."}),
        "start_step": ("INT", {
            "default": 0, "min": 0, "max": 10000,
            "tooltip": "The first step to run, to go on from another sampler that stopped there (with add_noise "
                       "off)."}),
        "end_step": ("INT", {
            "default": 1000, "min": 1, "max": 10000,
            "tooltip": "The step to stop before; the latent then still holds noise, for another sampler to go on from. "
                       "Beyond the last step: run to the end."}),
        "add_noise": ("BOOLEAN", {
            "default": True, "label_on": "yes", "label_off": "no",
            "tooltip": "Whether noise is mixed in first. no: the latent comes from a sampler that stopped at "
                       "start_step."}),
    }


def _noise_mask(mask: Tensor | None, samples: Tensor) -> Tensor | None:
    """A latent's noise mask (pixels or latents, one frame or several) at the size of `samples`: [B, 1, T, H, W].

    Resized as in the core. A mask of one frame holds for all; masks of pixels have as many frames as the video.
    """
    if mask is None:
        return None
    if mask.ndim not in (2, 3, 4, 5) or 0 in mask.shape:
        raise ValueError(f"the noise mask has shape {list(mask.shape)}; expected a MASK [frames, height, width].")
    if mask.ndim < 5:
        mask = mask.reshape(1, 1, -1, *mask.shape[-2:])
    check_values("the noise mask", mask, 0, 1)
    mask = F.interpolate(mask.float().mean(1, keepdim=True), samples.shape[2:], mode="trilinear")
    if samples.shape[0] % mask.shape[0]:
        raise ValueError(f"there are {mask.shape[0]} noise masks and {samples.shape[0]} videos in the latent; give one "
                         "mask, or one for each video.")
    return mask.repeat(samples.shape[0] // mask.shape[0], 1, 1, 1, 1).clamp(0, 1)


def _noisy(model: Model, samples: Tensor, schedule: Schedule) -> Tensor:
    """A latent that another sampler left with noise in it, as the engine takes it."""
    if not samples.count_nonzero():
        return samples
    stats = model.latent_stats
    return stats.restore(stats.normalise(samples.float()) * (1 - schedule.sigmas[0].item()))


def _exchanged(model: Model, samples: Tensor, schedule: Schedule) -> Tensor:
    """The inverse of `_noisy` for a run that stops early; nothing to do at sigma 0."""
    sigma = schedule.sigmas[-1].item()
    if sigma == 0:
        return samples
    stats = model.latent_stats
    return stats.restore(stats.normalise(samples) / (1 - sigma))


def _preview(previewer: Callable[[Tensor], Preview] | None, step: Step) -> Preview:
    """A preview of a step, if the user wants one; none where there is no memory for it, which is no reason to stop."""
    if previewer is None:
        return None
    try:
        return previewer(step.clean)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release(error, step.clean.device)
        return None


def _checkpoints(model: Model) -> Checkpoints | None:
    """Where a run is saved while it goes on, unless the user wants none. Few runs that were stopped are taken up."""
    if not model.memory.save_every:
        return None
    return Checkpoints(HOST.user_folder("wan-checkpoints"), model.memory.save_every, keep=KEPT_RUNS)
