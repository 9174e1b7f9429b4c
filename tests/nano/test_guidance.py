"""What guidance does to a trained model, as seen in the pixels."""

from dataclasses import replace

import pytest
import torch

from wan_core import load_model, load_text_encoder, load_vae
from wan_core.conditioning import TextCondition
from wan_core.guidance import GuidanceOptions, NormalisedAttention
from wan_core.pipeline import initial_noise, latent_shape, sample
from wan_core.sampling import Conditions, Guidance, make_schedule
from wan_core.training.score import score

CLIPS = 16
PROMPT, NEGATIVE = "a red circle moving left", "a red circle moving left on a white background"


@pytest.mark.slow
def test_nag_removes_what_the_negative_prompt_says():
    """Promise: at guidance 1, of sixteen clips some have a white background; with NAG away from that none or one has,
    and the circles are as red as they were."""
    model, vae, encoder = load_model(), load_vae(), load_text_encoder()
    given, shape = model.preset.sampling, latent_shape(model.vae_spec, 64, 64, 17)
    noise = torch.cat([initial_noise(shape, seed) for seed in range(CLIPS)])
    conditions = Conditions([TextCondition(encoder.encode([PROMPT]))], [TextCondition(encoder.encode([NEGATIVE]))])
    seen = []
    for nag in (None, NormalisedAttention(11.0, 2.5, 0.25)):
        latents = sample(replace(model, guidance=GuidanceOptions(nag=nag)), torch.zeros_like(noise),
                         make_schedule(given.solver, 10, given.shift), conditions, Guidance(1.0, 1.0), noise=noise,
                         solver=given.solver)
        seen.append([score(clip) for clip in vae.decode(latents)])
    white = [sum(shown.background == "white" for shown in shown_of) for shown_of in seen]
    assert white[0] >= 3 and white[1] <= 1
    assert sum(shown.colour == "red" for shown in seen[1]) >= CLIPS - 1
