"""The command that measures speed: every case runs at its smallest size and reports what it promises."""

import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results, speed
from benchmarks.cases.bench import SCALES
from benchmarks.limits import Machine, decoder_work, encoder_work, text_work, transformer_work
from benchmarks.shared import Report, interleave
from wan_core.dit import ModelInputs, TextTokens, WanTransformer
from wan_core.presets import VAES, TransformerSpec
from wan_core.text import UMT5Encoder

CPU = torch.device("cpu")
# Cases with others beside them, each with one line of its results.
BESIDE = {"step": "step, bfloat16", "attention": "attention, float32", "text": "text encoder", "load": "load",
          "vae": "wan21_vae decode", "vae22": "wan22_vae encode"}


def measured(tmp_path, *arguments):
    """What the command writes for its smallest size."""
    out = tmp_path / "speed.json"
    code = speed.main(["--scale", "tiny", "--device", "cpu", "--rounds", "1", "--threads", "1", "--out", str(out),
                       "--folder", str(tmp_path), *arguments])
    assert code == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", [name for name in speed.CASES if name not in ("compile", "swap", "vae-memory")])
def test_every_case_runs_and_reports_what_it_promises(tmp_path, case):
    """Ours, another implementation and the machine's limit for each part; single numbers for the rest."""
    found = measured(tmp_path, "--only", case, "--peers", "diffusers", "transformers")["results"]
    assert not [one for one in found if "failed" in one.get("note", "")]
    compared = [one for one in found if "seconds" in one]
    if case in BESIDE:
        line = next(one for one in compared if one["case"].startswith(BESIDE[case]))
        # diffusers reads files with accelerate, which need not be there.
        peers = {"diffusers"} if case != "load" or find_spec("accelerate") else set()
        assert {"ours", *peers} <= line["seconds"].keys()
        assert line["limit"] > 0 and line["ratios"]["ours/limit"] == pytest.approx(
            line["seconds"]["ours"] / line["limit"])
    elif case == "caches":
        assert {one["case"].rsplit(", ")[-1] for one in compared} == {"no cache", "TeaCache", "MagCache", "EasyCache"}
        assert all(one["limit"] > 0 for one in compared)
    else:
        assert all(one["value"] > 0 for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["compile", "swap", "vae-memory"])
def test_cases_that_take_longer_run(tmp_path, case):
    """Compiled blocks, block swap, and processes of their own."""
    found = measured(tmp_path, "--only", case, "--peers", "diffusers")["results"]
    assert found and not [one for one in found if "note" in one]


def test_what_the_command_knows_of_a_released_model():
    """The goals of one H200 are there, for the sizes that they hold for, and predictions are finite."""
    full = SCALES["full"]
    assert [clip.goals["bfloat16"]["ours"] for clip in full.clips] == [5.2, 18.5]
    assert full.clips[1].goals["fp8 sage"]["ours"] == 16.0 and full.vae_goals["wan21_vae decode"]["ours"] == 8.0
    work = [transformer_work(full.spec, tokens).total / 1e15 for tokens in (32760, 75600)]
    assert work == pytest.approx([1.678, 6.523], rel=0.01)


@pytest.mark.parametrize("name", ["wan21_vae", "wan22_vae"])
def test_operations_of_a_vae_are_those_that_diffusers_carries_out(name):
    """The formulas count what PyTorch's counter counts in diffusers' module, to the last one."""
    spec = VAES[name]
    patches = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    side = 32 // spec.spatial_stride
    with torch.device("meta"), torch.no_grad():
        theirs = AutoencoderKLWan(
            base_dim=spec.dim, decoder_base_dim=spec.decoder_dim, z_dim=spec.z_dim, num_res_blocks=spec.num_res_blocks,
            scale_factor_spatial=spec.spatial_stride, **(patches if spec.kind == "wan22" else {}))
        with FlopCounterMode(display=False) as decoding:
            theirs.decode(torch.empty(1, spec.z_dim, 3, side, side))
        with FlopCounterMode(display=False) as encoding:
            theirs.encode(torch.empty(1, 3, 9, 32, 32))
    assert decoder_work(spec, 9, 32, 32).total == decoding.get_total_flops()
    assert encoder_work(spec, 9, 32, 32).total == encoding.get_total_flops()


def test_operations_of_the_other_models_are_those_that_they_carry_out():
    """Products and attention of the transformer's blocks with the whole text, and the text encoder's products."""
    spec = TransformerSpec(model_type="t2v", dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=96)
    before: list[int] = []
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = WanTransformer(spec)
        model.blocks[0].register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))
        timestep, text = torch.tensor([5.0], device="cpu"), TextTokens(torch.empty(1, 512, 256), None)
        model(ModelInputs(torch.empty(1, 16, 2, 8, 8), timestep, text))
    of_head = 2 * 32 * spec.dim * 64
    assert counter.get_total_flops() - before[0] - of_head == transformer_work(spec, 32).total
    spec = SCALES["tiny"].text
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        UMT5Encoder(spec)(torch.ones(1, 20, dtype=torch.int64), torch.ones(1, 20))
    assert counter.get_total_flops() == text_work(spec, 20).products


def test_whoever_fails_is_left_out_and_told():
    """A peer that fails costs nothing but its own times; rounds stop at the deadline behind the first that counts."""
    told, calls = [], []

    def fails():
        raise RuntimeError("no kernel")

    times = interleave({"ours": lambda: calls.append(1), "other": fails}, 5, CPU, -math.inf,
                       lambda name, error: told.append((name, str(error))))
    assert list(times) == ["ours"] and len(times["ours"]) == 1 and len(calls) == 2
    assert told == [("other", "no kernel")]


def test_goals_are_told_and_never_stop_the_command(tmp_path, capsys):
    """A goal is met or not met by medians, one for somebody absent is left out, and all of it is in the file."""
    report = Report(tmp_path / "out.json", CPU, "tiny")
    report.compare("step", {"ours": [3.0, 1.0, 2.0], "diffusers": [4.0]}, 1.0,
                   {"ours": 1.5, "ours/diffusers": 0.5, "ours/absent": 0.1})
    content = json.loads((tmp_path / "out.json").read_text())
    line = content["results"][0]
    assert line["ratios"] == {"ours/diffusers": 0.5, "ours/limit": 2.0}
    assert line["goals"] == {"ours": {"most": 1.5, "met": False}, "ours/diffusers": {"most": 0.5, "met": True}}
    assert "**not met**" in capsys.readouterr().out
    assert "| step | 2 | diffusers 4 (0.5) | 1 | 2 | ours ≤ 1.5: **not met**, ours/diffusers ≤ 0.5: met |" in (
        results.table(content))


def test_a_plot_is_drawn_or_the_report_says_what_is_missing(tmp_path, monkeypatch):
    """With matplotlib a picture of what was compared; without it one line that says how to install it."""
    report = Report(None, CPU, "tiny")
    report.compare("step", {"ours": [2.0], "diffusers": [40.0]}, 1.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "benchmarks/requirements.txt" in results.draw(report.content, tmp_path / "no.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert results.draw(report.content, tmp_path / "plot.png") is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rates_are_measured_once():
    """Limits of one report are reckoned with one figure."""
    machine = Machine(CPU, 64, 8, 1 << 12)
    assert machine.matmul(torch.float32) == Machine(CPU, 64, 8, 1 << 12).matmul(torch.float32) > 0
