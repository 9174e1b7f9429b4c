"""ComfyUI's own Wan templates: our nodes take what those graphs set, and docs/templates.md tells what becomes of each.

Graphs and subgraphs are read as they were saved, muted and bypassed alternatives included. Not followed is what a
graph computes when it runs; the value stored in the widget counts there.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from tests.nodes.template_inputs import CORE, LORA, PASSES, STAYS, rows
from wan_core.presets import PRESETS
from wan_core.sampling import euler_schedule

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "templates.md"
# The released models of the modes in question. Their preset is given where a template has a pair of them.
FILES = re.compile(r"wan2\.1_(t2v|i2v|flf2v|vace)_|wan2\.2_(t2v|i2v|ti2v)_")
PAIRS = {"wan2.2_t2v_high_noise_14B": "wan22_t2v_a14b", "wan2.2_i2v_high_noise_14B": "wan22_i2v_a14b"}
SUBGRAPH = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NOTES = ("Note", "MarkdownNote")
LOADED, BYPASSED = 0, 4


@dataclass(frozen=True)
class Link:
    """Where an input's link comes from; the origin is None for what a subgraph is given from outside."""

    origin: int | None
    type: str


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph or a subgraph: its nodes without notes and subgraphs, and its links by their number."""

    nodes: dict[int, dict]
    links: dict[int, Link]

    @classmethod
    def of(cls, saved: dict) -> "Graph":
        nodes = {node["id"]: node for node in saved["nodes"]
                 if node["type"] not in NOTES and not SUBGRAPH.fullmatch(node["type"])}
        links = {}
        for link in saved["links"]:
            number, origin, kind = ((link[0], link[1], link[5]) if isinstance(link, list)
                                    else (link["id"], link["origin_id"], link["type"]))
            links[number] = Link(origin if origin in nodes else None, kind)
        return cls(nodes, links)

    def linked(self, node: dict) -> dict[str, Link]:
        """The inputs of a node that are connected."""
        return {entry["name"]: self.links[entry["link"]] for entry in node.get("inputs", ())
                if entry.get("link") is not None}

    def origins(self, link: Link) -> list[dict]:
        """The nodes whose output comes through a link, beyond switches: one for each branch."""
        node = self.nodes.get(link.origin)
        if node is None:
            return []
        if node["type"] != "ComfySwitchNode":
            return [node]
        return [origin for name, branch in self.linked(node).items() if name != "switch"
                for origin in self.origins(branch)]

    def values(self, node: dict, name: str) -> list:
        """What a widget is set to: the stored value, and those of the primitive nodes that are connected to it."""
        found = [stored(node)[name]]
        if name in self.linked(node):
            found += [origin["widgets_values"][0] for origin in self.origins(self.linked(node)[name])
                      if origin["type"].startswith("Primitive")]
        return found

    def above(self, node: dict) -> list[dict]:
        """The nodes that a node's model comes from as the template stands: switches and bypasses as they are set."""
        if node["mode"] == LOADED and node["type"] == "ComfySwitchNode":
            switch = self.linked(node).get("switch")
            on = self.origins(switch)[0]["widgets_values"][0] if switch else node["widgets_values"][0]
            source = self.linked(node)["on_true" if on else "on_false"]
        else:
            source = self.linked(node).get("model")
        found = [node] if node["mode"] == LOADED else []
        return found if source is None else found + self.above(self.nodes[source.origin])


def stored(node: dict) -> dict[str, object]:
    """The values of a core node's widgets by name."""
    names, values = CORE[node["type"]].widgets, node.get("widgets_values") or []
    assert len(names) == len(values), f"{node['type']} stores {values}; the table has {list(names)}"
    return dict(zip(names, values))


@cache
def templates() -> dict[str, tuple[Graph, ...]]:
    """Every template that samples a Wan model on the user's machine, by name: its graphs."""
    found = {}
    for path in sorted(files("comfyui_workflow_templates_json").joinpath("templates").iterdir(), key=lambda p: p.name):
        text = path.read_text(encoding="utf-8") if path.name.endswith(".json") else ""
        # Whatever is made of Wan encodes its prompt with this encoder.
        if '"umt5' in text and '"nodes"' in text:
            saved = json.loads(text)
            graphs = [Graph.of(graph) for graph in [saved, *saved.get("definitions", {}).get("subgraphs", [])]]
            if any(node["type"] == "CLIPLoader" and "wan" in node["widgets_values"]
                   for graph in graphs for node in graph.nodes.values()):
                found[path.name.removesuffix(".json")] = tuple(graphs)
    return found


def nodes_of(graphs: tuple[Graph, ...]) -> Iterator[tuple[Graph, dict]]:
    return ((graph, node) for graph in graphs for node in graph.nodes.values())


def models(graphs: tuple[Graph, ...]) -> set[str]:
    """The transformers that a template names."""
    return {node["widgets_values"][0] for _, node in nodes_of(graphs) if node["type"] == "UNETLoader"}


