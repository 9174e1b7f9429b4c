"""Normalised attention guidance, and blocks that are left out: the published rule, inside the transformer."""

from dataclasses import replace

import pytest
import torch

from tests.dit.test_chunks import SPECS, inputs_for, model_of, randn
from wan_core.dit import NegativeText, NormalisedAttention

NAG = NormalisedAttention(5.0, 2.5, 0.25)


def guided(inputs, text, how=NAG):
    return replace(inputs, text=replace(inputs.text, away=NegativeText(text, how)))


def published(positive, negative, scale, tau, alpha):
    """The rule token by token, as it is written down."""
    out = torch.empty_like(positive)
    for place in torch.cartesian_prod(torch.arange(positive.shape[0]), torch.arange(positive.shape[1])).tolist():
        p, n = positive[tuple(place)].double(), negative[tuple(place)].double()
        g = scale * p - (scale - 1) * n
        ratio = g.abs().sum() / p.abs().sum()
        if ratio > tau:
            g = g * tau / ratio
        out[tuple(place)] = alpha * g + (1 - alpha) * p
    return out


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(5.0, 2.5, 0.25), (11.0, 3.5, 0.5), (1.5, 100.0, 1.0)])
def test_the_published_rule(scale, tau, alpha):
    """Promise: extrapolated, held to tau times its size and mixed, for each token over all heads, in float32."""
    positive, negative = randn(2, 7, 24), randn(2, 7, 24, seed=1)
    how = NormalisedAttention(scale, tau, alpha)
    torch.testing.assert_close(how.guided(positive, negative), published(positive, negative, scale, tau, alpha),
                               atol=1e-5, rtol=1e-5)
    half = how.guided(positive.bfloat16(), negative.bfloat16())
    expected = how.guided(positive.bfloat16().float(), negative.bfloat16().float())
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.bfloat16())


def test_a_token_without_attention_stays_finite():
    """Promise: zeros in either branch give no NaN."""
    zero, other = torch.zeros(1, 1, 8), randn(1, 1, 8)
    for pair in ((zero, zero), (zero, other), (other, zero)):
        assert NAG.guided(*pair).isfinite().all()


@pytest.mark.parametrize("kind", ["t2v", "clip", "vace"])
@torch.no_grad()
def test_in_the_transformer(kind):
    """Promise: a negative prompt equal to the prompt changes nothing but rounding, another one does, more so the
    higher the scale; and no text's guidance is left behind."""
    model = model_of(kind)
    inputs = inputs_for(model, kind)
    plain, other = model(inputs), model.prepare_text(randn(1, 9, 96, seed=7))
    torch.testing.assert_close(model(guided(inputs, inputs.text)), plain, atol=1e-5, rtol=1e-5)
    little, much = (model(guided(inputs, other, NormalisedAttention(scale, 10.0, 0.25))) for scale in (1.01, 3.0))
    assert 0 < (little - plain).abs().max() < 0.1 * (much - plain).abs().max()
    assert torch.equal(model(inputs), plain)


@torch.no_grad()
def test_the_picture_is_left_alone():
    """Promise: with CLIP features, text attention is guided and the picture's attention is added to it as it was."""
    model = model_of("clip")
    attention, inputs = model.blocks[0].cross_attn, inputs_for(model, "clip")
    q = attention.query(randn(1, 5, 128))
    negative = model.prepare_text(randn(1, 9, 96, seed=7))
    sources = attention.prepare(guided(inputs, negative).text, inputs.image)
    text, picture = attention.prepare(inputs.text, inputs.image)
    away, _ = attention.prepare(negative, inputs.image)
    alone = [attention.attend(q, (source,), "sdpa") for source in (text, away, picture)]
    torch.testing.assert_close(attention.attend(q, sources, "sdpa"), NAG.guided(*alone[:2]) + alone[2])


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_chunks_change_nothing(kind):
    """Promise: in chunks, guided attention and a step without a block are what they are as a whole, within 1e-6."""
    model = model_of(kind)
    inputs = guided(inputs_for(model, kind, 2), model.prepare_text(randn(2, 9, 96, seed=7)))
    for without in ((), (0,)):
        whole = model(inputs, without=without)
        assert (model(inputs, chunk=7, without=without) - whole).abs().max() <= 1e-6 * max(1, whole.abs().max().item())


@torch.no_grad()
def test_blocks_left_out():
    """Promise: without some blocks the model is the one that never had them; without none, the model bit for bit; what
    runs beside them still does."""
    model, shorter = model_of("t2v"), model_of("t2v")
    inputs = inputs_for(model, "t2v")
    del shorter.blocks[1:3]
    assert torch.equal(model(inputs, without=(1, 2)), shorter(inputs))
    assert torch.equal(model(inputs, without=()), model(inputs))
    assert not torch.equal(model(inputs, without=(1,)), model(inputs))
    vace = model_of("vace")
    inputs = inputs_for(vace, "vace")
    alone = replace(inputs, controls=())
    assert not torch.equal(vace(inputs, without=range(4)), vace(alone, without=range(4)))


@pytest.mark.parametrize(("values", "said"), [
    ((1.0,), "above 1"), ((float("nan"),), "above 1"), ((5.0, 0.0), "tau"), ((5.0, 2.5, 1.5), "alpha")])
def test_numbers_out_of_range_are_refused(values, said):
    """Promise: a scale that is off, a limit of nothing and a share above one are errors."""
    with pytest.raises(ValueError, match=said):
        NormalisedAttention(*values)


def test_a_negative_text_of_another_batch_is_refused():
    """Promise: one negative text for two prompts is an error, not a broadcast."""
    model = model_of("t2v")
    with pytest.raises(ValueError, match="negative text: a batch of 1"):
        model(guided(inputs_for(model, "t2v", 2), model.prepare_text(randn(1, 9, 96))))
