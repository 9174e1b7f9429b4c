"""The forecast of a run's memory: against tensors that were really alive, for models of every kind and plan."""

from dataclasses import replace

import pytest
import torch

from tests.weights.lora.lora_files import low_rank_file
from wan_core import open_lora
from wan_core.conditioning import ImageChannels, ImageTokens, TextCondition, VaceCondition
from wan_core.dit import VaceTransformer, WanTransformer
from wan_core.forecast import fitted, fitted_encoder, forecast, needs, operations
from wan_core.guidance import GuidanceOptions, NormalisedAttention, Projection
from wan_core.memory import Layout, Memory, OneAtATime, Plan
from wan_core.memory.leaves import leaves
from wan_core.memory.meter import MemoryMeter
from wan_core.memory.plan import SMALLEST_CHUNK, Need, choose, lost_share
from wan_core.models import Model, Part, VideoVAE, load_text_encoder, load_vae
from wan_core.pipeline import sample
from wan_core.presets import PRESETS, TransformerSpec
from wan_core.sampling import Conditions, Guidance, make_schedule
from wan_core.vae import Tiling
from wan_core.weights import expected_shapes, open_weights, recognise_file, save_weights, write_quantised

T2V = TransformerSpec(model_type="t2v", dim=256, ffn_dim=1024, num_heads=2, num_layers=4, text_dim=96)
SPECS = {
    "t2v": T2V,
    "i2v": replace(T2V, model_type="i2v", in_dim=36, image_dim=32, image_tokens=257),
    "ti2v": replace(T2V, model_type="ti2v", in_dim=48, out_dim=48),
    "vace": replace(T2V, model_type="vace", vace_layers=(0, 2), vace_in_dim=96),
}
GB = 1e9


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A random model of a type, in float32 or in a file of a weight format: what is as it is stored is mapped."""
    folder = tmp_path_factory.mktemp("models")

    def made(kind="t2v", form=None):
        spec = SPECS[kind]
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            torch.manual_seed(1)
            save_weights(path, (VaceTransformer if spec.vace_layers else WanTransformer)(spec).state_dict())
        if form:
            quantised = folder / f"{kind}_{form}.{'gguf' if form == 'q8_0' else 'safetensors'}"
            if not quantised.exists():
                write_quantised(recognise_file(open_weights(path))[0], form, quantised, lambda done, of: None)
            path = quantised
        return Part(recognise_file(open_weights(path))[0], spec, ())

    return made


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA on every matrix of the blocks, of rank 3."""
    torch.manual_seed(2)
    modules = {name.removesuffix(".weight"): shape for name, shape in expected_shapes(T2V).items()
               if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2}
    return open_lora(low_rank_file(tmp_path_factory.mktemp("loras") / "l.safetensors", modules))


def model_of(high, low=None, **options):
    preset = {"t2v": "nano_t2v", "vace": "nano_t2v", "i2v": "nano_i2v", "ti2v": "nano_ti2v"}[high.spec.model_type]
    return Model(high, low or high, PRESETS["nano_t2v_a" if low else preset], OneAtATime("cpu"), **options)


def prompts_for(model, shape):
    """Two prompts with everything beside them that the model takes."""
    def randn(*sizes):
        return torch.randn(sizes, generator=torch.Generator().manual_seed(3))

    beside = {"t2v": (), "ti2v": (),
              "i2v": (ImageChannels.nothing_known(model.spec, shape), ImageTokens(randn(1, 257, 32))),
              "vace": (VaceCondition(randn(1, 96, *shape[2:]), 1.0),)}[model.spec.model_type]
    return [TextCondition(randn(1, length, 96), beside=beside) for length in (9, 5)]