def in_scope(graphs: tuple[Graph, ...]) -> bool:
    """Text, image, first and last frame, TI2V 5B or VACE: no other model, and no other node of Wan's."""
    special = {node["type"] for _, node in nodes_of(graphs) if node["type"].startswith("Wan")}
    return special <= CORE.keys() and all(FILES.match(name) for name in models(graphs))


OURS = {name: graphs for name, graphs in templates().items() if in_scope(graphs)}


@pytest.fixture(params=OURS)
def name(request) -> str:
    return request.param


@pytest.fixture
def graphs(name) -> tuple[Graph, ...]:
    return OURS[name]


@pytest.fixture(scope="module")
def page() -> list[str]:
    return PAGE.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def declared(pack) -> dict[tuple[str, str], tuple]:
    """(our node, its input) -> (type or choices, options)."""
    return {(node, name): (entry[0], entry[1] if len(entry) > 1 else {})
            for node, kind in pack.NODE_CLASS_MAPPINGS.items()
            for group in ("required", "optional")
            for name, entry in kind.INPUT_TYPES().get(group, {}).items()}


def cells(page: list[str], heading: str) -> dict[str, list[str]]:
    """The table under a heading of the page: first cell -> the others."""
    start = page.index(f"## {heading}")
    table = []
    for line in page[start + 1:]:
        if line.startswith("## "):
            break
        if line.startswith("| ") and not line.startswith("| template"):
            table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert len({row[0] for row in table}) == len(table), "a row stands twice"
    return {row[0].strip("`"): row[1:] for row in table}


def test_the_modes_are_all_there():
    """Promise: text, image, first-last frame, 5B and VACE are among what is walked, each with its released model."""
    seen = {match[0] for graphs in OURS.values() for file in models(graphs) if (match := FILES.match(file))}
    assert seen == {"wan2.1_t2v_", "wan2.1_i2v_", "wan2.1_flf2v_", "wan2.1_vace_", "wan2.2_t2v_", "wan2.2_i2v_",
                    "wan2.2_ti2v_"}


def test_every_input_has_a_place(graphs):
    """Promise: each node stays or is in the table, and so is each input that it sets, widget or link."""
    for graph, node in nodes_of(graphs):
        if node["type"] in STAYS:
            continue
        entry = CORE[node["type"]]
        assert set(graph.linked(node)) <= {*entry.links, *entry.widgets}, node["type"]
        assert set(stored(node)) == set(entry.widgets)


def test_our_nodes_offer_every_input(graphs, declared):
    """Promise: each widget value of a template, translated, is one that our node's widget takes."""
    checked = 0
    for graph, node in nodes_of(graphs):
        for name, fate in getattr(CORE.get(node["type"]), "widgets", {}).items():
            for value in graph.values(node, name):
                if fate.values:
                    assert value in fate.values, (node["type"], name, value)
                for place in fate.to:
                    check(value=fate.values[value] if fate.values else value, declared=declared[place], place=place)
                    checked += 1
    assert checked > 10


def check(value: object, declared: tuple, place: tuple[str, str]) -> None:
    kind, options = declared
    if isinstance(kind, list):
        # Lists of files hold what is on the disk, and a file's name is all that a template says.
        is_file = isinstance(value, str) and value.endswith(".safetensors")
        of_files = kind[0] == "none" or kind[0].endswith(".safetensors")
        assert value in kind or is_file and of_files, (place, value)
    elif kind in ("INT", "FLOAT"):
        assert isinstance(value, int) or kind == "FLOAT" and isinstance(value, float), (place, value)
        assert options["min"] <= value <= options["max"], (place, value)
        assert kind == "FLOAT" or (value - options["min"]) % options.get("step", 1) == 0, (place, value)
    else:
        assert type(value) is {"STRING": str, "BOOLEAN": bool}[kind], (place, value)


def test_every_link_fits(graphs, declared, pack):
    """Promise: each link of a template has a type that our node takes, if it leads to one, and gives, if it comes from
    one.

    The core's model and ours are different things: what is linked by one is replaced at both ends, or stays at both.
    """
    for graph, node in nodes_of(graphs):
        entry = CORE.get(node["type"])
        for name, link in graph.linked(node).items():
            origins = graph.origins(link)
            if link.type == "MODEL" and node["type"] != "ComfySwitchNode":
                assert {origin["type"] in CORE for origin in origins} == {entry is not None}, (node["type"], name)
            ours = entry or any(origin["type"] in CORE for origin in origins)
            kind = "WAN_MODEL" if link.type == "MODEL" and ours else link.type
            for place in {**entry.links, **entry.widgets}[name].to if entry else ():
                taken = "COMBO" if isinstance(declared[place][0], list) else declared[place][0]
                assert taken == kind, (node["type"], name)
            for origin in origins:
                assert gives(pack, graph, origin, link.type, kind), (origin["type"], node["type"], name)


def gives(pack, graph: Graph, node: dict, before: str, now: str) -> bool:
    """Whether what takes a node's place has an output of type `now`, where the node's own was of type `before`."""
    entry = CORE.get(node["type"])
    makers = {place[0] for fate in (*entry.widgets.values(), *entry.links.values()) for place in fate.to
              } if entry else set()
    # What only passes something on (a shift) falls away, and nothing is asked of a node that stays.
    passes = node["type"] in PASSES and before in {link.type for link in graph.linked(node).values()}
    return not entry or passes or any(now in pack.NODE_CLASS_MAPPINGS[maker].RETURN_TYPES for maker in makers)


