"""The node that puts LoRAs on a model. They run beside the weights, which stay as they are, whatever their format.

Nothing is merged: a model with a LoRA and the same model without it can be used side by side, and a new strength reads
nothing anew. Stacks of other packs are lists of (file name, strength for the model, strength for the text encoder).
"""

import logging
import math

from ..wan_core.models import Model
from ..wan_core.weights.lora import format_match, open_lora
from .host import HOST

log = logging.getLogger(__name__)

NONE = "none"
SAME, OWN = "same strength", "own strength"

# What stacks of other packs have in an empty row.
_EMPTY = ("", "none", "None")


class WanCoreLora:
    """One LoRA more on a model, after those of a stack."""

    DESCRIPTION = ("Puts a LoRA on a Wan model or expert pair: LoRA, LoHa, LoKr, DoRA or full differences, from any "
                   "trainer, on weights of any format. Chain it for more; strengths can be changed without loading "
                   "anything again. The report says what fits and what is left out.")
    CATEGORY = "Wan/loaders"
    SEARCH_ALIASES = ["wan", "lora", "load lora", "lora loader", "lycoris", "lokr", "loha", "dora", "lightning",
                      "lightx2v", "causvid", "distill", "lora stack"]
    RETURN_TYPES = ("WAN_MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model with the LoRA, for Wan Sampler or another Wan LoRA.",
                       "For each file: how many adapters fit, which keys are left out and why.")
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        level = {"min": 0.0, "max": 1.0, "step": 0.001, "round": False}
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}
        return {
            "required": {
                "model": ("WAN_MODEL", {"tooltip": "A model or an expert pair; the one that goes in stays as it is."}),
                "lora": ([NONE, *HOST.model_names("loras")], {
                    "default": NONE,
                    "tooltip": "A file in models/loras. none: no LoRA but those of the stack."}),
                "strength": ("FLOAT", {
                    **strength, "tooltip": "How strongly the LoRA acts; 0 is as if it were not there. With an expert "
                                           "pair: on the high-noise expert."}),
                "low_noise": ([SAME, OWN], {
                    "default": SAME,
                    "tooltip": "Expert pairs only: whether the low-noise expert takes the same strength, or "
                               "strength_low."}),
                "strength_low": ("FLOAT", {
                    **strength, "tooltip": f"How strongly the LoRA acts on the low-noise expert of a pair. Counts only "
                                           f"where low_noise is {OWN!r}; 0 leaves that expert alone."}),
                "start_sigma": ("FLOAT", {
                    "default": 1.0, **level,
                    "tooltip": "The noise level from which the LoRA acts: 1 is pure noise."}),
                "end_sigma": ("FLOAT", {
                    "default": 0.0, **level,
                    "tooltip": "The noise level down to which it acts; 0 is the clean video."}),
                "blocks": ("STRING", {
                    "default": "",
                    "tooltip": "Which blocks and layers of the LoRA are used; all, if empty. Block numbers, ranges and "
                               "kinds of layers, with ! to leave out: 0-9,15 or !30-39 or self_attn,!ffn"}),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {
                    "tooltip": "A stack of LoRAs from another pack, applied first, whole and over all noise levels. "
                               "Its strengths for the text encoder do nothing: Wan LoRAs have no such part."}),
                "merge": ("BOOLEAN", {
                    "default": False, "label_on": "yes", "label_off": "no",
                    "tooltip": "yes: all LoRAs of the model so far are folded into its weights while these are read, "
                               "which saves a little time at every step; a new strength then reads the model anew. "
                               "Those on quantised weights, or with a range of noise levels, stay beside the "
                               "weights."}),
            },
            "hidden": {
                "node_id": "UNIQUE_ID",
            },
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **_others: object) -> str:
        return "" if lora == NONE else HOST.fingerprint("loras", lora)

    def add(self, model: Model, lora: str, strength: float, low_noise: str, strength_low: float, start_sigma: float,
            end_sigma: float, blocks: str, lora_stack: list | None = None, merge: bool = False,
            node_id: str | None = None) -> tuple[Model, str]:
        count = len(model.loras)
        for name, whole_strength in _stacked(lora_stack):
            model = model.with_lora(open_lora(HOST.model_path("loras", name)), whole_strength)
        if lora != NONE:
            low = strength_low if low_noise == OWN else None
            model = model.with_lora(open_lora(HOST.model_path("loras", lora)), strength, low, start=start_sigma,
                                    end=end_sigma, blocks=blocks)
        report = "\n".join(format_match(added) for added in model.loras[count:]) or "no LoRA"
        HOST.say(node_id, report)
        return model.merged() if merge else model, report


def _stacked(stack: list | None) -> list[tuple[str, float]]:
    """File names and strengths of a LORA_STACK, without its empty rows. Raises ValueError for anything else."""
    rows = []
    for row in stack or ():
        if (not isinstance(row, tuple | list) or len(row) < 2 or not isinstance(row[0], str)
                or not isinstance(row[1], int | float) or not math.isfinite(row[1])):
            raise ValueError(f"the LoRA stack holds {row!r}; expected (file name, strength for the model, strength for "
                             "the text encoder). Use a node that makes a LORA_STACK.")
        if row[0] not in _EMPTY:
            rows.append((row[0], float(row[1])))
    return rows
