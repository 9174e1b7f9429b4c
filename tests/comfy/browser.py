"""ComfyUI's page in a real browser, for tests of what only the user interface does: widgets, saved workflows, previews.

Needs PyPI's ``playwright`` and an installed Chromium or Chrome; playwright's own browser download is not used.
Reference: https://playwright.dev/python/docs/api/class-page
"""
import os
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.comfy.client import ComfyClient
from tests.comfy.server import Unavailable

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")
# A first visit otherwise opens the template browser over the graph.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}


def find_browser() -> str:
    """Path of a Chromium: ``CHROMIUM_PATH`` if set, else the first on the search path.

    Raises:
        Unavailable: there is none.
    """
    named = os.environ.get("CHROMIUM_PATH")
    found = named if named and Path(named).is_file() else next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if found is None:
        raise Unavailable("no Chromium or Chrome found: install one (Debian: apt-get install chromium) or set "
                          "CHROMIUM_PATH")
    return found


class ComfyPage:
    """The open page.

    Attributes:
        page: playwright's page, for whatever is not covered here.
        errors: texts of uncaught JavaScript exceptions and of errors on the console since the page was ready; what the
            page does before that, it does on its own (some of its versions raise there), and files that it asks
            for in vain (a user's style sheet) are no errors.
        preview_frames: sizes in bytes of the binary messages (live previews) that the server has sent.
    """

    def __init__(self, page, address: str):
        self.page = page
        self.address = address
        self.errors: list[str] = []
        self.preview_frames: list[int] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._note_message)
        page.on("websocket", lambda socket: socket.on("framereceived", self._note_frame))

    def _note_message(self, message) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def _note_frame(self, payload: str | bytes) -> None:
        if isinstance(payload, bytes):
            self.preview_frames.append(len(payload))

    def open(self, timeout_s: float = 60.0) -> None:
        """Load the page and wait until the graph and the node types are there."""
        self.page.goto(self.address)
        self.page.wait_for_function(
            "() => window.app?.graph && window.app?.canvas && window.LiteGraph?.registered_node_types?.KSampler",
            timeout=timeout_s * 1000)
        self.page.wait_for_load_state("networkidle")
        self.errors.clear()

    def node_types(self) -> set[str]:
        """Ids of all nodes that the page can add."""
        return set(self.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)"))

    def load(self, workflow: dict) -> None:
        """Open a workflow in the UI format, as dropping its file on the page does."""
        self.page.evaluate("async workflow => { await window.app.loadGraphData(workflow) }", workflow)

    def prompt(self) -> dict[str, dict]:
        """The loaded graph as the page would send it: node id -> {"class_type", "inputs", "_meta"}."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def workflow(self) -> dict:
        """The loaded graph in the UI format, as the page would save it."""
        return self.page.evaluate("() => window.app.graph.serialize()")

    def queue(self) -> str:
        """Press "Run"; returns the id of the prompt.

        Raises:
            RuntimeError: the server refused it.
        """
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt") and
                                       answer.request.method == "POST") as waiting:
            self.page.evaluate("() => { window.app.queuePrompt(0) }")
        answer = waiting.value.json()
        if "prompt_id" not in answer:
            raise RuntimeError(f"the server refused the prompt: {answer}")
        return answer["prompt_id"]

    def wait_for_media(self, kind: str, timeout_s: float = 30.0) -> None:
        """Wait until a node shows a loaded picture (``kind`` "image", also a live preview) or video ("video")."""
        self.page.wait_for_function(
            """kind => window.app.graph.nodes.some(node => kind === 'video'
                ? [...(node.videoContainer?.querySelectorAll('video') ?? [])].some(video => video.videoWidth > 0)
                : (node.imgs ?? []).some(image => image.naturalWidth > 0))""", arg=kind, timeout=timeout_s * 1000)

    def open_saved(self, file: dict[str, str]) -> None:
        """Open the workflow inside a saved file (an entry of ``Run.saved_files``), as dropping it on the page does."""
        query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
        self.page.evaluate(
            """async ([query, name]) => {
                const content = await (await fetch('/view?' + query)).blob();
                await window.app.handleFile(new File([content], name, {type: content.type}));
            }""", [query, file["filename"]])

    def screenshot(self, file: Path) -> None:
        """Write a PNG of the page as it is, with the whole graph in view."""
        self.page.evaluate("() => { window.app.canvas.ds.reset(); window.app.canvas.fitViewToSelectionAnimated?.(); "
                           "window.app.graph.setDirtyCanvas(true, true) }")
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=str(file))


@contextmanager
def open_page(address: str, width: int = 1600, height: int = 1000) -> Iterator[ComfyPage]:
    """The page of the server at ``address`` in a new browser, which is closed at the end.

    Raises:
        Unavailable: no playwright, or no browser.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise Unavailable("no playwright: install it (pip install playwright) to run the tests in a browser") from None
    executable = find_browser()
    client = ComfyClient(address)
    for name, value in SETTINGS.items():
        client.set_setting(name, value)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        try:
            page = ComfyPage(browser.new_page(viewport={"width": width, "height": height}), address)
            page.open()
            yield page
        finally:
            browser.close()
