"""The node for named noise schedules: those that distilled models were trained for, and a picture of them."""

from torch import Tensor

from ..wan_core.models import Model
from ..wan_core.pipeline import scheduled
from ..wan_core.sampling import NAMED_SCHEDULES, SOLVERS
from .host import HOST
from .plot import plot_sigmas


class WanCoreSchedule:
    """Noise levels by name."""

    DESCRIPTION = ("The noise levels that a distilled (few-step) model or LoRA was made for, by name, with the solver, "
                   "guidance and switch between experts that go with them, and a plot. Load the distilled model or its "
                   "LoRA as well: this node changes how a model is sampled, not its weights.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "sigmas", "scheduler", "basic scheduler", "few step", "4 steps", "lightning", "lightx2v",
                      "causvid", "fastwan", "rcm", "turbodiffusion", "accvideo", "self forcing", "sigma plot"]
    # The solver's type is the list of the sampler's widget, so that the two can be connected.
    RETURN_TYPES = ("WAN_MODEL", "SIGMAS", list(SOLVERS), "IMAGE")
    RETURN_NAMES = ("model", "sigmas", "solver", "plot")
    OUTPUT_TOOLTIPS = (
        "The model with the guidance, shift and expert boundary that go with the schedule as its own, for Wan Sampler "
        "with guidance and shift at 0.",
        "The noise levels, for Wan Sampler or any other node that takes SIGMAS.",
        "The solver that goes with them, for Wan Sampler's solver.",
        "The noise levels over the steps. With an expert pair: high noise orange, low noise blue, the boundary dashed.")
    FUNCTION = "schedule"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        uses = " ".join(f"{name}: {named.about}." for name, named in NAMED_SCHEDULES.items())
        return {
            "required": {
                "model": ("WAN_MODEL", {"tooltip": "The model or expert pair, with its few-step LoRA if it has one."}),
                "schedule": (list(NAMED_SCHEDULES), {"default": "lightx2v", "tooltip": uses}),
                "steps": ("INT", {
                    "default": 0, "min": 0, "max": 1000,
                    "tooltip": "Number of steps, for schedules that allow several. 0: the published number, or the "
                               "model's own."}),
                "shift": ("FLOAT", {
                    "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
                    "tooltip": "How far the levels are moved towards high noise, for schedules that allow it. 0: as "
                               "published (5 for most), or the model's own."}),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    def schedule(self, model: Model, schedule: str, steps: int, shift: float,
                 node_id: str | None = None) -> tuple[Model, Tensor, str, Tensor]:
        changed, levels = scheduled(model, schedule, steps or None, shift or None)
        sampling = changed.preset.sampling
        sigmas = levels.sigmas.tolist()
        experts = [changed.name_at(timestep) for timestep in levels.timesteps.tolist()]
        lines = [f"{levels.steps} steps of {sampling.solver}, guidance {sampling.guidance_high:g}"
                 + (f" and {sampling.guidance_low:g}" if sampling.guidance_low != sampling.guidance_high else ""),
                 ", ".join(f"{sigma:.4g}" for sigma in sigmas)]
        if changed.boundary is not None:
            lines.append(f"high-noise expert {experts.count('high')} steps, low-noise expert {experts.count('low')} "
                         f"(boundary {changed.boundary:.4g})")
        HOST.say(node_id, "\n".join(lines))
        return changed, levels.sigmas.clone(), sampling.solver, plot_sigmas(sigmas, experts, changed.boundary)
