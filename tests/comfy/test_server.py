"""The pack in a running ComfyUI: it loads cleanly and quickly, and the server and the page offer all its nodes."""
import re

from tests.comfy.server import PACK_NAME

IMPORT_SECONDS = 0.5


def pack_lines(log: str) -> list[str]:
    """The lines of a server's log that name the pack's folder."""
    return [line for line in log.splitlines() if f"custom_nodes/{PACK_NAME}" in line.replace("\\", "/")]


def test_server_reports_the_pack_as_imported(comfy_server):
    """Promise: ComfyUI lists the pack among its imports and did not fail in it."""
    lines = pack_lines(comfy_server.log())
    assert any(re.search(r"\d seconds: ", line) for line in lines), comfy_server.log()
    assert not [line for line in lines if "IMPORT FAILED" in line or "Cannot import" in line or "Skip " in line]


def test_server_log_has_no_traceback(comfy_server, client):
    """Promise: neither the start nor describing the nodes raises, and pyproject.toml can be read."""
    before = comfy_server.log()
    client.object_info()
    # Prompts of other tests that are meant to fail leave their own tracebacks.
    log = before.partition("got prompt")[0] + comfy_server.log()[len(before):]
    assert "Traceback (most recent call last)" not in log, log
    assert "An error occurred while retrieving information" not in log, log
    assert "Unable to parse pyproject.toml" not in log, log


def test_import_says_nothing(pack_import):
    """Promise: importing the pack logs no warning, raises no Python warning and starts no CUDA."""
    assert [line for line in pack_import["log"] if line[0] not in ("DEBUG", "INFO")] == []
    assert pack_import["cuda_started"] is False


def test_import_is_quick(pack_import):
    """Promise: the pack adds less than half a second of processor time to ComfyUI's start."""
    assert pack_import["seconds"] < IMPORT_SECONDS


def test_all_nodes_are_offered(pack_import, client):
    """Promise: every node of the pack is described by the server, and by no other module's node of the same id."""
    offered = {name for name, node in client.object_info().items()
               if node["python_module"] == f"custom_nodes.{PACK_NAME}"}
    assert pack_import["nodes"], "the pack declares no node"
    assert offered == set(pack_import["nodes"])


def test_all_nodes_are_in_the_page(pack_import, comfy_page):
    """Promise: the page knows every node of the pack, and shows no error."""
    assert set(pack_import["nodes"]) <= comfy_page.node_types()
    assert comfy_page.errors == []
