"""A client of ComfyUI's HTTP interface, in the standard library.

Reference: https://docs.comfy.org/development/comfyui-server/comms_routes
"""
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1
# Straight to the server, whatever proxy the environment names.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PromptRejected(ValueError):
    """The server did not accept a prompt.

    Attributes:
        error: the server's ``error`` object (``type``, ``message``, ``details``).
        node_errors: node id -> {"class_type", "errors": [{"type", "message", "details"}]}.
    """

    def __init__(self, error: dict, node_errors: dict):
        details = [f"node {node} ({found['class_type']}): {one['message']}: {one['details']}"
                   for node, found in node_errors.items() for one in found["errors"]]
        super().__init__("\n".join([f"{error.get('message')}: {error.get('details')}", *details]))
        self.error = error
        self.node_errors = node_errors


@dataclass(frozen=True)
class Run:
    """How a prompt ended.

    Attributes:
        prompt_id: the server's id of the run.
        status: ``success`` or ``error`` (an interrupted run is an ``error`` to ComfyUI too, see ``interrupted``).
        messages: the run's events in order, as (name, data).
        outputs: node id -> what the node gave the user interface.
    """

    prompt_id: str
    status: str
    messages: tuple[tuple[str, dict], ...]
    outputs: dict[str, dict]

    def event(self, name: str) -> dict | None:
        """Data of the last event ``name``, None if there was none."""
        found = [data for event, data in self.messages if event == name]
        return found[-1] if found else None

    @property
    def interrupted(self) -> bool:
        return self.event("execution_interrupted") is not None

    @property
    def cached_nodes(self) -> tuple[str, ...]:
        """Ids of the nodes whose earlier results were used."""
        return tuple((self.event("execution_cached") or {}).get("nodes", ()))

    @property
    def error(self) -> str:
        """Text of the exception that ended the run, empty if none did."""
        return (self.event("execution_error") or {}).get("exception_message", "").strip()

    @property
    def seconds(self) -> float:
        """From the start of the execution to its end."""
        stamps = [data["timestamp"] for _, data in self.messages if "timestamp" in data]
        return (max(stamps) - min(stamps)) / 1000

    def saved_files(self) -> list[dict[str, str]]:
        """All files that nodes showed: {"filename", "subfolder", "type"}, in the order of the node ids."""
        return [file for node in sorted(self.outputs) for shown in self.outputs[node].values()
                for file in shown if isinstance(file, dict) and "filename" in file]


class ComfyClient:
    """Calls of one server; ``address`` is ``http://host:port``."""

    def __init__(self, address: str):
        self.address = address

    def _call(self, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.address + path, data=data, headers=headers)
        with OPENER.open(request, timeout=60) as answer:
            return answer.read()

    def _get(self, path: str) -> dict:
        return json.loads(self._call(path))

    def answers(self) -> bool:
        """True if the server takes calls."""
        try:
            self._call("/system_stats")
        except OSError:
            return False
        return True

    def object_info(self, node: str | None = None) -> dict[str, dict]:
        """Descriptions of all nodes, or of one ({} if there is none of that name)."""
        return self._get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def queue(self, prompt: dict[str, dict], workflow: dict | None = None) -> str:
        """Queue a prompt in API format and return its id.

        Args:
            prompt: node id -> {"class_type", "inputs"}.
            workflow: the UI workflow that savers are to put into their files, as the browser sends it.

        Raises:
            PromptRejected: the server's validation found faults.
        """
        body: dict = {"prompt": prompt}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            answer = json.loads(self._call("/prompt", body))
        except urllib.error.HTTPError as refusal:
            answer = json.loads(refusal.read() or b"{}")
            error = answer.get("error", {"message": str(refusal)})
            raise PromptRejected(error, answer.get("node_errors", {})) from None
        if answer.get("node_errors"):
            raise PromptRejected({"message": "some outputs were rejected"}, answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 300.0) -> Run:
        """Wait until a queued prompt has ended, well or badly.

        Raises:
            TimeoutError: it has not after ``timeout_s`` seconds; it is then interrupted.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            entry = self._get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                messages = tuple((name, data) for name, data in entry["status"]["messages"])
                return Run(prompt_id, entry["status"]["status_str"], messages, entry["outputs"])
            time.sleep(POLL_S)
        self.interrupt()
        raise TimeoutError(f"prompt {prompt_id} has not ended after {timeout_s:.0f} s")

    def run(self, prompt: dict[str, dict], workflow: dict | None = None, timeout_s: float = 300.0) -> Run:
        """``queue`` and ``wait``."""
        return self.wait(self.queue(prompt, workflow), timeout_s)

    def is_running(self, prompt_id: str) -> bool:
        """True while the prompt is being executed (not while it waits)."""
        return any(entry[1] == prompt_id for entry in self._get("/queue")["queue_running"])

    def interrupt(self) -> None:
        """Ask the running prompt to stop at its next check."""
        self._call("/interrupt", {})

    def free(self, unload_models: bool = True, forget_results: bool = True) -> None:
        """Ask the server to unload models and forget cached node results.

        Its worker does so when it is idle; a prompt queued at the same moment may still run first.
        """
        self._call("/free", {"unload_models": unload_models, "free_memory": forget_results})

    def fetch(self, path: str) -> bytes:
        """Whatever the server answers to a GET of ``path``."""
        return self._call(path)

    def download(self, file: dict[str, str]) -> bytes:
        """Contents of a file from ``Run.saved_files``, as the browser gets it."""
        query = {key: file[key] for key in ("filename", "subfolder", "type")}
        return self._call("/view?" + urllib.parse.urlencode(query))

    def set_setting(self, name: str, value: object) -> None:
        """Store a setting of the user interface on the server."""
        self._call(f"/settings/{urllib.parse.quote(name)}", value)


def load_workflow(path: Path) -> dict:
    """A workflow or prompt JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
