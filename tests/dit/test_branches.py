"""The transformer's branches (images, known frames, VACE) against diffusers, and what each of them promises itself."""

import weakref
from dataclasses import dataclass, replace

import pytest
import torch

from tests.dit.oracle import SPEC, Oracle, Sizes, diffusers_name, in_bfloat16, inputs, transformer
from wan_core.dit import ModelInputs, VaceControl, WanTransformer
from wan_core.dit.time import time_rows
from wan_core.presets import TransformerSpec

I2V = replace(SPEC, model_type="i2v", in_dim=36, image_dim=40, image_tokens=17)
FLF2V = replace(I2V, model_type="flf2v", image_tokens=14)
I2V_22 = replace(SPEC, model_type="i2v", in_dim=36)
TI2V = replace(SPEC, model_type="ti2v", in_dim=48, out_dim=48)
VACE = replace(SPEC, model_type="vace", vace_layers=(0, 2), vace_in_dim=96)
BRANCHES = {"i2v": I2V, "flf2v": FLF2V, "i2v-2.2": I2V_22, "ti2v": TI2V, "vace": VACE}
SMALL_HEADS = {"dim": 64, "ffn_dim": 96, "num_heads": 4}

every_branch = pytest.mark.parametrize("spec", BRANCHES.values(), ids=BRANCHES)


@dataclass(frozen=True)
class Given:
    """What one call is given before anything is embedded."""

    latents: torch.Tensor
    timestep: torch.Tensor
    context: torch.Tensor
    features: torch.Tensor | None
    controls: tuple[VaceControl, ...]


def given(spec: TransformerSpec, batch: int = 1, grid: tuple[int, int, int] = (3, 6, 8),
          strengths: tuple[float, ...] = (0.7,), tokens: int = 20) -> Given:
    """Random inputs of a branch: CLIP features, known frames (others for each sample), a control for each strength."""
    latents, timestep, context = inputs(spec, batch, grid, tokens)
    features, controls = None, ()
    if spec.image_dim:
        features = torch.randn(batch, spec.image_tokens, spec.image_dim)
    if spec.model_type == "ti2v":
        timestep = timestep[:, None].repeat(1, grid[0])
        for sample in range(batch):
            timestep[sample, sample % grid[0]:(sample + 1) % (grid[0] + 1)] = 0
    if spec.model_type == "vace":
        controls = tuple(VaceControl(torch.randn(batch, spec.vace_in_dim, *grid), strength) for strength in strengths)
    return Given(latents, timestep, context, features, controls)


def prepared(model: WanTransformer, given: Given) -> ModelInputs:
    image = None if given.features is None else model.prepare_image(given.features)
    return ModelInputs(given.latents, given.timestep, model.prepare_text(given.context), image, given.controls)


def in_diffusers(oracle: Oracle, given: Given) -> torch.Tensor:
    return oracle(given.latents, given.timestep, given.context, given.features, given.controls)


@torch.no_grad()
def assert_equals_diffusers(spec: TransformerSpec, given: Given) -> None:
    model = transformer(spec)
    theirs = in_diffusers(Oracle(model), given)
    torch.testing.assert_close(model(prepared(model, given)), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("batch", "grid", "change"), [
    (1, (3, 6, 8), {}), (2, (1, 4, 4), {"image_dim": 72}), (3, (2, 2, 10), {**SMALL_HEADS, "image_tokens": 257}),
])
def test_image_tokens_equal_diffusers(batch, grid, change):
    """Wan 2.1 I2V: one image's CLIP tokens beside the text, up to the released 257; max abs error 1e-4."""
    spec = replace(I2V, **change)
    assert_equals_diffusers(spec, given(spec, batch, grid))


@pytest.mark.parametrize(("batch", "grid", "change"), [
    (1, (3, 6, 8), {}), (2, (2, 2, 10), {**SMALL_HEADS, "image_tokens": 514}),
])
def test_two_images_equal_diffusers(batch, grid, change):
    """FLF2V: the tokens of both images with their positions; max abs error 1e-4."""
    spec = replace(FLF2V, **change)
    assert_equals_diffusers(spec, given(spec, batch, grid))


