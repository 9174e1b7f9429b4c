"""The walls of the design: who imports whom, how long things are, what is never done, what is under version control."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("wan_core", "nodes") for path in (ROOT / folder).rglob("*.py"))

# Modules of the host application, and what the engine is compared with in tests.
HOST = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "execution", "folder_paths",
        "latent_preview", "node_helpers", "nodes", "server"}
TEST_ONLY = {"accelerate", "diffusers", "hypothesis", "peft", "pytest", "transformers"}
# ftfy, Triton and the packages of attention kernels are used where they are installed and may be absent.
RUN_TIME = {"flash_attn", "flash_attn_3", "flash_attn_interface", "sageattention", "sageattn", "sageattn3",
            "einops", "ftfy", "gguf", "imageio_ffmpeg", "numpy", "safetensors", "sentencepiece", "torch", "tqdm",
            "triton"}

# Room -> the rooms that it may import. Single files directly in wan_core are rooms, too.
MAY_IMPORT = {
    "presets": set(),
    "nano": set(),
    "cache": set(),
    "conditioning": {"dit", "presets", "vae"},
    "memory": set(),
    "video": set(),
    "dit": {"presets"},
    "vae": {"presets"},
    "text": {"presets"},
    "vision": {"presets"},
    "guidance": {"conditioning", "dit"},
    "sampling": {"cache", "conditioning", "dit", "guidance", "presets"},
    # The modules of the other rooms are imported only inside the function that builds one.
    "weights": {"presets", "dit", "vae", "text", "vision"},
    "models": {"cache", "dit", "guidance", "memory", "nano", "presets", "text", "vae", "vision", "weights"},
    "calibrate": {"cache", "models", "pipeline"},
    "training": {"cache", "calibrate", "conditioning", "dit", "memory", "models", "nano", "pipeline", "presets",
                 "sampling", "text", "vae", "video", "vision", "visuals", "weights"},
    "visuals": {"conditioning", "models"},
    "checkpoint": {"cache", "memory", "models", "sampling", "weights"},
    "forecast": {"cache", "conditioning", "dit", "guidance", "memory", "models", "presets", "vae", "weights"},
    "pipeline": {"cache", "checkpoint", "conditioning", "forecast", "memory", "models", "nano", "presets", "sampling",
                 "video", "visuals"},
    "__init__": {"checkpoint", "models", "pipeline", "visuals", "weights"},
    "shell": {"cache", "calibrate", "checkpoint", "conditioning", "dit", "forecast", "guidance", "memory", "models",
              "pipeline", "presets", "sampling", "vae", "video", "visuals", "weights"},
    "__main__": {"shell"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> Iterator[str]:
    """Top-level names of absolute imports, wherever in the file they stand."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def imported_parts(path: Path) -> Iterator[str]:
    """Where relative imports lead, as a path from the root such as 'wan_core/dit/model' or 'wan_core/nano'."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].relative_to(ROOT)
            if node.module:
                yield (folder / node.module.replace(".", "/")).as_posix()
            else:
                yield from ((folder / alias.name).as_posix() for alias in node.names)


def room_of(part: str) -> str:
    """'wan_core/dit/model' -> 'dit'; 'wan_core/pipeline' -> 'pipeline'."""
    return Path(part).with_suffix("").parts[1]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(path: Path, *names: str) -> list[str]:
    """Calls of a function by its plain or dotted name."""
    return [f"{name_of(path)}:{node.lineno}" for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def test_there_is_something_to_look_at():
    """The rooms that the table names exist, and every room is in the table."""
    rooms = {room_of(name_of(path)) for path in FILES if name_of(path).startswith("wan_core/")}
    assert rooms == set(MAY_IMPORT)


def test_only_the_host_file_knows_the_host():
    """Nothing but nodes/host.py imports ComfyUI, not even inside a function; the engine runs without it."""
    assert not {f"{name_of(path)}: {module}" for path in FILES if name_of(path) != "nodes/host.py"
                for module in imported_modules(path) if module in HOST}


def test_the_engine_stands_on_few_packages():
    """Run-time code imports the standard library and the allowed packages, never what it is tested against."""
    allowed = RUN_TIME | sys.stdlib_module_names
    found = {f"{name_of(path)}: {module}" for path in FILES for module in imported_modules(path)
             if module not in allowed and not (name_of(path) == "nodes/host.py" and module in HOST)}
    assert not found and not TEST_ONLY & allowed


def test_the_pack_is_imported_relatively():
    """The pack's folder has any name inside ComfyUI, so its modules never call each other by absolute names."""
    assert not {f"{name_of(path)}: {module}" for path in FILES for module in imported_modules(path)
                if module in ("wan_core", "tests")}


