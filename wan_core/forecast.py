"""What a run will need of the device's memory, before anything runs: the plan, its peak, and what it costs.

Weights are added up from the files' headers. What a step works with is found by running two blocks of the model on
tensors without data, with everything that conditions the video and all LoRAs, and counting what is alive: so it holds
for every model, mode and size, and changes with the code. Nothing is read and nothing is allocated.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from .cache import AutoCache, EasyCache
from .cache.measuring import Measuring
from .conditioning import Condition, ImageChannels, ImageTokens, TextCondition, VaceCondition
from .dit import ModelInputs, NegativeText, WanTransformer
from .guidance import GuidanceOptions
from .memory import RESIDENT, Layout, OneAtATime, Plan
from .memory.budget import GB
from .memory.layout import by_block
from .memory.meter import FusedAttention, MemoryMeter
from .memory.plan import CHUNK, SMALLEST_CHUNK, Need, choose, lost_share
from .memory.rates import measured_rates
from .models import Model, Part, TextEncoder, VideoVAE
from .presets import VAES, Preset
from .vae import Tiling
from .weights import human_size
from .weights.linear import use_fp8_products
from .weights.lora import adapt

log = logging.getLogger(__name__)

# Latents in float32 that are there while the transformer runs: the sample, a velocity, the solver's history.
_LATENTS = 5

# Tiles of the VAE that pass together, at most, where there is room for them.
_TOGETHER = 4

# Sides of VAE tiles in pixels, the largest first, and how much of one its neighbours share at most.
_TILES = (768, 512, 384, 256, 192, 128)
_OVERLAP = 64


@dataclass(frozen=True)
class Forecast:
    """A plan for a run with its `peak` in bytes, of which `weights` are weights, within `budget` (None: no limit).

    `lost` is the share of a step's time that goes into waiting for copies, 0 to 1.
    """

    plan: Plan
    peak: int
    weights: int
    blocks: int
    budget: int | None
    lost: float

    def __str__(self) -> str:
        layout, chunk = self.plan.layout, self.plan.chunk
        limit = "" if self.budget is None else f" of {human_size(self.budget)}"
        parts = [f"{human_size(self.peak)}{limit} at most, {human_size(self.weights)} of them weights"]
        if layout.swapped:
            parts.append(f"{min(layout.swapped, self.blocks)} of {self.blocks} blocks swapped through {layout.slots} "
                         f"slot{'s' if layout.slots > 1 else ''}, {100 * self.lost:.0f} % of the time lost to it")
        else:
            parts.append("all blocks stay")
        if chunk:
            parts.append(f"{chunk} tokens at a time")
        return "; ".join(parts)

    def bars(self, measured: int | None = None, width: int = 20) -> str:
        """What was predicted, and measured, of the budget: a line with a bar for each, then the plan."""
        whole = self.budget or max(self.peak, measured or 0)

        def bar(name: str, nbytes: int) -> str:
            filled = min(width, round(width * nbytes / whole))
            return f"{name:<10}{'█' * filled}{'░' * (width - filled)} {human_size(nbytes)}"

        lines = [bar("planned", self.peak), *([] if measured is None else [bar("measured", measured)])]
        return "\n".join([*lines, str(self)])


def is_limited(handle: Model | TextEncoder | VideoVAE) -> bool:
    """Whether memory has to be looked at: on a CPU weights are the mapped file itself, and nobody counts."""
    return handle.memory.budget is not None or handle.placement.device.type != "cpu"


def planned(model: Model, shape: tuple[int, ...], prompts: Sequence[TextCondition]) -> tuple[Model, Forecast | None]:
    """The model with a plan for a run, and what was foreseen for it; None where it has one, or memory is not limited.

    Arguments and errors are those of `forecast`.
    """
    if model.plan is not None:
        return model, None
    if not is_limited(model):
        return replace(model, plan=Plan()), None
    told = forecast(model, shape, prompts)
    return replace(model, plan=told.plan), told


def forecast(model: Model, shape: tuple[int, ...], prompts: Sequence[TextCondition]) -> Forecast:
    """The plan for latents of `shape` [B, C, T, H, W] and the prompts of both branches with all that is beside them.

    Raises ValueError, with what would help, where no plan keeps within the model's memory budget.
    """
    need, device = needs(model, shape, prompts), model.placement.device
    budget = _budget(model, need.peak(Plan()))
    plan = Plan() if budget is None else choose(need, budget, model.memory.pinned_bytes(), _held(model))
    if plan is None:
        raise ValueError(_refusal(model, need, budget))
    lost = 0.0
    if plan.layout.swapped:
        rates = measured_rates(device, model.computes_in(model.low))
        lost = lost_share(need, plan, operations(model, shape), rates.flops, rates.bandwidth)
    return Forecast(plan, need.peak(plan), need.weights(plan.layout), len(need.blocks), budget, lost)


def needs(model: Model, shape: tuple[int, ...], prompts: Sequence[TextCondition]) -> Need:
    """What the model needs for latents of `shape`; of two experts, what either does."""
    blocks, others = [], []
    for name, part in model.parts.items():
        sizes = part.sizes(model.computes_in(part))
        for lora in model.loras:
            for target, adapter in lora.adapters[name].items():
                beside = f"{target.name} of LoRAs"
                sizes[beside] = sizes.get(beside, 0) + adapter.nbytes
        of_blocks, of_others = by_block(sizes, part.blocks)
        blocks.append(of_blocks)
        others.append(of_others)
    tokens = math.prod(shape[2:]) // math.prod(model.spec.patch_size)
    guidance = model.guidance
    is_shared = shape[0] == 1 or not any(prompt.beside for prompt in prompts)
    if is_shared and guidance.is_batched(model.placement.device.type, shape[0] * tokens):
        shape = (2 * shape[0], *shape[1:])

    held = len(prompts) * _held_by_cache(model, shape[0] * tokens)

    @cache
    def module(name: str) -> WanTransformer:
        return _sample_of(model, name, model.parts[name])

    @cache
    def working(chunk: int | None) -> int:
        compiled = _compiled(model, shape[0] * min(tokens, chunk or tokens)) if model.compile else 0
        return held + compiled + max(_working(module(name), shape, prompts, guidance, chunk) for name in model.parts)

    return Need(tuple(map(max, zip(*blocks))), max(others), tokens, working)


def _compiled(model: Model, tokens: int) -> int:
    """Bytes that compiled blocks need more than blocks as they are written: one tensor of the tokens and, of quantised
    weights, all matrices of a piece at once instead of one after the other."""
    spec, itemsize = model.spec, max(model.computes_in(part).itemsize for part in model.parts.values())
    quantised = any(part.file.quantised for part in model.parts.values())
    return itemsize * (tokens * spec.dim + quantised * (spec.dim ** 2 + spec.dim * spec.ffn_dim))


def _held_by_cache(model: Model, tokens: int) -> int:
    """Bytes that a step cache keeps on the device for each prompt: what the blocks have added to the tokens."""
    cache = model.cache.suited(model.preset.name) if isinstance(model.cache, AutoCache) else model.cache
    if cache is None or isinstance(cache, EasyCache):
        return 0
    # Where it is measured, the last step's is there beside the new one.
    copies = 2 if isinstance(cache, Measuring) else 1
    return copies * tokens * model.spec.dim * max(model.computes_in(part).itemsize for part in model.parts.values())


def fitted_encoder(encoder: TextEncoder, prompts: int = 1) -> TextEncoder:
    """A text encoder of which as many blocks stay on the device as the memory budget allows."""
    if not is_limited(encoder):
        return encoder
    part, working = encoder.part, encoder.working(prompts)
    whole = part.size(part.stored_dtype) + working
    budget = _budget(encoder, whole)
    if budget is None or whole <= budget:
        return encoder
    pinned, count = encoder.memory.pinned_bytes(), part.spec.num_layers
    for layout in (Layout(swapped, 2, pinned) for swapped in range(1, count + 1)):
        if part.resident_size(part.stored_dtype, layout) + working <= budget:
            break
    return replace(encoder, layout=layout)


def fitted(vae: VideoVAE, shape: tuple[int, ...], encode: bool = False) -> tuple[VideoVAE, int]:
    """A VAE with tiles that keep within the memory budget for latents of `shape`, and the bytes it needs with weights;
    0 where memory is not limited.

    Tiles that are set already, and pictures that need none, keep their size. Where no tile is small enough, the
    smallest are taken; where there is room for several, a GPU takes them in one batch.
    """
    if not is_limited(vae):
        return vae, 0
    stride = vae.spec.spatial_stride
    weights = vae.part.size(vae.computes_in)
    chosen, peak = vae, weights + vae_working(vae, shape, encode)
    budget = _budget(vae, peak)
    if budget is None:
        return chosen, peak
    for side in (side for side in _TILES if side < stride * max(shape[3:]) and vae.tiling is None):
        if peak <= budget:
            break
        chosen = replace(vae, tiling=Tiling(side, side, min(_OVERLAP, side // 4 // stride * stride)))
        peak = weights + vae_working(chosen, shape, encode)
    tiling = chosen.tiling
    # A GPU is not busy with one small tile. A CPU is, and has a faster way for a batch of one.
    together = _TOGETHER if tiling and vae.placement.device.type != "cpu" else 1
    while together > 1 and tiling.count(*shape[3:], stride) > 1:
        batched = replace(chosen, tiling=replace(tiling, together=together))
        needed = weights + vae_working(batched, shape, encode)
        if needed <= budget:
            return batched, needed
        together //= 2
    return chosen, peak


@torch.no_grad()
def vae_working(vae: VideoVAE, shape: tuple[int, ...], encode: bool = False) -> int:
    """The most that decoding latents of `shape`, or encoding to them, has on the device beside the weights."""
    module = vae.part.build(torch.device("meta"), vae.computes_in)
    stride, tiling = vae.spec.spatial_stride, vae.tiling
    height, width = shape[3], shape[4]
    if tiling:
        height, width = min(height, tiling.height // stride + 1), min(width, tiling.width // stride + 1)
    # From the third run of pieces on every run is like the one before, and from the second tile on every tile.
    frames = min(shape[2], 1 + 2 * module.at_once(height, width))
    latents = torch.empty((*shape[:2], frames, height, width), device="meta")
    video = torch.empty((shape[0], 3, 1 + (frames - 1) * vae.spec.temporal_stride, height * stride, width * stride),
                        device="meta")
    whole = torch.empty((*shape[:2], min(shape[2], 1 + 2 * module.at_once(*shape[3:])), *shape[3:]), device="meta")
    with torch.device("meta"), FusedAttention(), MemoryMeter("meta") as meter:
        if encode:
            module.encode(video, tiling=tiling)
        else:
            module.decode(latents, out=video, tiling=tiling)
            # Tiles are cut from features that are made of the whole picture.
            if tiling:
                module.compose(whole)
    return meter.peak


def official_peaks(part: Part, preset: Preset, dtype: str) -> dict[str, int]:
    """The most that a run of the preset's official size has on the device, in bytes: "all blocks stay", and "every
    block swapped", with the longest prompt and everything beside it that the model takes."""
    spec, vae, official = part.spec, VAES[preset.vae], preset.sampling
    shape = (1, vae.z_dim, 1 + (official.frames - 1) // vae.temporal_stride, official.height // vae.spatial_stride,
             official.width // vae.spatial_stride)
    beside: list[Condition] = []
    if spec.in_dim > vae.z_dim:
        beside.append(ImageChannels.nothing_known(spec, shape))
    if spec.image_dim:
        beside.append(ImageTokens(torch.zeros(1, spec.image_tokens, spec.image_dim)))
    if spec.vace_layers:
        beside.append(VaceCondition(torch.zeros(1, spec.vace_in_dim, *shape[2:])))
    prompt = TextCondition(torch.ones(1, spec.text_len, spec.text_dim), beside=tuple(beside))
    need = needs(Model(part, part, preset, OneAtATime("cpu"), dtype), shape, [prompt])
    swapped = Plan(Layout(len(need.blocks)), CHUNK if need.tokens > CHUNK else None)
    return {"all blocks stay": need.peak(Plan()), "every block swapped": need.peak(swapped)}


def operations(model: Model, shape: tuple[int, ...]) -> float:
    """Floating-point operations of one pass through the transformer: its matrix products and self-attention."""
    spec, tokens = model.spec, math.prod(shape[2:]) // math.prod(model.spec.patch_size)
    linear = 2 * tokens * (6 * spec.dim ** 2 + 2 * spec.dim * spec.ffn_dim)
    blocks = spec.num_layers + len(spec.vace_layers)
    return shape[0] * blocks * (linear + 4 * tokens ** 2 * spec.dim)


@torch.no_grad()
def _working(module: WanTransformer, shape: tuple[int, ...], prompts: Sequence[TextCondition],
             guidance: GuidanceOptions, chunk: int | None) -> int:
    """The most that a step has on the device beside the weights."""
    with FusedAttention(), MemoryMeter("meta") as meter:
        sample = torch.empty(shape, device="meta")
        timestep = torch.full((shape[0],), 500.0)
        if module.spec.model_type == "ti2v":
            # A given first frame has a timestep of its own.
            timestep = timestep[:, None].repeat(1, shape[2])
            timestep[:, 0] = 0
        # A run prepares each condition once, also where it is beside several prompts.
        prepared: dict[int, object] = {}
        for prompt in prompts:
            text = prepared[id(prompt)] = module.prepare_text(
                prompt.context.repeat(shape[0] // prompt.context.shape[0], 1, 1))
            inputs = ModelInputs(sample, timestep, text)
            for other in prompt.beside:
                if id(other) not in prepared:
                    prepared[id(other)] = other.prepare(module, sample)
                inputs = other.add(inputs, prepared[id(other)], 0.5)
        if guidance.nag:
            # As if the negative prompt were as long as this one; both have been embedded.
            inputs = replace(inputs, text=replace(inputs.text, away=NegativeText(inputs.text, guidance.nag)))
        module(inputs, chunk=chunk)
    return meter.peak + (_LATENTS - 1 + guidance.has_momentum) * 4 * math.prod(shape)


def _sample_of(model: Model, name: str, part: Part) -> WanTransformer:
    """The expert without data, with all its LoRAs, and of its blocks the first two, which have everything in them."""
    module = part.build(torch.device("meta"), model.computes_in(part))
    loras = tuple(replace(lora, start=1.0, end=0.0) for lora in model.loras)
    adapt(module, loras, name, 0.5)
    use_fp8_products(module, model.multiplies_in_fp8)
    module.blocks = nn.ModuleList(list(module.blocks)[:2])
    return module


def _refusal(model: Model, need: Need, budget: int) -> str:
    """Why no plan fits, and what would."""
    least = min(need.peak(Plan(replace(RESIDENT, swapped=len(need.blocks), slots=1), chunk))
                for chunk in (SMALLEST_CHUNK, None))
    advice = ["a smaller size or fewer frames"]
    if not any(part.file.quantised for part in (model.high, model.low)):
        advice.append("FP8 or GGUF weights")
    return (f"{model.preset.title} at this size needs at least {human_size(least)} of memory on "
            f"{model.placement.device} with every block swapped, and the budget is {human_size(budget)}. Use "
            f"{' or '.join(advice)}, or a larger budget.")


def _held(model: Model) -> Layout | None:
    """The layout of the expert that is on the device, if one is."""
    layouts = (model.placement.layout_of(part) for part in (model.high, model.low))
    return next((layout for layout in layouts if layout is not None), None)


def _budget(handle: Model | TextEncoder | VideoVAE, wanted: int) -> int | None:
    """Bytes that a run may use: the handle's own limit, but not more than there is."""
    free = handle.placement.budget(wanted)
    if handle.memory.budget is None:
        return free
    limit = int(handle.memory.budget * GB)
    return limit if free is None else min(free, limit)