def measured(model, shape):
    """Bytes that were alive at the peak of two guided steps, with the weights that stay, which are views of the file,
    and VACE controls, which here need no copy."""
    module = model.get("low")
    swapped = {leaf for name in model.plan.layout.names(module) for leaf in leaves(module.get_submodule(name))}
    resident = sum(leaf.get().nbytes for leaf in leaves(module) if leaf not in swapped)
    prompts = prompts_for(model, shape)
    noise, empty = torch.randn(shape, generator=torch.Generator().manual_seed(4)), torch.zeros(shape)
    model.placement.clear()
    with MemoryMeter("cpu") as meter:
        sample(model, empty, make_schedule("unipc", 2, 3.0), Conditions(prompts[:1], prompts[1:]), Guidance(3.0, 3.0),
               noise=noise)
    shared = {id(other): other.control.nbytes for other in prompts[0].beside if isinstance(other, VaceCondition)}
    return meter.peak + resident + sum(shared.values())


SMALL, LONG = (1, 16, 3, 32, 32), (1, 16, 5, 48, 32)
SETTINGS = [
    ("t2v", None, Layout(), None, SMALL), ("t2v", None, Layout(), 512, SMALL), ("t2v", None, Layout(), 128, SMALL),
    ("t2v", None, Layout(4), None, SMALL), ("t2v", None, Layout(4), 128, SMALL), ("t2v", None, Layout(2), 256, SMALL),
    ("t2v", None, Layout(2, 1), None, SMALL), ("t2v", None, Layout(4, 1), 512, SMALL),
    ("t2v", None, Layout(4, 3), 512, SMALL), ("t2v", None, Layout(), None, LONG), ("t2v", None, Layout(4), 512, LONG),
    ("t2v", None, Layout(), None, (2, *SMALL[1:])), ("t2v", None, Layout(4), 128, (2, *SMALL[1:])),
    ("t2v", "fp8_scaled", Layout(), None, SMALL), ("t2v", "fp8_scaled", Layout(4), 256, SMALL),
    ("t2v", "q8_0", Layout(), 256, SMALL), ("t2v", "q8_0", Layout(4), None, SMALL),
    ("i2v", None, Layout(), None, SMALL), ("i2v", None, Layout(4), 256, SMALL),
    ("ti2v", None, Layout(), None, (1, 48, 3, 32, 32)), ("ti2v", None, Layout(4), 256, (1, 48, 3, 32, 32)),
    ("vace", None, Layout(), None, SMALL), ("vace", None, Layout(6), 256, SMALL),
]


@pytest.mark.parametrize(("kind", "form", "layout", "chunk", "shape"), SETTINGS)
def test_the_predicted_peak_is_the_measured_one(part, kind, form, layout, chunk, shape):
    """Promise: within 5 % of the tensors that were alive, weights and slots included."""
    model = model_of(part(kind, form), plan=Plan(layout, chunk))
    predicted = needs(model, shape, prompts_for(model, shape)).peak(model.plan)
    assert predicted == pytest.approx(measured(model, shape), rel=0.05)


@pytest.mark.parametrize("layout", [Layout(), Layout(4)], ids=["resident", "swapped"])
def test_loras_and_experts_are_counted(part, lora, layout):
    """Promise: LoRAs travel with their blocks and are part of the peak; of two experts the larger one counts."""
    model = model_of(part(), plan=Plan(layout, 256)).with_lora(lora, 0.5).with_lora(lora, 0.3)
    predicted = needs(model, SMALL, prompts_for(model, SMALL)).peak(model.plan)
    assert predicted == pytest.approx(measured(model, SMALL), rel=0.05)
    need = needs(model, SMALL, prompts_for(model, SMALL))
    factors = 2 * sum(adapter.nbytes for adapter in model.loras[0].adapters["low"].values())
    beside = need.weights(layout) - model.placed_size()
    assert beside == factors if not layout.swapped else 0 < beside < factors
    pair = model_of(part("t2v", "q8_0"), part(), plan=Plan(layout, 256))
    alone = model_of(part(), plan=Plan(layout, 256))
    assert needs(pair, SMALL, prompts_for(pair, SMALL)).peak(pair.plan) == pytest.approx(
        needs(alone, SMALL, prompts_for(alone, SMALL)).peak(alone.plan), rel=0.05)