def pairs() -> Iterator[tuple[str, str, float, int, int]]:
    """The two-expert runs of the templates: template, preset, shift, steps, steps at high noise."""
    for name, graphs in OURS.items():
        presets = {preset for file, preset in PAIRS.items() if any(used.startswith(file) for used in models(graphs))}
        for graph, node in nodes_of(graphs):
            if node["type"] == "KSamplerAdvanced" and stored(node)["add_noise"] == "enable":
                preset, = presets
                patch, = graph.origins(graph.linked(node)["model"])
                assert stored(node)["sampler_name"] == "euler" and stored(node)["start_at_step"] == 0
                # Stored values that a switch overrides come first, its two branches after them in the same order.
                runs = list(zip(graph.values(node, "steps"), graph.values(node, "end_at_step"), strict=True))
                for steps, end in runs[-2:]:
                    yield name, preset, stored(patch)["shift"], steps, end


def test_euler_runs_at_the_core_s_noise_levels():
    """Promise: where a template says euler and simple, our euler visits the same noise levels for its steps and shift.

    The core's simple scheduler picks from 1000 levels, shifted; reference: ComfyUI's `comfy/samplers.py`.
    """
    settings = {(steps, shift) for _, _, shift, steps, _ in pairs()}
    assert len(settings) > 1
    for steps, shift in settings:
        even = 1 - torch.tensor([int(step * 1000 / steps) for step in range(steps + 1)]) / 1000
        torch.testing.assert_close(euler_schedule(steps, shift).sigmas, shift * even / (1 + (shift - 1) * even),
                                   rtol=0, atol=1e-6)


def test_the_page_lists_every_template(page):
    """Promise: each Wan template of the package stands in one of the page's two tables, and nothing else does."""
    listed = cells(page, "What each becomes"), cells(page, "Out of scope")
    assert set(listed[0]) == set(OURS)
    assert set(listed[1]) == set(templates()) - set(OURS)
    version = re.search(r"comfyui-workflow-templates-json==(\S+)",
                        (PAGE.parent.parent / "tests" / "requirements.txt").read_text(encoding="utf-8"))[1]
    assert any(f"comfyui-workflow-templates-json` {version}" in line for line in page)


def test_the_page_names_our_nodes(name, graphs, page, pack):
    """Promise: a template's row names the node for its models and that for its pictures, controls or empty latent."""
    titles = pack.NODE_DISPLAY_NAME_MAPPINGS
    pair = any("high_noise" in file for file in models(graphs))
    expected = {"WanCoreExpertPairLoader" if pair else "WanCoreModelLoader", "WanCoreSampler"}
    expected |= {fate.to[0][0] for _, node in nodes_of(graphs) if node["type"] in CORE
                 for widget, fate in CORE[node["type"]].widgets.items() if widget in ("width", "trim_amount")}
    named = {title for title in titles.values() if re.search(rf"{title}(?=[,;. ]|$)", cells_of(page, name)[1])}
    assert named == {titles[node] for node in expected}


def test_the_page_says_what_runs_today(name, graphs, page):
    """Promise: a template's row says yes, and names what its graph has as it stands that needs a word: LoRAs, which
    take a node of ours, and FP8 files."""
    loaded = [above for graph, node in nodes_of(graphs) if node["type"].startswith("KSampler")
              and node["mode"] == LOADED for above in graph.above(node)]
    assert any(node["type"] == "UNETLoader" for node in loaded)
    has = {"LoRA" for node in loaded if node["type"] in LORA}
    has |= {"FP8" for node in loaded if node["type"] == "UNETLoader" and "fp8" in node["widgets_values"][0]}
    today = cells_of(page, name)[2]
    assert today.startswith("yes") and {word for word in ("LoRA", "FP8") if word in today} == has


def cells_of(page: list[str], name: str) -> list[str]:
    return cells(page, "What each becomes")[name]


def test_the_page_tells_what_becomes_of_each_input(page, pack):
    """Promise: the page has the table of inputs as the tests have it."""
    expected = rows(pack.NODE_DISPLAY_NAME_MAPPINGS)
    assert [line for line in page if re.match(rf"\| ({'|'.join(CORE)}) \|", line)] == expected


def test_the_page_tells_where_a_pair_switches(page):
    """Promise: the steps after which the low-noise expert takes over, in the template and in ours, are as computed."""
    expected = set()
    for name, preset, shift, steps, end in pairs():
        noisy = euler_schedule(steps, shift).timesteps >= PRESETS[preset].sampling.boundary * 1000
        expected.add(f"| `{name}` | {steps} | {shift:g} | {end} | {int(noisy.sum())} |")
    start = page.index("## Expert pairs")
    assert {line for line in page[start:] if re.match(r"\| `\w\S+` \| \d", line)} == expected