@pytest.mark.parametrize(("batch", "grid", "change"), [(2, (3, 6, 8), {}), (1, (4, 2, 10), SMALL_HEADS)])
def test_image_channels_without_tokens_equal_diffusers(batch, grid, change):
    """Wan 2.2 I2V: 36 channels in, 16 out, no CLIP tokens; max abs error 1e-4."""
    spec = replace(I2V_22, **change)
    assert_equals_diffusers(spec, given(spec, batch, grid))


@pytest.mark.parametrize(("grid", "timestep"), [
    ((3, 6, 8), [[0, 700, 700]]),
    ((3, 4, 4), [[0, 987, 987], [3.5, 3.5, 0], [500, 500, 500]]),
    ((6, 2, 4), [[700, 0, 20, 700, 20, 0]]),
    ((1, 4, 4), [[0], [31.25]]),
], ids=["first known", "masks differ", "any order", "one frame"])
def test_a_time_for_each_frame_equals_diffusers(grid, timestep):
    """TI2V: one timestep a latent frame gives what diffusers gives for one a token, whatever the order and the masks
    of the samples; max abs error 1e-4."""
    timestep = torch.tensor(timestep, dtype=torch.float32)
    assert_equals_diffusers(TI2V, replace(given(TI2V, len(timestep), grid), timestep=timestep))


@pytest.mark.parametrize(("batch", "grid", "change", "strengths"), [
    (1, (3, 6, 8), {}, (1.0,)),
    (2, (1, 4, 4), {"num_layers": 4, "vace_layers": (0, 1, 3)}, (0.6,)),
    (1, (3, 6, 8), {}, (1.3, 0.5)),
    (2, (2, 2, 10), {**SMALL_HEADS, "num_layers": 5, "vace_layers": (0, 2, 4)}, (-0.4, 0.9, 0.2)),
], ids=["one", "one weaker", "two", "three"])
def test_vace_equals_diffusers(batch, grid, change, strengths):
    """Hints of one control, and of several in a chain, each with its strength; max abs error 1e-4."""
    spec = replace(VACE, **change)
    assert_equals_diffusers(spec, given(spec, batch, grid, strengths))


