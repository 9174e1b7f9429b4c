"""Block filters: what each line of text lets through, and that nonsense is refused."""
import pytest

from wan_core.weights.lora import Target, parse_filter

TARGETS = [Target(f"blocks.{n}.{layer}", "weight") for n in range(40)
           for layer in ("self_attn.q", "self_attn.norm_q", "cross_attn.k", "ffn.0", "norm3")]
TARGETS += [Target("blocks.3", "modulation"), Target("head.head", "weight"), Target("head", "modulation"),
            Target("patch_embedding", "weight"), Target("time_projection.1", "bias"),
            Target("vace_blocks.2.self_attn.q", "weight"), Target("img_emb.proj.1", "weight")]
BLOCK = {target: int(target.module.split(".")[1]) for target in TARGETS if target.module.startswith("blocks.")}


def passed(text):
    keep = parse_filter(text)
    return {target for target in TARGETS if keep(target)}


def blocks(numbers):
    return {target for target, number in BLOCK.items() if number in numbers}


def kind(part):
    return {target for target in TARGETS if part in target.name}


@pytest.mark.parametrize("text, expected", [
    ("", set(TARGETS)),
    ("  ", set(TARGETS)),
    ("0-9,15", blocks([*range(10), 15])),
    (" 7 ", blocks([7])),
    ("3 - 5", blocks([3, 4, 5])),
    ("!30-39", set(TARGETS) - blocks(range(30, 40))),
    ("! 0", set(TARGETS) - blocks([0])),
    ("0-9,!5", blocks(range(10)) - blocks([5])),
    ("self_attn", kind(".self_attn.")),
    ("self_attn,ffn", kind(".self_attn.") | kind(".ffn.")),
    ("!ffn", set(TARGETS) - kind(".ffn.")),
    ("0-1,self_attn", blocks([0, 1]) & kind(".self_attn.")),
    ("0-19,!ffn", blocks(range(20)) - kind(".ffn.")),
    ("vace", kind("vace_")),
    ("self_attn,!vace", kind(".self_attn.") - kind("vace_")),
    ("norm", kind(".norm")),
    ("modulation", {Target("blocks.3", "modulation"), Target("head", "modulation")}),
    ("embedding", {Target("patch_embedding", "weight"), Target("time_projection.1", "bias"),
                   Target("img_emb.proj.1", "weight")}),
    ("head", {Target("head.head", "weight"), Target("head", "modulation")}),
    ("!self_attn,!cross_attn,!ffn,!norm", {t for t in TARGETS if not any(
        part in t.name for part in (".self_attn.", ".cross_attn.", ".ffn.", ".norm"))}),
])
def test_what_passes(text, expected):
    """Blocks and kinds narrow each other, exclusions come last, numbers mean the main blocks only."""
    assert passed(text) == expected and expected


@pytest.mark.parametrize("text", ["x", "0-", "-3", "0,,1", ",", "5-2", "1.5", "!", "!!3", "self-attn", "0-99999", "٣",
                                  "0 1", "blocks.3"])
def test_nonsense_is_refused(text):
    """Anything else is a ValueError that repeats the text and says what there is."""
    with pytest.raises(ValueError, match="block filter") as error:
        parse_filter(text)
    assert repr(text) in str(error.value)
