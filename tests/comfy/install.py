"""Prepare a Python environment in which a ComfyUI checkout runs with --cpu, for the tests of this folder.

One command makes a virtual environment, installs what ComfyUI and this pack ask for, and starts ComfyUI once to see
that it holds:

    python tests/comfy/install.py ~/comfy/ComfyUI

The environment lies beside the checkout (``~/comfy/venv`` here), where conftest.py looks for it; ``--venv`` puts it
elsewhere. The checkout itself is only read. Three things differ from ``pip install -r requirements.txt``:

* torch comes first, at a version that is then pinned, because several requirements would otherwise replace it by a CUDA
  build of several GB. Where only a CPU build is wanted, point pip at one in the usual way (its configuration file, or
  PIP_INDEX_URL / PIP_FIND_LINKS).
* torchvision and torchaudio come without their dependencies, since no CPU build of them may exist for that torch.
  torchaudio's compiled libraries are removed if its import fails with them: without them it goes on in pure Python.
  What torchvision needs is done at each start, by launcher.py.
* ``requests`` is added, which some ComfyUI versions use and do not list.

Standard library only. Reference: https://docs.comfy.org/installation/manual_install
"""
import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACK = HERE.parent.parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PAIRED_WITH_TORCH = ("torchvision", "torchaudio")
UNLISTED = ("requests",)

log = logging.getLogger("install")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("comfyui", type=Path, help="a ComfyUI checkout (the folder with main.py)")
    parser.add_argument("--venv", type=Path, help="where the environment goes (default: 'venv' beside the checkout)")
    parser.add_argument("--torch", default="2.13.0", help="version of torch (default: %(default)s)")
    parser.add_argument("--torchvision", default="0.28.0", help="its torchvision (default: %(default)s)")
    parser.add_argument("--torchaudio", default="2.11.0", help="its torchaudio (default: %(default)s)")
    return parser.parse_args(argv)


def venv_python(folder: Path) -> Path:
    """The interpreter of the virtual environment ``folder``."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def package_name(requirement: str) -> str:
    """The package that a requirement line names, in lower case."""
    return NAME.match(requirement).group().lower()


def read_requirements(file: Path) -> list[str]:
    """The requirement lines of ``file``, without comments and options."""
    lines = (line.split("#", 1)[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if NAME.match(line)]


def pip_install(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments], check=True)


def imports(python: Path, module: str) -> bool:
    trial = subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, check=False)
    return trial.returncode == 0


def strip_torchaudio(python: Path) -> None:
    """Remove torchaudio's compiled libraries if it cannot be imported with them."""
    if imports(python, "torchaudio"):
        return
    find = "import importlib.util as u; print(u.find_spec('torchaudio').submodule_search_locations[0])"
    folder = subprocess.run([str(python), "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    libraries = [file for pattern in ("*.so", "*.pyd") for file in (Path(folder) / "lib").glob(pattern)]
    for file in libraries:
        file.unlink()
    if not imports(python, "torchaudio"):
        raise SystemExit(f"torchaudio in {folder} cannot be imported, even without its {len(libraries)} compiled "
                         "libraries; try another version with --torchaudio")
    log.info("removed %d compiled libraries of torchaudio, which do not load beside this torch", len(libraries))


def install(python: Path, options: argparse.Namespace) -> None:
    pip_install(python, f"torch=={options.torch}")
    needed = [line for file in (options.comfyui / "requirements.txt", PACK / "requirements.txt") if file.is_file()
              for line in read_requirements(file)]
    names = {package_name(line) for line in needed}
    pins = {"torch": options.torch, "torchvision": options.torchvision, "torchaudio": options.torchaudio}
    pins = {name: version for name, version in pins.items() if name == "torch" or name in names}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
        for name in PAIRED_WITH_TORCH:
            if name in pins:
                pip_install(python, "--no-deps", f"{name}=={pins[name]}")
        wanted = [line for line in needed if package_name(line) not in ("torch", *PAIRED_WITH_TORCH)]
        pip_install(python, "--constraint", str(constraints), *wanted, *UNLISTED)
    if "torchaudio" in pins:
        strip_torchaudio(python)


def check(python: Path, comfyui: Path) -> None:
    """Let ComfyUI load all its nodes in an empty base directory and leave; raises if it does not."""
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "custom_nodes").mkdir()
        command = [str(python), str(HERE / "launcher.py"), str(comfyui / "main.py"), "--cpu", "--quick-test-for-ci",
                   "--base-directory", base, "--database-url", "sqlite:///:memory:"]
        trial = subprocess.run(command, capture_output=True, text=True, check=False, cwd=base)
    if trial.returncode != 0:
        raise SystemExit(f"installed, but ComfyUI does not start (exit status {trial.returncode}):\n"
                         f"{trial.stderr[-3000:]}")


def main() -> None:
    options = parse_arguments()
    options.comfyui = options.comfyui.expanduser().resolve()
    if not (options.comfyui / "main.py").is_file():
        raise SystemExit(f"{options.comfyui} is not a ComfyUI checkout: it has no main.py")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = (options.venv or options.comfyui.parent / "venv").expanduser().resolve()
    python = venv_python(folder)
    if not python.exists():
        log.info("making the virtual environment %s with Python %s", folder, sys.version.split()[0])
        venv.create(folder, with_pip=True)
    install(python, options)
    check(python, options.comfyui)
    log.info("done: ComfyUI in %s runs with %s", options.comfyui, python)


if __name__ == "__main__":
    main()