@every_branch
def test_gradients_equal_diffusers(spec):
    """Training a branch computes what inference does, and every parameter gets the gradient that diffusers gives it."""
    # Among hundreds of equal padding rows the gradient of the text's keys is lost in round-off, in either code.
    model, asked = transformer(spec), given(spec, batch=2, grid=(3, 4, 4), tokens=512)
    with torch.no_grad():
        expected = model(prepared(model, asked))
    weights = torch.randn_like(expected)
    model.requires_grad_(True)
    velocity = model(prepared(model, asked))
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    (velocity * weights).sum().backward()
    oracle = Oracle(model)
    (in_diffusers(oracle, asked) * weights).sum().backward()
    theirs = dict(oracle.module.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = theirs[diffusers_name(name)].grad
        assert gradient.any(), name
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm(), name


@every_branch
def test_bf16_stays_near_fp32(spec):
    """Matrices in bf16, the float32 islands kept: within 2e-2 relative of fp32."""
    model, asked = transformer(spec), given(spec, batch=2)
    exact = model(prepared(model, asked))
    model = in_bfloat16(model)
    rounded = model(prepared(model, asked))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() <= 2e-2 * exact.norm()


@every_branch
def test_inputs_are_not_written_to(spec):
    """The in-place arithmetic of inference never reaches latents, timesteps, prepared tokens or controls."""
    model, asked = transformer(spec), given(spec, strengths=(0.7, 0.4))
    call = prepared(model, asked)
    tensors = [call.latents, call.timestep, call.text.tokens, call.text.bias, asked.context,
               *(part for part in (call.image, asked.features) if part is not None),
               *(control.latents for control in call.controls)]
    kept = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        first = model(call)
        assert torch.equal(model(call), first)
    assert all(map(torch.equal, kept, tensors))


def test_runs_of_frames_share_a_row():
    """Neighbouring frames at one timestep are one run, and a timestep that comes back later is the same row."""
    time = time_rows(torch.tensor([[5.0, 0, 5, 5, 7], [5, 0, 5, 5, 5]]), 5, 12)
    assert time.lengths == (12, 12, 24, 12)
    assert [row.tolist() for row in time.rows] == [[5, 5], [0, 0], [5, 5], [7, 5]]
    assert time.rows[0] is time.rows[2]
    computed = []
    mapped = time.map(lambda row: computed.append(row) or row + 1)
    assert len(computed) == 3 and mapped.lengths == time.lengths
    assert [row.tolist() for row in mapped.rows] == [[6, 6], [1, 1], [6, 6], [8, 6]]


@pytest.mark.parametrize("batch", [1, 2])
def test_time_is_embedded_once_for_each_timestep(batch):
    """Two timesteps, in three runs, are two rows a sample: nothing reaches batch * tokens * 6 * dim."""
    model, asked = transformer(TI2V), given(TI2V, batch, (4, 16, 32))
    asked = replace(asked, timestep=torch.tensor([[0.0, 700, 700, 0]]).expand(batch, -1))
    tokens, rows = 4 * 8 * 16, []
    model.time_projection.register_forward_hook(lambda module, args, output: rows.append(tuple(output.shape)))
    with torch.no_grad(), Sizes() as sizes:
        model(prepared(model, asked))
    assert rows == [(batch, 6 * TI2V.dim)] * 2
    assert batch * tokens * TI2V.dim <= sizes.largest < batch * tokens * 6 * TI2V.dim


def test_one_timestep_for_all_frames_is_no_special_case():
    """The same timestep for every frame gives bit for bit what one for the sample gives."""
    model, asked = transformer(TI2V), given(TI2V, batch=2)
    timestep = torch.tensor([987.0, 3.5])
    expected = model(prepared(model, replace(asked, timestep=timestep)))
    per_frame = replace(asked, timestep=timestep[:, None].expand(-1, 3))
    assert torch.equal(model(prepared(model, per_frame)), expected)


def test_without_image_tokens_only_the_text_is_seen():
    """An I2V model without CLIP tokens is bit for bit the model without the layers for them."""
    model, asked = transformer(I2V), given(I2V)
    bare = transformer(replace(I2V, image_dim=None, image_tokens=0))
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if "img" not in name})
    asked = replace(asked, features=None)
    assert torch.equal(model(prepared(model, asked)), bare(prepared(bare, asked)))


def test_one_of_two_images():
    """A start image alone takes the first positions of a FLF2V model: its tokens are those it has beside an end."""
    model, asked = transformer(FLF2V), given(FLF2V)
    torch.testing.assert_close(model.prepare_image(asked.features[:, :7]), model.prepare_image(asked.features)[:, :7],
                               atol=1e-6, rtol=0)


def test_vace_without_controls_is_the_text_to_video_model():
    """Without controls, and with controls of strength 0, the result is bit for bit the t2v model's, and the VACE
    blocks do not run."""
    model, asked = transformer(VACE), given(VACE, strengths=(0.0, 0.0))
    plain = transformer(SPEC, seed=1)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("vace_")})
    expected = plain(prepared(plain, replace(asked, controls=())))
    for block in model.vace_blocks:
        block.register_forward_hook(lambda *args: pytest.fail("a VACE block ran"))
    for controls in ((), asked.controls):
        assert torch.equal(model(prepared(model, replace(asked, controls=controls))), expected)


def test_a_control_of_strength_zero_leaves_the_others_alone():
    """In a chain the control without strength changes nothing, bit for bit."""
    model, asked = transformer(VACE), given(VACE, strengths=(0.0, 0.8))
    alone = replace(asked, controls=asked.controls[1:])
    assert torch.equal(model(prepared(model, asked)), model(prepared(model, alone)))


def test_one_hint_at_a_time():
    """Of all hints of two controls the one being added is the only one in memory, and they come in the order of their
    blocks."""
    model = transformer(replace(VACE, num_layers=4, vace_layers=(0, 1, 3)))
    asked, hints, alive, order = given(model.spec, strengths=(0.7, 0.4)), [], [], []

    def made(module, args, output):
        hints.append(weakref.ref(output))
        alive.append(sum(hint() is not None for hint in hints))

    for index, block in enumerate(model.vace_blocks):
        block.register_forward_hook(lambda *args, index=index: order.append(f"vace {index}"))
        block.after_proj.register_forward_hook(made)
    with torch.no_grad():
        model(prepared(model, asked), on_block=order.append)
    assert alive == [1] * 6
    assert order == [0, *["vace 0"] * 2, 1, *["vace 1"] * 2, 2, 3, *["vace 2"] * 2]