@pytest.mark.parametrize(("options", "chunk"), [
    (GuidanceOptions(nag=NormalisedAttention()), None), (GuidanceOptions(nag=NormalisedAttention()), 512),
    (GuidanceOptions(batched="on"), None), (GuidanceOptions(projection=Projection()), None)])
def test_options_of_guidance_are_counted(part, options, chunk):
    """Promise: guided attention, both prompts at once and what is remembered from step to step are part of the peak."""
    model = model_of(part(), plan=Plan(chunk=chunk), guidance=options)
    predicted = needs(model, SMALL, prompts_for(model, SMALL)).peak(model.plan)
    assert predicted == pytest.approx(measured(model, SMALL), rel=0.05)


def test_a_run_keeps_within_its_budget(part):
    """Promise: from ample to the least that is possible, the chosen plan is within the budget, takes no more than it
    must, and is what the run then really needs; below that, the refusal says what would help."""
    prompts = prompts_for(model_of(part()), LONG)
    whole = needs(model_of(part()), LONG, prompts)
    resident, least = whole.peak(Plan()), whole.peak(Plan(Layout(4, 1), SMALLEST_CHUNK))
    seen = []
    for budget in (2 * resident, 0.99 * resident, 0.75 * resident, 0.6 * resident, least):
        model = model_of(part(), memory=Memory(budget / GB))
        told = forecast(model, LONG, prompts)
        assert told.peak <= budget and measured(replace(model, plan=told.plan), LONG) <= 1.03 * budget
        seen.append((told.plan.chunk is not None, told.plan.layout.swapped))
    assert seen[0] == (False, 0) and seen == sorted(seen) and seen[-1][1] > 0
    assert "of 4 blocks swapped through" in str(told) and "tokens at a time" in str(told)
    with pytest.raises(ValueError, match=r"needs at least [0-9.]+ MB .* with every block swapped, and the budget is "
                                         r"1\.00 MB\. Use a smaller size or fewer frames or FP8 or GGUF weights"):
        forecast(model_of(part(), memory=Memory(0.001)), LONG, prompts)


def test_the_cheapest_plan_is_chosen():
    """Promise: chunks before blocks, two slots before one, and no more blocks than needed."""
    need = Need((10,) * 8, 5, 20000, lambda chunk: {None: 100, 8192: 50, 2048: 40, 512: 30}[chunk])
    assert choose(need, 185, 0) == Plan()
    assert choose(need, 184, 0) == Plan(Layout(), 8192)
    assert choose(need, 134, 0) == Plan(Layout(3, 2, 0), 8192)
    assert choose(need, 75, 7) == Plan(Layout(8, 2, 7), 8192)
    assert choose(need, 65, 0) == Plan(Layout(8, 1, 0), 8192)
    assert choose(need, 64, 0) == Plan(Layout(8, 2, 0), 2048) if need.peak(Plan(Layout(8), 2048)) <= 64 else True
    assert choose(need, 45, 0) == Plan(Layout(8, 1, 0), 512) and choose(need, 44, 0) is None


def test_a_layout_that_is_there_is_kept_if_it_is_nearly_as_good():
    """Promise: a model that lies on the device is not read anew for a block or two, but for more it is, and where what
    is there does not fit any more."""
    need = Need((10,) * 8, 5, 100, lambda chunk: 50)
    budget = need.peak(Plan(Layout(5)))
    assert choose(need, budget, 0) == Plan(Layout(5))
    for swapped in (6, 7):
        assert choose(need, budget, 0, Layout(swapped)) == Plan(Layout(swapped))
    assert choose(need, budget, 0, Layout(8)) == choose(need, budget, 0, Layout(4)) == Plan(Layout(5))
    assert Layout(3, pinned=1) == Layout(3, pinned=2)


