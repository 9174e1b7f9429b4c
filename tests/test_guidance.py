"""Options of guidance as values: what is refused, how lists are read, what a file remembers of them."""

import json
from dataclasses import replace

import pytest

from tests.small_models import write_transformer
from wan_core import load_model
from wan_core.guidance import (
    GuidanceOptions,
    NormalisedAttention,
    Projection,
    SigmaRange,
    SkippedBlocks,
    parse_blocks,
    parse_scales,
)


@pytest.mark.parametrize(("text", "scales"), [
    ("", ()), ("5", (5.0,)), ("6, 5,4.5", (6.0, 5.0, 4.5)), ("6 * 3; 1", (6.0, 6.0, 6.0, 1.0)), ("6\n5", (6.0, 5.0))])
def test_lists_of_scales(text, scales):
    """Promise: commas, semicolons, blanks and lines part scales; a star repeats one."""
    assert parse_scales(text) == scales


@pytest.mark.parametrize(("text", "blocks"), [("9", (9,)), ("10, 9", (9, 10)), ("0-2 1,7", (0, 1, 2, 7))])
def test_lists_of_blocks(text, blocks):
    """Promise: indices and ranges, in any order, each block once."""
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize(("parse", "text"), [
    (parse_scales, "five"), (parse_scales, "5*x"), (parse_scales, "--5"), (parse_blocks, ""), (parse_blocks, "-1"),
    (parse_blocks, "3-1"), (parse_blocks, "1.5"), (parse_blocks, "0-99999999999")])
def test_lists_that_are_none_are_refused(parse, text):
    """Promise: what cannot be read is an error that says how to write it."""
    with pytest.raises(ValueError, match="Write"):
        parse(text)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Projection(eta=float("nan")), "eta"), (lambda: Projection(momentum=1.0), "momentum"),
    (lambda: Projection(threshold=-1.0), "threshold"), (lambda: SkippedBlocks(()), "at least one"),
    (lambda: SkippedBlocks((-1,)), "at least one"), (lambda: SkippedBlocks((1,), -1.0), "skip-layer"),
    (lambda: GuidanceOptions(scales=(5.0, -1.0)), "-1.0"), (lambda: GuidanceOptions(zero_steps=-1), "-1 first steps"),
    (lambda: GuidanceOptions(nag_end=float("nan")), "ends at"), (lambda: GuidanceOptions(batched="yes"), "auto, on")])
def test_numbers_out_of_range_are_refused(make, said):
    """Promise: every number that cannot be meant is an error when the options are made."""
    with pytest.raises(ValueError, match=said):
        make()


def test_blocks_that_a_model_does_not_have(tmp_path):
    """Promise: the error comes with the option, before anything is loaded, and says which blocks there are."""
    model = load_model(write_transformer(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="block 9 is to be skipped, and the model has blocks 0 to 5"):
        replace(model, guidance=GuidanceOptions(skipped=SkippedBlocks((2, 9))))


def test_only_small_videos_on_a_gpu_are_batched_by_themselves():
    """Promise: "auto" batches where one branch leaves a GPU idle; "on" and "off" are obeyed."""
    auto = GuidanceOptions()
    assert auto.is_batched("cuda", 1024) and not auto.is_batched("cuda", 32760) and not auto.is_batched("cpu", 64)
    assert GuidanceOptions(batched="on").is_batched("cpu", 75600)
    assert not GuidanceOptions(batched="off").is_batched("cuda", 1024)


def test_what_a_file_remembers():
    """Promise: neutral options, also with their range written out, leave no trace; others are JSON of what differs."""
    assert GuidanceOptions(sigmas=SigmaRange(1.0, 0.0)).record() == {}
    options = GuidanceOptions(sigmas=SigmaRange(0.9, 0.1), scales=(5.0, 1.0), nag=NormalisedAttention(),
                              skipped=SkippedBlocks((9,)))
    assert json.loads(json.dumps(options.record(), allow_nan=False)) == {
        "sigmas": {"start": 0.9, "end": 0.1}, "scales": [5.0, 1.0], "nag": {"scale": 11.0, "tau": 2.5, "alpha": 0.25},
        "skipped": {"blocks": [9], "scale": 0.0, "sigmas": {"start": 1.0, "end": 0.0}}}
