"""What becomes of each input that ComfyUI's Wan templates set on the core's nodes, once our nodes stand in their place.

The one table of it: `test_templates.py` checks our nodes against it and finds its rows in docs/templates.md. Widgets
stand in the order in which a saved graph stores their values. Reference: ComfyUI's `nodes.py`,
`comfy_extras/nodes_wan.py` and `comfy_extras/nodes_model_advanced.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Nodes of the core that patch the model on its way to the sampler, and that Wan LoRA takes the place of.
LORA = frozenset({"LoraLoader", "LoraLoaderModelOnly"})

# Nodes of which at least one output is an input passed on.
PASSES = LORA | {"ModelSamplingSD3", "TrimVideoLatent"}

# Nodes that stay as they are: they never see a model, or choose between two of whatever kind.
STAYS = frozenset({
    "BatchImagesNode", "CLIPVisionEncode", "Canny", "CheckpointLoaderSimple", "ComfyMathExpression", "ComfySwitchNode",
    "CreateVideo", "GeminiImageNode", "GeminiNodeV3", "GetImageSize", "GetVideoComponents", "GrowMask",
    "ImageCompositeMasked", "ImageFromBatch", "ImagePadForOutpaint", "ImageScaleToTotalPixels", "ImageStitch",
    "ImageToMask", "InvertMask", "JoinImageWithAlpha", "LoadImage", "LoadVideo", "MaskPreview", "MaskToImage",
    "PreviewImage", "PrimitiveBoolean", "PrimitiveFloat", "PrimitiveInt", "PrimitiveNode", "RepeatImageBatch",
    "ResizeImageMaskNode", "SAM3_Detect", "SaveAnimatedWEBP", "SaveVideo", "SolidMask", "SplitImageWithAlpha",
})


@dataclass(frozen=True)
class Fate:
    """What becomes of one input.

    to: our nodes and inputs that take its value or link; more than one where the graph decides between them.
    values: the only values that are foreseen -> what ours is set to. Empty: the number or text goes over as it is.
    why: why nothing takes it, where `to` is empty.
    """

    to: tuple[tuple[str, str], ...] = ()
    values: Mapping[object, object] = field(default_factory=lambda: MappingProxyType({}))
    why: str = ""


@dataclass(frozen=True)
class CoreNode:
    """A node of the core that one of ours takes the place of: its widgets, in the order of saved values, and links."""

    widgets: Mapping[str, Fate]
    links: Mapping[str, Fate]


def _to(*places: str, **values: object) -> Fate:
    """Places are written "Node.input"."""
    return Fate(tuple(tuple(place.split(".")) for place in places), MappingProxyType(values))


def _gone(why: str, *values: str) -> Fate:
    return Fate(values=MappingProxyType(dict.fromkeys(values)), why=why)


def _on(node: str, *names: str) -> dict[str, Fate]:
    """Inputs that one of our nodes has under the same name."""
    return {name: _to(f"{node}.{name}") for name in names}


_MODEL = _to("WanCoreSampler.model")
_PRECISION = ("WanCoreModelLoader.precision", "WanCoreExpertPairLoader.precision")
_SIZE = ("width", "height", "length", "batch_size")
_PROMPTS = ("positive", "negative", "vae")
_AFTER = _gone("Wan Sampler's `seed` has the same one", "fixed", "randomize", "increment", "decrement")
_GUIDANCE = _to("WanCoreSampler.guidance", "WanCoreSampler.guidance_low")
_SOLVER = _to("WanCoreSampler.solver", uni_pc="unipc", euler="euler")
_SCHEDULER = _gone("each solver has its official schedule", "simple")
_STRENGTH = _to("WanCoreLora.strength", "WanCoreLora.strength_low")
_NO_TEXT = _gone("LoRAs for Wan have no part for the text encoder: connect CLIP straight to the prompts")
_SAMPLED = {**_on("WanCoreSampler", "positive", "negative"), "model": _MODEL,
            "latent_image": _to("WanCoreSampler.latent")}

CORE = MappingProxyType({
    "UNETLoader": CoreNode({
        "unet_name": _to("WanCoreModelLoader.model", "WanCoreExpertPairLoader.high_noise",
                         "WanCoreExpertPairLoader.low_noise"),
        "weight_dtype": _to(*_PRECISION, default="auto", fp8_e4m3fn_fast="auto"),
    }, {}),
    "CLIPLoader": CoreNode({
        "clip_name": _to("WanCoreTextEncoderLoader.text_encoder"),
        "type": _gone("read from the file", "wan"),
        "device": _gone("ComfyUI's memory manager places it", "default"),
    }, {}),
    "VAELoader": CoreNode({"vae_name": _to("WanCoreVAELoader.vae")}, {}),
    "CLIPVisionLoader": CoreNode({"clip_name": _to("WanCoreCLIPVisionLoader.clip_vision")}, {}),
    "LoraLoaderModelOnly": CoreNode({"lora_name": _to("WanCoreLora.lora"), "strength_model": _STRENGTH},
                                    _on("WanCoreLora", "model")),
    "LoraLoader": CoreNode({"lora_name": _to("WanCoreLora.lora"), "strength_model": _STRENGTH,
                            "strength_clip": _NO_TEXT}, {**_on("WanCoreLora", "model"), "clip": _NO_TEXT}),
    "ModelSamplingSD3": CoreNode({"shift": _to("WanCoreSampler.shift")}, {"model": _MODEL}),
    "KSampler": CoreNode({
        "seed": _to("WanCoreSampler.seed"), "control_after_generate": _AFTER, "steps": _to("WanCoreSampler.steps"),
        "cfg": _GUIDANCE, "sampler_name": _SOLVER, "scheduler": _SCHEDULER, "denoise": _to("WanCoreSampler.denoise"),
    }, _SAMPLED),
    "KSamplerAdvanced": CoreNode({
        "add_noise": _to("WanCoreSampler.add_noise", enable=True, disable=False),
        "noise_seed": _to("WanCoreSampler.seed"), "control_after_generate": _AFTER,
        "steps": _to("WanCoreSampler.steps"), "cfg": _GUIDANCE, "sampler_name": _SOLVER, "scheduler": _SCHEDULER,
        "start_at_step": _to("WanCoreSampler.start_step"), "end_at_step": _to("WanCoreSampler.end_step"),
        "return_with_leftover_noise": _gone("a run that ends early always leaves its noise in", "enable", "disable"),
    }, _SAMPLED),
    "CLIPTextEncode": CoreNode({"text": _to("WanCoreTextEncode.positive", "WanCoreTextEncode.negative")},
                               _on("WanCoreTextEncode", "clip")),
    "EmptyHunyuanLatentVideo": CoreNode(_on("WanCoreEmptyLatent", *_SIZE), {}),
    "WanImageToVideo": CoreNode(
        _on("WanCoreImageToVideo", *_SIZE),
        _on("WanCoreImageToVideo", *_PROMPTS, "start_image", "clip_vision_output")),
    "WanFirstLastFrameToVideo": CoreNode(_on("WanCoreImageToVideo", *_SIZE), {
        **_on("WanCoreImageToVideo", *_PROMPTS, "start_image", "end_image"),
        **dict.fromkeys(("clip_vision_start_image", "clip_vision_end_image"),
                        _gone("Wan Image to Video looks at both pictures itself: connect the CLIP vision model to "
                              "`clip_vision`")),
    }),
    "Wan22ImageToVideoLatent": CoreNode(_on("WanCoreImageLatent", *_SIZE),
                                        _on("WanCoreImageLatent", "vae", "start_image")),
    "WanVaceToVideo": CoreNode(
        _on("WanCoreVace", *_SIZE, "strength"),
        _on("WanCoreVace", *_PROMPTS, "control_video", "control_masks", "reference_image")),
    "TrimVideoLatent": CoreNode({"trim_amount": _to("WanCoreDecode.trim_latent")},
                                _on("WanCoreDecode", "samples")),
    "VAEDecode": CoreNode({}, _on("WanCoreDecode", "samples", "vae")),
})


def rows(titles: Mapping[str, str]) -> list[str]:
    """The table as docs/templates.md has it: core node, inputs, what becomes of them. `titles`: our node id -> title.

    Inputs of a node of which the same can be said share a row.
    """
    table = []
    for kind, node in CORE.items():
        said: dict[str, list[str]] = {}
        for name, fate in {**node.links, **node.widgets}.items():
            said.setdefault(_described(name, fate, titles), []).append(f"`{name}`")
        table += [f"| {kind} | {', '.join(names)} | {text} |" for text, names in said.items()]
    return table


def _described(name: str, fate: Fate, titles: Mapping[str, str]) -> str:
    if not fate.to:
        return fate.why
    if len(fate.to) == 1 and fate.to[0][1] == name and not fate.values:
        return f"{titles[fate.to[0][0]]}, under the same name"
    places: dict[str, list[str]] = {}
    for node, ours in fate.to:
        places.setdefault(titles[node], []).append(f"`{ours}`")
    words = {True: "yes", False: "no"}
    pairs = ", ".join(f"`{old}` → `{words.get(new, new)}`" for old, new in fate.values.items())
    text = "; ".join(f"{title}, {', '.join(names)}" for title, names in places.items())
    return f"{text}: {pairs}" if pairs else text
