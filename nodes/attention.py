"""The node that says how attention is computed: by which backend at which noise levels, and whether it is sparse."""

from dataclasses import replace

from ..wan_core.dit import BACKENDS, AttentionRange, Radial
from ..wan_core.models import Model


class WanCoreAttention:
    """A backend for all or some noise levels, and radial attention."""

    DESCRIPTION = ("Chooses how attention is computed, for all noise levels or for some: chain it for more. A backend "
                   "that cannot run here gives way to PyTorch's own, and the log says why. Radial attention is for "
                   "long clips: it leaves out most of what frames far apart have to say to each other.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "attention", "sage attention", "sageattention", "flash attention", "flex attention",
                      "radial attention", "sparse attention", "long video", "speed"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with this attention, for Wan Sampler or another Wan Attention.",)
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        level = {"min": 0.0, "max": 1.0, "step": 0.001, "round": False}
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair; the one that goes in stays as it is."}),
            "backend": (list(BACKENDS), {
                "default": "auto",
                "tooltip": "auto: the fastest exact one that runs here. sdpa: as PyTorch chooses; the others of that "
                           "name hold it to one kernel. flash2, flash3, sage, sage3: packages that must be installed; "
                           "sage and sage3 are faster and less exact. flex: compiled by PyTorch."}),
            "start_sigma": ("FLOAT", {
                "default": 1.0, **level,
                "tooltip": "The noise level from which this backend is used: 1 is pure noise."}),
            "end_sigma": ("FLOAT", {
                "default": 0.0, **level,
                "tooltip": "The noise level down to which it is used; 0 is the clean video. Elsewhere the model's "
                           "other ranges hold, or its base backend; from 1 to 0 this is that base."}),
            "radial": ("BOOLEAN", {
                "default": False, "label_on": "yes", "label_off": "as it is",
                "tooltip": "yes: self-attention is sparse, the sparser the further apart two frames are, which pays "
                           "from five seconds at 720p on. The three values below belong to it."}),
            "radial_start": ("FLOAT", {
                "default": 0.94, **level,
                "tooltip": "The noise level from which it is sparse; above it the layout is made, with all of "
                           "attention. 0.99 for clips of twice the usual length and more."}),
            "dense_blocks": ("INT", {
                "default": 1, "min": 0, "max": 100,
                "tooltip": "How many of the model's first blocks stay dense: 1, or 2 for longer clips."}),
            "decay": ("FLOAT", {
                "default": 0.5, "min": 0.01, "max": 100.0, "step": 0.01,
                "tooltip": "How far a token sees in the next frame, in frames to either side; half of that at double "
                           "the distance. 1: the published rule. Less is faster and coarser."}),
        }}

    def choose(self, model: Model, backend: str, start_sigma: float, end_sigma: float, radial: bool,
               radial_start: float, dense_blocks: int, decay: float) -> tuple[Model]:
        if radial:
            model = replace(model, radial=Radial(decay, radial_start, dense_blocks))
        if (start_sigma, end_sigma) == (1, 0):
            return (replace(model, attention=backend),)
        one = AttentionRange(backend, start_sigma, end_sigma)
        return (replace(model, attention_ranges=(*model.attention_ranges, one)),)
