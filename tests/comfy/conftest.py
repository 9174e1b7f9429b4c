"""Fixtures for tests in a real ComfyUI: one server for the whole run, its client, and its page in a browser.

Where no ComfyUI can be run all tests of this folder are skipped, with one reason. ``WAN_PACK_DIR`` names another pack
folder than this repository, for instance an unpacked release archive.
"""
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.browser import ComfyPage, open_page
from tests.comfy.client import ComfyClient
from tests.comfy.server import LAUNCHER, ComfyServer, Installation, Unavailable, find_installation

HERE = Path(__file__).resolve().parent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line each why tests of this folder were skipped, and how many."""
    root = terminalreporter.config.rootpath
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
                      if HERE in (root / report.fspath).parents)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} ComfyUI tests skipped: {reason}")


@pytest.fixture(scope="session")
def pack_folder() -> Path:
    """The node pack under test."""
    return Path(os.environ.get("WAN_PACK_DIR") or HERE.parent.parent).resolve()


@pytest.fixture(scope="session")
def comfyui() -> Installation:
    """The ComfyUI to test with."""
    try:
        return find_installation()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def comfy_server(comfyui: Installation, pack_folder: Path, tmp_path_factory) -> Iterator[ComfyServer]:
    """A running server with the pack, shared by all tests: leave nothing in it that another test could trip over."""
    arguments = ("--cpu", "--disable-api-nodes", "--preview-method", "latent2rgb")
    with ComfyServer(comfyui, tmp_path_factory.mktemp("comfyui"), pack_folder, arguments) as server:
        yield server


@pytest.fixture
def client(comfy_server: ComfyServer) -> ComfyClient:
    """Calls of the shared server."""
    return ComfyClient(comfy_server.address)


@pytest.fixture
def comfy_page(comfy_server: ComfyServer) -> Iterator[ComfyPage]:
    """The shared server's page in a new browser; the test is skipped where there is no browser."""
    opened = open_page(comfy_server.address)
    try:
        page = opened.__enter__()
    except Unavailable as reason:
        pytest.skip(str(reason))
    try:
        yield page
    finally:
        opened.__exit__(None, None, None)


@pytest.fixture(scope="session")
def pack_import(comfyui: Installation, pack_folder: Path, comfy_server: ComfyServer) -> dict:
    """What importing the pack in ComfyUI's environment costs and says, see probe_import.py.

    The server comes first so that Python has compiled the pack's files once.
    """
    command = [comfyui.python, LAUNCHER, HERE / "probe_import.py", comfyui.checkout, pack_folder]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.fail(f"the pack cannot be imported in ComfyUI's environment:\n{probe.stderr[-4000:]}")
    return json.loads(probe.stdout.splitlines()[-1])