REFUSED = {
    "control for t2v": (SPEC, {"controls": (VaceControl(torch.zeros(1, 96, 3, 4, 4)),)}, "type t2v has no VACE blocks"),
    "control for i2v": (I2V, {"controls": (VaceControl(torch.zeros(1, 96, 3, 4, 4)),)}, "type i2v has no VACE blocks"),
    "control of another size": (VACE, {"controls": (VaceControl(torch.zeros(1, 96, 3, 4, 6)),)},
                                r"\[1, 96, 3, 4, 6\]; expected \[batch, 96, 3, 4, 4\]"),
    "control of another length": (VACE, {"controls": (VaceControl(torch.zeros(1, 96, 4, 4, 4), 0.0),)},
                                  r"\[1, 96, 4, 4, 4\]; expected \[batch, 96, 3, 4, 4\]"),
    "control of other channels": (VACE, {"controls": (VaceControl(torch.zeros(1, 16, 3, 4, 4)),)},
                                  r"\[1, 16, 3, 4, 4\]; expected \[batch, 96"),
    "control of another batch": (VACE, {"controls": (VaceControl(torch.zeros(2, 96, 3, 4, 4)),)},
                                 "VACE control: a batch of 2, and the latents are a batch of 1"),
    "second control": (VACE, {"controls": (VaceControl(torch.zeros(1, 96, 3, 4, 4)),
                                           VaceControl(torch.zeros(1, 96, 1, 4, 4)))}, r"\[1, 96, 1, 4, 4\]"),
    "image of another batch": (I2V, {"image": torch.zeros(2, 17, 256)}, "image: a batch of 2"),
    "image for t2v": (SPEC, {"image": torch.zeros(1, 17, 256)}, "no layers for them"),
    "image for Wan 2.2 I2V": (I2V_22, {"image": torch.zeros(1, 17, 256)}, "no layers for them"),
    "timesteps of another batch": (TI2V, {"timestep": torch.zeros(2, 3)}, "timesteps: a batch of 2"),
    "timesteps of another length": (TI2V, {"timestep": torch.zeros(1, 4)}, r"\[1, 4\]; expected .*\[batch, 3\]"),
    "a timestep a token": (TI2V, {"timestep": torch.zeros(1, 12)}, r"\[1, 12\]; expected .*\[batch, 3\]"),
    "a timestep without batch": (TI2V, {"timestep": torch.tensor(500.0)}, r"shape \[\]; expected \[batch\]"),
    "timesteps with three axes": (TI2V, {"timestep": torch.zeros(1, 3, 1)}, r"\[1, 3, 1\]; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    """What the model does not have, or what belongs to another video, is named before anything is computed."""
    spec, change, message = REFUSED[case]
    model, asked = transformer(spec), given(spec, grid=(3, 4, 4))
    call = replace(prepared(model, asked), **change)
    with Sizes() as sizes, pytest.raises(ValueError, match=message):
        model(call)
    assert sizes.largest < call.latents.numel()


@pytest.mark.parametrize(("spec", "shape", "message"), [
    (SPEC, (1, 17, 40), "this model takes none"),
    (I2V_22, (1, 17, 40), "this model takes none"),
    (I2V, (1, 17, 41), r"\[1, 17, 41\]; this model takes \[batch, tokens, 40\]"),
    (I2V, (17, 40), r"\[17, 40\]; this model takes"),
    (FLF2V, (1, 15, 40), "15 CLIP vision tokens were given; the model has positions for 14"),
])
def test_image_features_that_do_not_fit_are_refused(spec, shape, message):
    """Features for a model without image tokens, of another width, or more of them than positions, are errors."""
    with pytest.raises(ValueError, match=message):
        transformer(spec).prepare_image(torch.zeros(shape))
