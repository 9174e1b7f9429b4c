"""The transformer against the official code and diffusers, in other precisions, and against itself."""

import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden_cases import load_case
from wan_core.dit import ModelInputs, TextTokens, VaceControl, VaceTransformer, WanTransformer
from wan_core.presets import TRANSFORMERS, TransformerSpec

SPEC = TransformerSpec(model_type="t2v", dim=256, ffn_dim=384, num_heads=2, num_layers=3, text_dim=48)

# Official part of a block -> diffusers' name; the rest of a parameter's name is kept.
DIFFUSERS_BLOCK = {
    "self_attn.o": "attn1.to_out.0", "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.o": "attn2.to_out.0", "cross_attn.norm_q": "attn2.norm_q", "cross_attn.norm_k": "attn2.norm_k",
    **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
    **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table",
}
DIFFUSERS_ROOT = {
    "patch_embedding": "patch_embedding", "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}


def diffusers_name(name: str) -> str:
    """Our (the official) parameter name in diffusers' WanTransformer3DModel."""
    leaf = re.search(r"\.(weight|bias)$", name)
    stem, leaf = name.removesuffix(leaf[0] if leaf else ""), leaf[0] if leaf else ""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
        return f"blocks.{match[1]}.{DIFFUSERS_BLOCK[match[2]]}{leaf}"
    return DIFFUSERS_ROOT[stem] + leaf


def transformer(spec: TransformerSpec = SPEC, seed: int = 0) -> WanTransformer:
    """Random weights; norms and biases too, so that none of them can be mixed up unnoticed."""
    torch.manual_seed(seed)
    model = WanTransformer(spec).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(spec: TransformerSpec = SPEC, batch: int = 1, grid: tuple[int, int, int] = (3, 6, 8), tokens: int = 20):
    """Latents, timesteps and a text embedding of `tokens` rows."""
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, spec.in_dim, *grid, generator=generator),
            torch.linspace(987, 3.5, batch),
            torch.randn(batch, tokens, spec.text_dim, generator=generator))


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


def in_bfloat16(model: WanTransformer) -> WanTransformer:
    """The matrices that the official code runs in bf16; the float32 islands stay."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("time_", "head.", "norm", "modulation")):
            parameter.data = parameter.data.bfloat16()
    return model


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
    oracle = WanTransformer3DModel(
        num_attention_heads=spec.num_heads, attention_head_dim=spec.dim // spec.num_heads, in_channels=spec.in_dim,
        out_channels=spec.out_dim, text_dim=spec.text_dim, freq_dim=spec.freq_dim, ffn_dim=spec.ffn_dim,
        num_layers=spec.num_layers).eval()
    oracle.load_state_dict({diffusers_name(name): value for name, value in model.state_dict().items()})
    latents, timestep, context = inputs(spec, batch, grid)
    padded = torch.nn.functional.pad(context, (0, 0, 0, spec.text_len - context.shape[1]))
    with torch.no_grad():
        theirs = oracle(latents, timestep, padded, return_dict=False)[0]
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


class Sizes(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


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
