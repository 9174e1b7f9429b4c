"""The transformer against the official code and diffusers, in other precisions, and against itself."""

import pytest
import torch

from tests.dit.oracle import SPEC, Oracle, Sizes, in_bfloat16, inputs, transformer
from tests.golden_cases import load_case
from wan_core.dit import ModelInputs, TextTokens, VaceControl, VaceTransformer, WanTransformer
from wan_core.presets import TRANSFORMERS, TransformerSpec


def golden_model(case) -> WanTransformer:
    names = ("model_type", "dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_heads", "num_layers", "in_dim",
             "out_dim", "eps", "vace_in_dim")
    positions = case.weights.get("img_emb.emb_pos")
    spec = TransformerSpec(
        patch_size=tuple(case.config.get("patch_size", (1, 2, 2))),
        vace_layers=tuple(case.config.get("vace_layers", ())),
        image_dim=case.config["image_dim"] if "img_emb.proj.1.weight" in case.weights else None,
        image_tokens=0 if positions is None else positions.shape[1],
        **{name: case.config[name] for name in names if name in case.config})
    model = (VaceTransformer if spec.model_type == "vace" else WanTransformer)(spec).requires_grad_(False)
    model.load_state_dict(case.weights)
    return model


def golden_inputs(case, model: WanTransformer) -> ModelInputs:
    """The official arguments as ours: channels behind the latents, CLIP features embedded, one time for each frame."""
    given = case.inputs
    latents = torch.cat([given["x"], given["y"]], 1) if "y" in given else given["x"]
    timestep = given["t"]
    if timestep.ndim == 2:  # one for each token
        per_frame = timestep.unflatten(1, (latents.shape[2], -1))
        assert (per_frame == per_frame[:, :, :1]).all()
        timestep = per_frame[:, :, 0]
    text, image, controls = model.prepare_text(golden_context(case)), None, ()
    if "clip_fea" in given:
        image = model.prepare_image(given["clip_fea"].reshape(len(latents), -1, case.config["image_dim"]))
        # The official code joins image and text and takes the last 512 tokens for text. That is the text with the
        # released models' 512 rows; a case with fewer has some image tokens among them.
        joined = torch.cat([image, model.text_embedding(golden_context(case))], 1)
        count = joined.shape[1] - 512
        image, text = joined[:, :count], TextTokens(joined[:, count:], None)
    if "vace_context" in given:
        controls = (VaceControl(given["vace_context"], case.config["vace_context_scale"]),)
    return ModelInputs(latents, timestep, text, image, controls)


def golden_context(case) -> torch.Tensor:
    """The samples' embeddings, zero-padded to text_len."""
    context = torch.zeros(len(case.inputs["x"]), case.config["text_len"], case.config["text_dim"])
    for index in range(len(context)):
        rows = case.inputs[f"context_{index}"]
        context[index, :len(rows)] = rows
    return context


