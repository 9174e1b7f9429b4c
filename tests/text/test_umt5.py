"""UMT5 encoder against the official code, transformers, and itself in other precisions."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from tests.golden_cases import golden_dir, load_case
from wan_core.presets import TEXT_ENCODERS, TextEncoderSpec
from wan_core.text.umt5 import UMT5Encoder, relative_buckets

SMALL = TextEncoderSpec(vocab_size=96, dim=48, dim_attn=64, dim_ffn=56, num_heads=4, num_layers=3)


def padded_batch(spec, lengths, generator):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, spec.vocab_size, (length,), generator=generator)
        mask[row, :length] = 1
    return ids, mask


def transformers_name(name):
    """Our (the official) parameter name in transformers' UMT5EncoderModel."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        inner = {"norm1": "0.layer_norm", "norm2": "1.layer_norm", "ffn.gate.0": "1.DenseReluDense.wi_0",
                 "ffn.fc1": "1.DenseReluDense.wi_1", "ffn.fc2": "1.DenseReluDense.wo",
                 "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
                 **{f"attn.{part}": f"0.SelfAttention.{part}" for part in "qkvo"}}[match[2].removesuffix(".weight")]
        return f"encoder.block.{match[1]}.layer.{inner}.weight"
    return {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}[name]


def test_equals_the_official_encoder():
    """Golden case: max abs error at most 1e-4 in fp32 on the rows inside the mask (the others are zeroed there)."""
    case = load_case("umt5")
    config = case.config
    encoder = UMT5Encoder(TextEncoderSpec(
        vocab_size=config["vocab"], num_buckets=config["num_buckets"], shared_pos=config["shared_pos"],
        **{key: config[key] for key in ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers")}))
    encoder.load_state_dict(case.weights)
    mask = case.inputs["mask"]
    with torch.no_grad():
        embeddings = encoder(case.inputs["ids"], mask) * mask[..., None]
    torch.testing.assert_close(embeddings, case.outputs["embeds"], atol=1e-4, rtol=0)


def test_names_and_shapes_are_the_released_ones():
    """The UMT5-XXL preset on the meta device has exactly the released encoder's tensors."""
    with torch.device("meta"):
        encoder = UMT5Encoder(TEXT_ENCODERS["umt5_xxl"])
    released = json.loads((golden_dir() / "keys" / "umt5_xxl_encoder.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()} == released


def test_equals_transformers_on_another_shape():
    """Same weights, attention width unlike the model's, other buckets, lengths beyond max_distance: same output."""
    spec = replace(SMALL, num_buckets=12, max_distance=40)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    encoder = UMT5Encoder(spec)
    for name, tensor in encoder.named_parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator) * ("norm" in name or "pos" in name)
    oracle = UMT5EncoderModel(UMT5Config(
        vocab_size=spec.vocab_size, d_model=spec.dim, d_kv=spec.dim_attn // spec.num_heads, d_ff=spec.dim_ffn,
        num_layers=spec.num_layers, num_heads=spec.num_heads, relative_attention_num_buckets=spec.num_buckets,
        relative_attention_max_distance=spec.max_distance, feed_forward_proj="gated-gelu")).eval()
    missing = oracle.load_state_dict({transformers_name(name): tensor for name, tensor in encoder.state_dict().items()},
                                     strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"encoder.embed_tokens.weight"}
    ids, mask = padded_batch(spec, (70, 9), generator)
    with torch.no_grad():
        ours = encoder(ids, mask) * mask[..., None]
        theirs = oracle(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_close_to_fp32(dtype):
    """Weights stored in 16 bits change the embeddings by less than 2e-2 relative."""
    torch.manual_seed(2)
    encoder = UMT5Encoder(SMALL)
    ids, mask = padded_batch(SMALL, (40, 17), torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = encoder(ids, mask) * mask[..., None]
        half = encoder.to(dtype)(ids, mask) * mask[..., None]
    error = (half - full).norm() / full.norm()
    assert half.dtype == torch.float32 and 0 < error < 2e-2


def test_float16_weights_do_not_overflow():
    """Residuals beyond float16's 65504, usual in T5, give the float32 result and no infinities."""
    torch.manual_seed(3)
    encoder = UMT5Encoder(SMALL)
    with torch.no_grad():
        for block in encoder.blocks:
            block.ffn.gate[0].weight *= 100
            block.ffn.fc1.weight *= 100
            block.ffn.fc2.weight *= 100
        ids, mask = padded_batch(SMALL, (12,), torch.Generator().manual_seed(3))
        largest = []
        hook = encoder.blocks[0].register_forward_hook(lambda module, args, out: largest.append(out.abs().max()))
        full = encoder(ids, mask)
        hook.remove()
        half = encoder.half()(ids, mask)
    assert largest[0] > 65504
    assert (half - full).norm() / full.norm() < 2e-2


def test_padding_is_invisible_to_real_tokens():
    """Ids behind the mask change no row inside it."""
    torch.manual_seed(4)
    encoder = UMT5Encoder(SMALL)
    ids, mask = padded_batch(SMALL, (20, 6), torch.Generator().manual_seed(4))
    other = torch.where(mask.bool(), ids, 50)
    with torch.no_grad():
        assert torch.equal(encoder(ids, mask) * mask[..., None], encoder(other, mask) * mask[..., None])


def test_shared_position_bias_equals_equal_biases():
    """shared_pos=True with one table gives what per-layer tables of the same values give."""
    torch.manual_seed(5)
    shared = UMT5Encoder(replace(SMALL, shared_pos=True))
    separate = UMT5Encoder(SMALL)
    state = shared.state_dict()
    table = state.pop("pos_embedding.embedding.weight")
    separate.load_state_dict(state | {f"blocks.{i}.pos_embedding.embedding.weight": table for i in range(3)})
    ids, mask = padded_batch(SMALL, (15, 4), torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(shared(ids, mask), separate(ids, mask))


def test_every_parameter_is_trained():
    """A loss on the output reaches each parameter with a finite, non-zero gradient."""
    torch.manual_seed(6)
    encoder = UMT5Encoder(SMALL)
    ids, mask = padded_batch(SMALL, (15, 4), torch.Generator().manual_seed(6))
    encoder(ids, mask).square().mul(torch.randn(SMALL.dim)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_initial_scale_is_kept():
    """Fresh weights give outputs of about unit scale, through any number of layers."""
    torch.manual_seed(7)
    encoder = UMT5Encoder(replace(SMALL, num_layers=8))
    ids, mask = padded_batch(SMALL, (30,), torch.Generator().manual_seed(7))
    assert 0.5 < encoder(ids, mask).std() < 2.0


def test_buckets_follow_the_rule():
    """32 buckets, distance 128: exact below 8, last bucket from 128 on, keys after the query 16 higher."""
    buckets = relative_buckets(200, 32, 128).tolist()
    at = {distance: buckets[distance + 199] for distance in (-199, -128, -64, -16, -8, -7, -1, 0, 1, 7, 8, 128, 199)}
    assert at == {-199: 15, -128: 15, -64: 14, -16: 10, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 7: 23, 8: 24, 128: 31,
                  199: 31}


def test_on_block_can_interrupt():
    """on_block is called with 0, 1, ... before each block and its exception leaves the encoder."""
    encoder = UMT5Encoder(SMALL)
    ids, mask = padded_batch(SMALL, (5,), torch.Generator().manual_seed(8))
    seen = []
    encoder(ids, mask, on_block=seen.append)
    assert seen == [0, 1, 2]

    def stop(i):
        if i == 1:
            raise InterruptedError
    with pytest.raises(InterruptedError):
        encoder(ids, mask, on_block=stop)


@pytest.mark.parametrize(("ids", "mask", "message"), [
    (torch.zeros(2, 5), torch.ones(2, 5), "int64"),
    (torch.zeros(5, dtype=torch.int64), torch.ones(5), r"\[batch, length\]"),
    (torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, 0), "non-empty"),
    (torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 4), "mask"),
    (torch.full((1, 5), 96), torch.ones(1, 5), "tokenizer"),
    (torch.full((1, 5), -1), torch.ones(1, 5), "tokenizer"),
])
def test_bad_input_is_refused(ids, mask, message):
    """Wrong dtype, shape or range is a ValueError that names it."""
    with pytest.raises(ValueError, match=message):
        UMT5Encoder(SMALL)(ids, mask)


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"num_buckets": 2}, {"num_buckets": 31}, {"max_distance": 8}])
def test_impossible_spec_is_refused(change):
    """A spec that no encoder can have is a ValueError."""
    with pytest.raises(ValueError, match="UMT5"):
        UMT5Encoder(replace(SMALL, **change))
