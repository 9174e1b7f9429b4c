"""The node that says how much memory a model may use. Without it everything is automatic, which is mostly right."""

from dataclasses import replace

from ..wan_core.memory import Memory
from ..wan_core.models import Model


class WanCoreMemory:
    """Limits for the memory of the device and of the host, and how often a run is saved."""

    DESCRIPTION = ("Limits how much memory a Wan model uses on the GPU and pins in RAM, and how often a run is saved. "
                   "Rarely needed: by itself the sampler measures what is free, keeps as many blocks on the GPU as fit "
                   "and lets the others come and go.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "block swap", "blocks to swap", "low vram", "offload", "vram", "out of memory",
                      "memory budget", "resume", "checkpoint"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with these limits, for Wan Sampler.",)
    FUNCTION = "limit"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair."}),
            "budget_gb": ("FLOAT", {
                "default": 0.0, "min": 0.0, "max": 1000.0, "step": 0.1,
                "tooltip": "GPU memory that a run may use, in GB: weights and everything that it works with. What does "
                           "not fit comes and goes block by block. 0: what is free."}),
            "pinned_gb": ("FLOAT", {
                "default": -1.0, "min": -1.0, "max": 1000.0, "step": 0.1,
                "tooltip": "RAM that may be page-locked for blocks that come and go, in GB: they then arrive at the "
                           "full rate of the bus. -1: up to half of what is free. 0: none, they come from the mapped "
                           "file."}),
            "save_every": ("INT", {
                "default": 1, "min": 0, "max": 1000,
                "tooltip": "After how many steps a run is saved, so that the same run goes on from there when it was "
                           "stopped or ComfyUI ended. 0: never."}),
        }}

    def limit(self, model: Model, budget_gb: float, pinned_gb: float, save_every: int) -> tuple[Model]:
        memory = Memory(budget_gb or None, None if pinned_gb < 0 else pinned_gb, save_every)
        return (replace(model, memory=memory),)