def test_time_lost_to_copies():
    """Promise: nothing where computing takes longer than the copies; the rest of the copies' time where it does not;
    all of it with one slot."""
    need = Need((100, 100), 0, 10, lambda chunk: 0)
    assert lost_share(need, Plan(Layout(2)), operations=50, flops=10, bandwidth=40) == 0
    assert lost_share(need, Plan(Layout(2)), operations=50, flops=10, bandwidth=20) == pytest.approx(0.5)
    assert lost_share(need, Plan(Layout(2, 1)), operations=50, flops=10, bandwidth=40) == pytest.approx(0.5)


def test_operations_of_the_released_model(part):
    """Promise: 14B at 81 frames of 1280x720 takes 6.5 PFLOP a pass, as has been counted by hand."""
    spec = replace(T2V, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096)
    model = model_of(replace(part(), spec=spec))
    assert operations(model, (1, 16, 21, 90, 160)) == pytest.approx(6.5e15, rel=0.02)


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("encode", [False, True])
def test_the_vaes_peak(tile, encode):
    """Promise: what decoding and encoding need is predicted within 5 %, whole and in tiles."""
    vae = replace(load_vae(), dtype="bfloat16", placement=OneAtATime("cpu"), memory=Memory(1.0),
                  tiling=None if tile is None else Tiling(tile, tile, 16))
    module, latents = vae.module(), torch.randn(1, 16, 4, 16, 16)
    video, out = torch.randn(1, 3, 13, 128, 128), torch.empty(1, 3, 13, 128, 128)
    with MemoryMeter("cpu") as meter:
        if encode:
            vae.encode(video)
        else:
            vae.decode(latents, out=out)
    _, predicted = fitted(vae, tuple(latents.shape), encode)
    # The result of encoding, and the features that tiles are cut from, are on the host.
    features = 4 * 16 * 16 * module.decoder.conv1.out_channels * 2
    on_host = latents.numel() * 4 if encode else 0 if tile is None else features
    assert predicted - vae.part.size(torch.bfloat16) == pytest.approx(meter.peak - on_host, rel=0.1)


def test_tiles_are_chosen_from_the_budget():
    """Promise: none where there is room, the largest that fit where there is not, and set ones stay."""
    vae, shape = load_vae(placement=OneAtATime("cpu")), (1, 16, 5, 64, 64)
    assert fitted(vae, shape) == (vae, 0), "a CPU has no limit unless one is set"
    _, whole = fitted(replace(vae, memory=Memory(1000)), shape)
    tight, peak = fitted(replace(vae, memory=Memory(0.6 * whole / GB)), shape)
    assert peak <= 0.6 * whole and tight.tiling.height == 384
    tighter, _ = fitted(replace(vae, memory=Memory(0.2 * whole / GB)), shape)
    assert tighter.tiling.height < 384
    own = replace(vae, tiling=Tiling(512, 512, 64), memory=Memory(0.001))
    assert isinstance(own, VideoVAE) and fitted(own, shape)[0].tiling == own.tiling


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"budget": float("nan")}, {"budget": -3.0}, {"pinned": -1.0},
                                   {"budget": 1e9}])
def test_impossible_budgets_are_refused(wrong):
    """Promise: a budget that is no amount of memory is an error when it is given."""
    with pytest.raises(ValueError, match="expected a number of GB"):
        Memory(**wrong)


def test_a_text_encoder_that_does_not_fit_comes_block_by_block():
    """Promise: with less memory than its weights its blocks come and go, with the same result bit for bit, and its
    table of pieces stays on the host."""
    encoder = load_text_encoder(placement=OneAtATime("cpu"))
    expected = encoder.encode(["a red circle moving left", "blue"])
    size = encoder.part.size(encoder.part.stored_dtype)
    assert fitted_encoder(encoder) is encoder
    assert fitted_encoder(replace(encoder, memory=Memory(1.0))).layout == Layout()
    tight = fitted_encoder(replace(encoder, memory=Memory(0.001)), prompts=2)
    assert tight.layout.swapped == encoder.part.spec.num_layers
    assert torch.equal(tight.encode(["a red circle moving left", "blue"]), expected)
    assert encoder.part.resident_size(encoder.part.stored_dtype, tight.layout) < size
