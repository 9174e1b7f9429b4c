"""The node that has a model's blocks compiled by PyTorch."""

from dataclasses import replace

from ..wan_core.dit import MODES, Compile
from ..wan_core.models import Model


class WanCoreCompile:
    """torch.compile for the blocks of a model."""

    DESCRIPTION = ("Compiles the blocks of a Wan model with torch.compile. The first step takes longer, the others are "
                   "faster. Nothing is compiled again for another seed, prompt, size, number of frames or LoRA "
                   "strength, nor for the other expert. Where it cannot be done, the model runs as without this node "
                   "and the log says why.")
    CATEGORY = "Wan/sampling"
    SEARCH_ALIASES = ["wan", "torch compile", "compile model", "inductor", "triton", "cuda graphs", "faster", "speed"]
    RETURN_TYPES = ("WAN_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with compiled blocks, for Wan Sampler.",)
    FUNCTION = "compile"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {
            "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair."}),
            "mode": (list(MODES), {
                "default": "default",
                "tooltip": "default: joins the work between matrix products. max-autotune-no-cudagraphs: also tries "
                           "kernels for the matrix products, which takes minutes. reduce-overhead: also records CUDA "
                           "graphs, for small videos on fast GPUs; not with block swap or quantised weights."}),
            "any_size": ("BOOLEAN", {
                "default": True,
                "tooltip": "One compilation for all sizes and lengths of videos. Off: one for each, which may be a "
                           "little faster."}),
        }}

    def compile(self, model: Model, mode: str, any_size: bool) -> tuple[Model]:
        return (replace(model, compile=Compile(mode, dynamic=any_size)),)
