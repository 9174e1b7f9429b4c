"""The README's commands are the ones that CI runs, and what it names exists."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme():
    command = next(block.strip() for block in shell_blocks() if "pytest" in block)
    assert "\n" not in command
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_both_commands_install_torch_first_and_in_a_virtual_environment():
    for block in shell_blocks()[:2]:
        steps = block.strip().split(" && ")
        assert steps[0] == "python3 -m venv .venv"
        assert steps[1] == ".venv/bin/pip install -q torch==2.13.0"


def test_every_local_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    missing = [link for link in local if not (ROOT / link).exists()]
    assert not missing


def test_the_table_of_formats_is_what_was_measured():
    """Promise: every row of the table stands in the recorded figures, and every recorded figure in the table."""
    figures = json.loads((ROOT / "wan_core" / "nano" / "formats.json").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"\| (`[a-z0-9_]+`(, FP8 products)?|as stored .*) \| [\d.]+ MB"
    rows = [line for line in text.splitlines() if re.match(row, line)]
    expected = []
    for name, scores in figures.items():
        form, _, products = name.partition(", ")
        title = "as stored (BF16)" if name == "stored" else f"`{form}`" + (f", {products}" if products else "")
        psnr = "–" if scores["psnr_db"] is None else f"{scores['psnr_db']} dB"
        expected.append(f"| {title} | {scores['megabytes']:.2f} MB | {scores['colour']} | {scores['direction']} | "
                        f"{scores['shape']} | {psnr} |")
    assert rows == expected


def test_the_table_of_caches_is_what_was_measured():
    """Promise: every row of the table stands in the recorded figures, and every recorded figure in the table."""
    figures = json.loads((ROOT / "wan_core" / "nano" / "caches.json").read_text())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| (none|(Tea|Mag|Easy)Cache, \w+) \|", line)]
    expected = []
    for name in figures["nano_t2v"]:
        cells = []
        for model in ("nano_t2v", "nano_t2v_a"):
            row = figures[model][name]
            psnr = "–" if row["psnr_db"] is None else f"{row['psnr_db']} dB"
            cells.append(f"{row['reused']} % | {row['colour']} / {row['direction']} / {row['shape']} | {psnr}")
        expected.append(f"| {name} | {' | '.join(cells)} |")
    assert rows == expected
