"""How well the nano models do what a prompt says, measured on the pixels of held-out prompts with fixed seeds.

Each prompt is sampled with the preset's settings and its own seed, decoded and looked at by `score`, which knows
nothing of the prompt. The VAE is measured on whole clips outside its training stream.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..conditioning import TextCondition
from ..models import Model, TextEncoder, VideoVAE
from ..pipeline import initial_noise, latent_shape, sample
from ..sampling import Conditions, Guidance, make_schedule
from .nano_vae import reconstruction_psnr
from .score import agreement, score
from .shapes import Scene, caption, held_out_scenes

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
    defaults = model.preset.sampling
    guidance = guidance or (defaults.guidance_high, defaults.guidance_low)
    schedule = make_schedule(defaults.solver, steps or defaults.steps, defaults.shift)
    scenes = held_out_scenes(prompts)
    observations = []
    for start in range(0, prompts, BATCH):
        for clip in _clips(model, vae, text_encoder, scenes[start:start + BATCH], start, schedule, guidance):
            observations.append(score(clip))
    scores = agreement(observations, scenes)
    return Evaluation(guidance, prompts, *(round(100 * part, 1) for part in
                                           (scores.colour, scores.direction, scores.shape)))


def report(model: Model, experts: Model, vae: VideoVAE, text_encoder: TextEncoder) -> dict[str, object]:
    """All figures of the nano family: the VAE, and single model and expert pair with guidance and without."""
    figures: dict[str, object] = {"vae_psnr_db": round(reconstruction_psnr(vae.module(), 32), 2)}
    for name, which in (("t2v", model), ("t2v_experts", experts)):
        figures[name] = asdict(evaluate(which, vae, text_encoder))
        figures[f"{name}_without_guidance"] = asdict(evaluate(which, vae, text_encoder, guidance=(1.0, 1.0)))
    return figures


def _clips(model: Model, vae: VideoVAE, text_encoder: TextEncoder, scenes: Sequence[Scene], first_seed: int,
           schedule, guidance: tuple[float, float]) -> torch.Tensor:
    """Pixels [len(scenes), 3, F, H, W] of a batch of prompts, seeded first_seed, first_seed + 1, ..."""
    defaults = model.preset.sampling
    shape = latent_shape(model.vae_spec, defaults.width, defaults.height, defaults.frames)
    noise = torch.cat([initial_noise(shape, first_seed + index) for index in range(len(scenes))])
    positive = text_encoder.encode([caption(scene) for scene in scenes])
    negative = text_encoder.encode([defaults.negative_prompt] * len(scenes))
    conditions = Conditions([TextCondition(positive)], [TextCondition(negative)])
    latents = sample(model, torch.zeros_like(noise), schedule, conditions, Guidance(*guidance), noise=noise,
                     solver=defaults.solver)
    return vae.decode(latents)