GOLDEN = ["dit_wan21_t2v", "dit_wan22_t2v", "dit_wan21_i2v", "dit_wan21_flf2v", "dit_wan22_i2v", "dit_wan22_ti2v",
          "dit_wan21_vace"]


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_official_transformer(name):
    """Golden cases: max abs error at most 1e-4 in fp32."""
    case = load_case(name)
    model = golden_model(case)
    velocity = model(golden_inputs(case, model))
    torch.testing.assert_close(velocity, case.outputs["velocity"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_bf16_stays_near_the_official_fp32(name):
    """Golden cases, whose weights are exact in bf16: within 2e-2 relative of fp32, and the result is fp32."""
    case = load_case(name)
    model = in_bfloat16(golden_model(case))
    velocity = model(golden_inputs(case, model))
    expected = case.outputs["velocity"]
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() <= 2e-2 * expected.norm()


def test_bf16_stays_near_fp32_with_many_tokens():
    """A model with heads of 128 and a text of 512 rows: bf16 within 2e-2 relative of fp32."""
    latents, timestep, context = inputs(grid=(5, 12, 12))
    model = transformer()
    exact = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    model = in_bfloat16(model)
    rounded = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    assert (rounded - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize(("batch", "grid", "change"), [
    (2, (3, 6, 8), {}), (1, (1, 4, 4), {}), (2, (4, 2, 10), {"dim": 64, "num_heads": 2, "in_dim": 12, "out_dim": 20}),
])
def test_equals_diffusers(batch, grid, change):
    """Other shapes, heads of 128 and 32 channels, samples with different timesteps: max abs error 1e-4 in fp32."""
    spec = TransformerSpec(**{**vars(SPEC), **change})
    model = transformer(spec)
    latents, timestep, context = inputs(spec, batch, grid)
    with torch.no_grad():
        theirs = Oracle(model)(latents, timestep, context)
        ours = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", [0, 20, 510, 511, 512])
def test_folded_padding_equals_512_rows(tokens):
    """One row with a logit bias of log(n) gives what n padding rows give, for texts of any length up to the whole."""
    model = transformer()
    latents, timestep, context = inputs(tokens=tokens)
    rows = torch.nn.functional.pad(context, (0, 0, 0, 512 - tokens))
    unfolded = TextTokens(model.text_embedding(rows), None)
    assert unfolded.tokens.shape[1] == 512
    folded = model.prepare_text(context)
    assert folded.tokens.shape[1] == min(tokens + 1, 512)
    expected = model(ModelInputs(latents, timestep, unfolded))
    for text in (folded, model.prepare_text(rows)):
        torch.testing.assert_close(model(ModelInputs(latents, timestep, text)), expected, atol=1e-5, rtol=0)


def test_folded_padding_of_two_lengths():
    """In a batch of a short and a long text the short one's zero rows count as they do in 512 rows."""
    model = transformer()
    latents, timestep, context = inputs(batch=2)
    context[0, 6:] = 0
    rows = torch.nn.functional.pad(context, (0, 0, 0, 512 - context.shape[1]))
    expected = model(ModelInputs(latents, timestep, TextTokens(model.text_embedding(rows), None)))
    velocity = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


def test_samples_of_a_batch_do_not_touch_each_other():
    """Each sample of a batch with its own timestep and text equals a run of its own (which takes the fused norms)."""
    model = transformer()
    latents, timestep, context = inputs(batch=3)
    together = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    for i in range(3):
        alone = model(ModelInputs(latents[i:i + 1], timestep[i:i + 1], model.prepare_text(context[i:i + 1])))
        torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=0)


def test_training_and_inference_compute_the_same():
    """With gradients recorded nothing is done in place, and the velocity is the same; every parameter gets one."""
    model = transformer()
    latents, timestep, context = inputs()
    with torch.no_grad():
        expected = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    model.requires_grad_(True)
    velocity = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    velocity.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_inputs_are_not_written_to():
    """The in-place arithmetic of inference never reaches the caller's tensors or the prepared text."""
    model = transformer()
    latents, timestep, context = inputs()
    text = model.prepare_text(context)
    kept = [tensor.clone() for tensor in (latents, timestep, context, text.tokens, text.bias)]
    with torch.no_grad():
        first = model(ModelInputs(latents, timestep, text))
        assert torch.equal(model(ModelInputs(latents, timestep, text)), first)
    assert all(map(torch.equal, kept, (latents, timestep, context, text.tokens, text.bias)))


@pytest.mark.parametrize("batch", [1, 2])
def test_time_modulation_is_broadcast(batch):
    """Six modulation rows are held per sample and never per token: no tensor reaches batch * tokens * 6 * dim."""
    model = transformer()
    latents, timestep, context = inputs(batch=batch, grid=(2, 32, 32))
    tokens = 2 * 16 * 16
    with torch.no_grad(), Sizes() as sizes:
        model(ModelInputs(latents, timestep, model.prepare_text(context)))
    assert batch * tokens * SPEC.dim <= sizes.largest < batch * tokens * 6 * SPEC.dim


def test_on_block_sees_every_block_and_can_stop():
    """on_block comes before each block in order; what it raises ends the run at once."""
    model = transformer()
    latents, timestep, context = inputs()
    text, seen = model.prepare_text(context), []
    model(ModelInputs(latents, timestep, text), on_block=seen.append)
    assert seen == [0, 1, 2]

    def stop(index):
        seen.append(index)
        if index == 1:
            raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        model(ModelInputs(latents, timestep, text), on_block=stop)
    assert seen == [0, 1]


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 15, 3, 4, 4), r"\[1, 15, 3, 4, 4\]; this model takes \[batch, 16"),
    ((16, 3, 4, 4), r"\[16, 3, 4, 4\]"),
    ((1, 16, 3, 5, 4), "4x5; width and height must be even"),
    ((1, 16, 3, 4, 7), "7x4; width and height must be even"),
    ((1, 16, 0, 4, 4), "0x2x2 tokens"),
    ((1, 16, 1, 4, 0), "1x2x0 tokens"),
    ((1, 16, 1025, 2, 2), "1025x1x1 tokens.*1 to 1024"),
])
def test_latents_that_do_not_fit_are_refused(shape, message):
    """Channels, dimensions and sizes off the grid or beyond the known positions are named before any block runs."""
    model = transformer()
    text = model.prepare_text(inputs()[2])
    with pytest.raises(ValueError, match=message):
        model(ModelInputs(torch.zeros(shape), torch.tensor([500.0]), text),
              on_block=lambda index: pytest.fail("a block ran"))


@pytest.mark.parametrize("shape", [(1, 20, 47), (20, 48), (1, 1, 20, 48)])
def test_text_that_does_not_fit_is_refused(shape):
    """An embedding of another width or without a batch is an error that names the expected width."""
    with pytest.raises(ValueError, match=r"takes \[batch, tokens, 48\]"):
        transformer().prepare_text(torch.zeros(shape))


def test_unknown_backend_is_refused_before_any_block():
    """A wrong backend name is a ValueError that lists the known ones."""
    model = transformer()
    latents, timestep, context = inputs()
    with pytest.raises(ValueError, match="'flesh'; choose one of sdpa"):
        model(ModelInputs(latents, timestep, model.prepare_text(context)), backend="flesh",
              on_block=lambda index: pytest.fail("a block ran"))


def test_other_branches_are_refused():
    """A transformer that this version cannot run is an error and not a wrong video."""
    with pytest.raises(ValueError, match="'s2v' is not supported"):
        WanTransformer(TRANSFORMERS["wan22_s2v_14b"])


def test_training_starts_at_zero_velocity():
    """After init_weights the head predicts zero for any input, and gradients reach it."""
    model = transformer()
    model.init_weights()
    latents, timestep, context = inputs()
    model.head.requires_grad_(True)
    velocity = model(ModelInputs(latents, timestep, model.prepare_text(context)))
    assert not velocity.any()
    (velocity - 1).square().mean().backward()
    assert model.head.head.weight.grad.any()
