"""A table and a plot of what `speed.py` has written.

    python benchmarks/results.py speed.json                      # the table, in Markdown
    python benchmarks/results.py speed.json --plot speed.png     # needs matplotlib, see benchmarks/requirements.txt
"""

import argparse
import json
from pathlib import Path

COLOURS = {"ours": "#1f6fb4", "limit": "#b8b8b8", "diffusers": "#e08a2b", "transformers": "#d0b030",
           "comfyui": "#7a4fa3", "torch": "#c05050", "no cache": "#5a9a5a", "not compiled": "#5a9a5a"}
INSTALL = "python -m pip install -r benchmarks/requirements.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what speed.py --out has written")
    parser.add_argument("--plot", type=Path, help="file for a plot: .png, .svg or .pdf")
    options = parser.parse_args()
    content = json.loads(options.results.read_text())
    print(table(content))
    if options.plot and (missing := draw(content, options.plot)):
        raise SystemExit(missing)


def table(content: dict) -> str:
    """Markdown: what was compared, with all others' seconds and ours as a part of them, then the single numbers."""
    compared = [one for one in content["results"] if "seconds" in one]
    lines = []
    if compared:
        lines += row("part", "ours, s", "others, s (ours / theirs)", "limit, s", "ours / limit", "goal")
        lines += row(*["---"] * 6)
        for one in compared:
            others = ", ".join(f"{name} {number(seconds)} ({number(one['ratios'][f'ours/{name}'], 2)})"
                               for name, seconds in one["seconds"].items() if name != "ours")
            goals = ", ".join(f"{name} ≤ {goal['most']:g}: {'met' if goal['met'] else '**not met**'}"
                              for name, goal in one["goals"].items())
            lines += row(one["case"], number(one["seconds"]["ours"]), others, number(one["limit"]),
                         number(one["ratios"].get("ours/limit"), 2), goals)
    single = [one for one in content["results"] if "value" in one]
    if single:
        lines += ["", *row("case", "measured", "value", "goal"), *row(*["---"] * 4)]
        for one in single:
            goal = "" if one["goal"] is None else f"≤ {one['goal'][1]:g}: {'met' if one['met'] else '**not met**'}"
            lines += row(one["case"], one["what"], number(one["value"], 4), goal)
    return "\n".join(lines)


def row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def number(value: float | None, digits: int = 3) -> str:
    """So many digits that count; whole numbers from a hundred on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def draw(content: dict, path: Path) -> str | None:
    """Bars of ours, others' and the limit for each part, as multiples of ours; their seconds stand beside them.

    Returns what is missing where nothing can be drawn: matplotlib, or something to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no plot: matplotlib is not installed ({INSTALL}). The results can be drawn later: see --help."
    compared = [one for one in content["results"] if "seconds" in one]
    if not compared:
        return "no plot: nothing was compared."
    bars = [(one["case"], {**one["seconds"], **({"limit": one["limit"]} if one["limit"] else {})}) for one in compared]
    count = sum(len(values) + 1 for _, values in bars)
    figure = Figure(figsize=(10, 1.2 + 0.24 * count), layout="constrained")
    axes = figure.add_subplot()
    # A way that takes very much longer would leave no room for the others.
    most, place, ticks = 3.0, 0, []
    for case, values in bars:
        ticks.append((place + (len(values) - 1) / 2, case))
        for name, seconds in values.items():
            ratio = seconds / values["ours"]
            axes.barh(place, min(ratio, most), color=COLOURS.get(name, "#808080"), height=0.85)
            axes.text(min(ratio, most) + 0.02, place, f"{name} {number(seconds)} s{' →' if ratio > most else ''}",
                      va="center", fontsize=7)
            place += 1
        place += 1
    axes.axvline(1.0, color=COLOURS["ours"], linewidth=0.8, linestyle=":")
    axes.set_yticks([position for position, _ in ticks], [case for _, case in ticks], fontsize=8)
    axes.set_ylim(place - 0.5, -1)
    axes.set_xlim(0, most + 0.6)
    axes.set_xlabel("time as a multiple of ours; shorter is faster")
    machine = content["machine"]
    axes.set_title(f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads, {machine['date']}",
                   fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return None


if __name__ == "__main__":
    main()
