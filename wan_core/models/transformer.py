"""A transformer, or a pair of experts, as a value: files, preset, and every option of how it runs."""

import logging
import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from ..cache import StepCache
from ..cache.measuring import Measuring
from ..dit import AttentionRange, Compile, Radial, WanTransformer, check_backend, use_compiled
from ..guidance import GuidanceOptions
from ..memory import RESIDENT, Layout, Memory, Placement, Plan, working_dtype
from ..memory.recovery import made_room
from ..presets import VAES, Preset, TransformerSpec, VAESpec
from ..vae import LatentStats
from ..weights import LoadError, human_size
from ..weights.fp8 import MULTIPLIED, choose_fp8_products
from ..weights.linear import use_fp8_products
from ..weights.lora import Lora, LoraFile, adapt, fold
from .part import Part

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """A transformer, or a high- and a low-noise expert, with its preset and how to run it.

    `fp8_products` is "auto", "on" or "off": whether FP8 weights are multiplied in FP8, "auto" where the device is
    faster at it. `folded` are LoRAs that are in the weights already. `plan` says where the weights live and how much is
    worked on at a time; without one, a run makes one that keeps within `memory`. `guidance` says all about guidance but
    the sampler's scales, `cache` which steps may reuse what others have computed. `attention` is a backend, which
    `attention_ranges` replace at some noise levels and `radial` makes sparse at some; with `compile` blocks are
    compiled. Raises ValueError for an unknown precision or attention backend, for FP8 products on a device that has
    none, and for blocks to skip that the model does not have.
    """

    high: Part
    low: Part
    preset: Preset
    placement: Placement
    dtype: str = "auto"
    attention: str = "sdpa"
    loras: tuple[Lora, ...] = ()
    fp8_products: str = "auto"
    folded: tuple[Lora, ...] = ()
    plan: Plan | None = None
    memory: Memory = Memory()
    guidance: GuidanceOptions = GuidanceOptions()
    cache: StepCache | Measuring | None = None
    attention_ranges: tuple[AttentionRange, ...] = ()
    radial: Radial | None = None
    compile: Compile | None = None

    def __post_init__(self) -> None:
        check_backend(self.attention)
        working_dtype(self.dtype, self.low.stored_dtype, self.placement.device)
        choose_fp8_products(self.fp8_products, self.placement.device)
        self.guidance.check_blocks(self.spec.num_layers)

    @property
    def multiplies_in_fp8(self) -> bool:
        """Whether FP8 weights are multiplied in FP8."""
        return choose_fp8_products(self.fp8_products, self.placement.device)

    @property
    def chunk(self) -> int | None:
        """How many tokens are worked on at a time, None for all."""
        return self.plan.chunk if self.plan else None

    @property
    def boundary(self) -> float | None:
        """The sigma at or above which the high-noise expert works; None for a single model."""
        return self.preset.sampling.boundary if self.preset.experts else None

    @property
    def parts(self) -> dict[str, Part]:
        """The experts by name; a single model is 'low'."""
        return {"high": self.high, "low": self.low} if self.preset.experts else {"low": self.low}

    def computes_in(self, part: Part) -> torch.dtype:
        """The type that one of its parts computes in."""
        return working_dtype(self.dtype, part.stored_dtype, self.placement.device)

    @property
    def spec(self) -> TransformerSpec:
        return self.low.spec

    @property
    def vae_spec(self) -> VAESpec:
        return VAES[self.preset.vae]

    @property
    def latent_stats(self) -> LatentStats:
        return LatentStats.of(self.vae_spec)

    def quantised(self, form: str) -> "Model":
        """A copy whose matrices are quantised on load: "fp8_scaled", "q8_0" and so on.

        Raises ValueError for an unknown format, or where nothing is left to quantise.
        """
        low = self.low.quantised(form)
        return replace(self, low=low, high=low if self.high is self.low else self.high.quantised(form))

    def summary(self) -> str:
        """Lines for people: what was found in the files, and how it will be computed."""
        dtype = self.computes_in(self.low)
        computed = str(dtype).removeprefix("torch.")
        stored = {form for part in self.parts.values() for form in part.file.quantised.values()}
        if MULTIPLIED in stored and self.multiplies_in_fp8:
            computed += f", products of {MULTIPLIED} weights in FP8"
        files = [f"{f'{name} noise: ' if self.preset.experts else ''}{part.summary()}, "
                 f"{human_size(part.size(dtype))} on the device" for name, part in self.parts.items()]
        return "\n".join([self.preset.title, *files, f"computed in {computed} on {self.placement.device}"])

    def record(self) -> dict[str, object]:
        """What a made video is to remember of its model: preset, files, LoRAs with their strengths, options."""
        folded = {lora.key for lora in self.folded}
        loras = (*self.folded, *(lora for lora in self.loras if lora.key not in folded))
        return {"model": self.preset.name, "files": [part.label for part in self.parts.values()],
                "loras": [{"file": lora.file.path.name, **lora.strengths} for lora in loras],
                **({"guidance options": guided} if (guided := self.guidance.record()) else {}),
                **({"cache": str(self.cache)} if self.cache else {}),
                **({"radial attention": asdict(self.radial)} if self.radial else {})}

    def name_at(self, timestep: float) -> str:
        """'high' or 'low': which expert works at `timestep` (0..1000). A single model is 'low' throughout."""
        return "high" if self.boundary is not None and timestep >= self.boundary * 1000 else "low"

    def with_lora(self, file: LoraFile, strength: float = 1.0, low: float | None = None, *, start: float = 1.0,
                  end: float = 0.0, blocks: str = "") -> "Model":
        """A copy with one LoRA more, of which `low` is the low-noise expert's strength, if it is another one.

        See `Lora` for the rest. Raises ValueError, before anything is loaded, where the file fits neither expert, or
        where it or its strengths are for a pair of experts and this is a single model.
        """
        if not self.preset.experts and file.experts != ("both",):
            raise LoadError(f"{file.path.name} holds adapters for a high- and a low-noise expert, and "
                            f"{self.preset.title} is a single model. Choose a LoRA for one model, or open both "
                            "experts.")
        if not self.preset.experts and low is not None:
            raise ValueError(f"{file.path.name} is given a strength of its own for low noise, and {self.preset.title} "
                             "is a single model. Give one strength.")
        strengths = {"high": strength, "low": strength if low is None else low}
        matched = {name: file.match(part.file.shapes(), name if self.preset.experts else None)
                   for name, part in self.parts.items()}
        return replace(self, loras=(*self.loras, Lora(file, matched, strengths, start, end, blocks)))

    def merged(self) -> "Model":
        """A copy with its LoRAs folded into the weights when these are read, which costs nothing per step.

        LoRAs with a range of noise levels, and those on quantised weights, stay on the activations. `self` is the model
        without the merge, as it was.
        """
        files, left = fold({name: part.file for name, part in self.parts.items()}, self.loras)
        low = replace(self.low, file=files["low"])
        return replace(self, low=low, high=replace(self.high, file=files["high"]) if self.preset.experts else low,
                       loras=left, folded=(*self.folded, *(lora for lora in self.loras if lora not in left)))

    def get(self, name: str, sigma: float = 0.0) -> WanTransformer:
        """The expert, ready to run on the placement's device at a noise level; until the next call of any copy."""
        module = self.placement.place(*self._wanted(name))
        use_fp8_products(module, self.multiplies_in_fp8)
        if adapt(module, self.loras, name, sigma):
            self.placement.changed()
        use_compiled(module, self.compile, why_no_graphs=self._why_no_graphs())
        return module

    def _why_no_graphs(self) -> str | None:
        """Why no CUDA graphs of this model can be recorded, if there is a reason."""
        if self.placement.device.type != "cuda":
            return f"the device {self.placement.device} has none"
        if self.plan and self.plan.layout.swapped:
            return "blocks come and go while it runs, and graphs hold the addresses of weights"
        if any(part.file.quantised for part in self.parts.values()):
            return "numbers are made of its quantised weights anew in each step, and graphs hold their addresses"
        return None

    def expect(self, name: str, sigma: float) -> None:
        """The expert `name` will be asked for next, at a noise level: while the other one computes, what there is room
        for is brought to the device.

        Weights that have to be computed first (merged, quantised on load) are not: the device is busy.
        """
        part, dtype, layout = self._wanted(name)
        if part.file.made:
            return

        def prepare(module: nn.Module) -> None:
            use_fp8_products(module, self.multiplies_in_fp8)
            adapt(module, self.loras, name, sigma)

        self.placement.expect(part, dtype, layout, prepare)

    def placed_size(self) -> int:
        """Bytes that the larger expert's weights take on the device in this plan, without LoRAs."""
        return max(part.resident_size(dtype, layout) for part, dtype, layout in map(self._wanted, ("high", "low")))

    def _wanted(self, name: str) -> tuple[Part, torch.dtype, Layout]:
        part, layout = self.high if name == "high" else self.low, self.plan.layout if self.plan else RESIDENT
        return part, self.computes_in(part), layout

    def state(self, name: str, sigma: float) -> Hashable:
        """Equal for noise levels at which `get` gives the same weights."""
        return name, tuple(lora.strength_at(name, sigma) for lora in self.loras)

    def recover(self, error: Exception, shape: tuple[int, ...]) -> "Model | None":
        """A copy that needs less memory, if memory ran out in a step on latents of `shape` [B, C, T, H, W].

        Everything is taken off the device. The result is the same but for the rounding of products in smaller chunks.
        None for any other `error`; raises torch.OutOfMemoryError, with what would help, where nothing is left to save.
        """
        if not made_room(error, self.placement):
            return None
        blocks = len(self.low.blocks)
        tokens = math.prod(shape[2:]) // math.prod(self.spec.patch_size)
        plan = (self.plan or Plan()).leaner(blocks, tokens)
        if plan is None:
            raise torch.OutOfMemoryError(
                f"out of memory, and nothing is left to save: all {blocks} blocks of {self.preset.title} are swapped, "
                f"and {min(tokens, self.chunk or tokens)} of {tokens} tokens are worked on at a time. Make fewer "
                "frames or a smaller size, use weights in FP8 or GGUF, or end what else uses the device.") from error
        log.warning("Wan: out of memory; the step is repeated. %d of %d blocks are now swapped, through %d slots, %d "
                    "tokens at a time.", min(plan.layout.swapped, blocks), blocks, plan.layout.slots,
                    min(tokens, plan.chunk or tokens))
        return replace(self, plan=plan)

    def check_latents(self, latents: Tensor) -> None:
        """Raise ValueError unless `latents` [B, C, T, H, W] fit this model, before anything is loaded."""
        channels = self.vae_spec.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(f"latents have shape {list(latents.shape)}; {self.preset.title} takes "
                             f"[batch, {channels}, frames, height, width]. Use latents of the same family.")
        if latents.shape[3] % 2 or latents.shape[4] % 2:
            pixels = [size * self.vae_spec.spatial_stride for size in (latents.shape[4], latents.shape[3])]
            raise ValueError(f"latents stand for {pixels[0]}x{pixels[1]} pixels; width and height must be multiples of "
                             f"{2 * self.vae_spec.spatial_stride}.")
        if not latents.isfinite().all():
            raise ValueError("the latents hold NaN or infinite values; look for where they come from (often a VAE that "
                             "overflows in float16).")

    def check_context(self, context: Tensor) -> None:
        """Raise ValueError unless the text embedding [B, L, width] is finite and as wide as the model's text input."""
        if context.shape[-1] != self.spec.text_dim:
            raise ValueError(f"the prompt was encoded to a width of {context.shape[-1]}, {self.preset.title} takes "
                             f"{self.spec.text_dim}. Use the text encoder {self.preset.text_encoder}.")
        if not context.isfinite().all():
            raise ValueError("the prompt was encoded to NaN or infinite values; use another precision for the text "
                             "encoder.")
