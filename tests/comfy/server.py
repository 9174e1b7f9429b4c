"""A real ComfyUI server for tests: found, started with this pack linked in, and always ended.

The server gets a base directory of its own (models, custom_nodes, input, output, temp, user and the database), so it
sees none of the files, packs and settings of the ComfyUI checkout that it runs from, and leaves none behind. (One
exception: model folders named in an extra_model_paths.yaml of the checkout, which ComfyUI always reads.)
"""
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.comfy.client import ComfyClient

LAUNCHER = Path(__file__).resolve().parent / "launcher.py"
PACK_NAME = "ComfyUI-WanCore"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "clip_vision", "audio_encoders", "loras", "vae_approx")
START_TIMEOUT_S = 600.0  # some 10 s on an idle machine; a server that ends is noticed at once
IMPORT_CHECK = "import aiohttp, av, numpy, PIL, safetensors, torch, yaml, comfyui_frontend_package"


class Unavailable(RuntimeError):
    """ComfyUI cannot be run here; the message says why and what to do, in one line."""


class ServerError(RuntimeError):
    """A server was started and did not become ready; the message ends with its log."""


@dataclass(frozen=True)
class Installation:
    """A ComfyUI checkout and the Python interpreter that has its requirements."""

    checkout: Path
    python: Path


def find_installation() -> Installation:
    """Find ComfyUI and an interpreter that can run it.

    The checkout is ``COMFYUI_PATH``, else ``~/comfy/ComfyUI``. The interpreter is ``COMFYUI_PYTHON``, else the one of
    the first virtual environment of: ``venv`` beside the checkout, ``.venv`` and ``venv`` inside it; else this one.

    Raises:
        Unavailable: no checkout, no such interpreter, or one that lacks ComfyUI's requirements.
    """
    checkout = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser().absolute()
    if not (checkout / "main.py").is_file():
        raise Unavailable(f"no ComfyUI at {checkout}: set COMFYUI_PATH to a checkout")
    python = _find_python(checkout)
    trial = subprocess.run([str(python), "-c", IMPORT_CHECK], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        reason = (trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"])[-1]
        raise Unavailable(f"ComfyUI at {checkout} lacks requirements in {python} ({reason}): run "
                          f"'python tests/comfy/install.py {checkout}' or set COMFYUI_PYTHON")
    return Installation(checkout, python)


def _find_python(checkout: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        if not Path(named).is_file():
            raise Unavailable(f"COMFYUI_PYTHON is {named}, which is no file: give the path of an interpreter")
        return Path(named)
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    for folder in (checkout.parent / "venv", checkout / ".venv", checkout / "venv"):
        if (folder / inside).is_file():
            return folder / inside
    return Path(sys.executable)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """One ComfyUI process as a context manager.

    Attributes:
        base: its base directory; ``models``, ``input`` and ``output`` under it may be filled and read by tests.
        address: where it answers, as ``http://127.0.0.1:PORT``.
        log_file: everything it wrote to standard output and error.

    Args:
        installation: what to run.
        base: an existing empty directory.
        pack: folder of the node pack to link in, or None for the core's nodes only.
        arguments: arguments of main.py beside those that isolate it; the default needs no GPU.
    """

    def __init__(self, installation: Installation, base: Path, pack: Path | None,
                 arguments: tuple[str, ...] = ("--cpu", "--disable-api-nodes")):
        if pack is not None and not (pack / "__init__.py").is_file():
            raise ServerError(f"{pack} is no node pack: it has no __init__.py")
        self.installation = installation
        self.base = base
        self.pack = pack
        self.arguments = arguments
        self.log_file = base / "server.log"
        self.address = ""
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._process.pid

    def resident_mb(self) -> float:
        """Resident memory of the server in MB; the test is skipped where /proc does not tell."""
        status = Path(f"/proc/{self.pid}/status")
        if not status.exists():
            pytest.skip("no /proc to read the server's memory from")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) / 1000

    def saved_path(self, file: dict[str, str]) -> Path:
        """Where an output file that a node showed (see ``Run.saved_files``) lies."""
        return self.output_folder / file["subfolder"] / file["filename"]

    @property
    def input_folder(self) -> Path:
        return self.base / "input"

    @property
    def output_folder(self) -> Path:
        return self.base / "output"

    def models_folder(self, kind: str) -> Path:
        """Where model files of ``kind`` (a ComfyUI folder name such as ``loras``) go; made if absent."""
        folder = self.base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self) -> str:
        """What the server has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def __enter__(self) -> "ComfyServer":
        self._make_folders()
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = [str(self.installation.python), str(LAUNCHER), "--while-stdin-is-open",
                   str(self.installation.checkout / "main.py"), *self.arguments,
                   "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch",
                   "--base-directory", str(self.base),
                   "--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
                   # Packs come in through a checkout's extra_model_paths.yaml too.
                   "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
        # Variables of the test run that would put its own packages before the server's.
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self.base, env=environment, stdin=subprocess.PIPE,
                                             stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _make_folders(self) -> None:
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for kind in MODEL_FOLDERS:
            self.models_folder(kind)
        if self.pack is not None:
            (self.base / "custom_nodes" / PACK_NAME).symlink_to(self.pack.resolve(), target_is_directory=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise ServerError(f"ComfyUI ended with exit status {status} before it was ready:\n{self.log()[-4000:]}")
            if ComfyClient(self.address).answers():
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {START_TIMEOUT_S:.0f} s:\n{self.log()[-4000:]}")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process = None


def wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