def test_rooms_import_only_what_they_may():
    """The walls between the rooms of the engine; and nothing in the engine imports the nodes."""
    trespasses = set()
    for path in FILES:
        if not name_of(path).startswith("wan_core/"):
            continue
        room = room_of(name_of(path))
        for part in imported_parts(path):
            assert part.startswith("wan_core"), f"{name_of(path)} imports {part}"
            inside = part == "wan_core" or room_of(part) == room
            if not inside and room_of(part) not in MAY_IMPORT[room]:
                trespasses.add(f"{name_of(path)} -> {part}")
    assert not trespasses


def test_rooms_do_not_import_each_other_in_circles():
    """There is an order of the rooms in which each needs only earlier ones."""
    built: list[str] = []
    while len(built) < len(MAY_IMPORT):
        ready = [room for room, needs in MAY_IMPORT.items() if room not in built and needs <= set(built)]
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - set(built))}"
        built += ready


def test_looking_at_a_file_builds_no_room():
    """weights imports the other rooms' modules only inside functions, so inspecting a file stays light."""
    for path in (ROOT / "wan_core/weights").glob("*.py"):
        top = [node for node in tree_of(path).body if isinstance(node, ast.ImportFrom) and node.level == 2]
        assert {node.module.split(".")[0] for node in top} <= {"presets"}, path.name


def test_files_and_functions_are_short():
    """At most 400 lines a file and 60 a function."""
    long = [f"{name_of(path)}: {count} lines" for path in FILES
            if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400]
    long += [f"{name_of(path)}: {function.name} has {count} lines" for path in FILES for function in functions(path)
             if (count := function.end_lineno - function.lineno + 1) > 60]
    assert not long


def test_files_say_what_they_are():
    """Every module begins with a docstring."""
    assert not [name_of(path) for path in FILES if not ast.get_docstring(tree_of(path))]


def test_nothing_is_printed_but_by_the_shell():
    """Only __main__ files talk to the terminal; all others use logging."""
    assert not [place for path in FILES if path.name != "__main__.py" for place in calls(path, "print")]


def test_no_code_is_run_from_data():
    """No eval, exec or pickle, torch.load always with weights_only=True, no package is installed at run time."""
    assert not [place for path in FILES for place in calls(path, "eval", "exec", "os.system", "compile")]
    assert not [name_of(path) for path in FILES for module in imported_modules(path)
                if module in ("pickle", "marshal", "shelve", "dill", "pip", "ensurepip")]
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{name_of(path)}:{node.lineno}"


def test_options_are_frozen():
    """Every public dataclass is frozen: options and handles cannot change under whoever holds them."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            for decorator in getattr(node, "decorator_list", []):
                text = ast.unparse(decorator)
                if re.match(r"(dataclasses\.)?dataclass\b", text) and not node.name.startswith("_"):
                    assert "frozen=True" in text, f"{name_of(path)}:{node.lineno}"


def test_no_state_is_kept_in_modules():
    """No global statement, and no list or dict on module or class level that something could be added to unnoticed."""
    for path in FILES:
        tree = tree_of(path)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], name_of(path)
        for node in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]:
            for statement in node.body:
                if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(
                        statement.value, ast.List | ast.Dict | ast.Set):
                    empty = not (getattr(statement.value, "elts", None) or getattr(statement.value, "keys", None))
                    assert not empty, f"{name_of(path)}:{statement.lineno}"


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control; the test is skipped in an unpacked archive."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_repository_stays_small(tracked):
    """No file over 8 MB, 40 MB in all, the nano family at most 24 MB and its text-to-video part 16 MB."""
    sizes = {name_of(path): path.stat().st_size for path in tracked}
    assert not {name: size for name, size in sizes.items() if size > 8_000_000}
    assert sum(sizes.values()) <= 40_000_000
    nano = {path.name: path.stat().st_size for path in (ROOT / "wan_core/nano").glob("*.safetensors")}
    text_to_video = ("wan_nano_vae.safetensors", "wan_nano_umt5.safetensors")
    assert sum(size for name, size in nano.items() if name in text_to_video or "_t2v" in name) <= 16_000_000
    assert sum(nano.values()) <= 24_000_000


def test_no_file_names_a_machine(tracked):
    """Nothing under version control has a path that exists on one machine only."""
    marker = re.compile(rb"(?<![\w.])/(?:work|root|tmp/w)(?:/|\b)")
    here = Path(__file__).resolve()
    assert not [name_of(path) for path in tracked
                if path != here and path.suffix in (".py", ".md", ".toml", ".json", ".txt", ".yml", ".sh", "")
                and path.stat().st_size < 1 << 20 and marker.search(path.read_bytes())]
