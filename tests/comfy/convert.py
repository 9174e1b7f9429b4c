"""Turn a workflow as the browser saves it into a prompt as the server takes it, without a browser.

A saved workflow stores widget values by position, in the order in which the node declares its inputs (required ones
first); a prompt names them. So a test that runs the workflows shipped with the pack through here notices a widget that
was inserted or moved. Covered is what such workflows need: links, widgets, reroutes and notes. For the rest
(subgraphs, muted or bypassed nodes, primitive nodes) the browser's own conversion exists, see browser.py.

Reference: https://docs.comfy.org/specs/workflow_json_0.4
"""
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")
UPLOADS = ("image_upload", "video_upload", "audio_upload")
SEEDS = ("seed", "noise_seed")


def to_prompt(workflow: dict, object_info: dict[str, dict]) -> dict[str, dict]:
    """Convert a workflow of format 0.4.

    Args:
        workflow: {"nodes": [...], "links": [[id, from node, from slot, to node, to slot, type], ...]}.
        object_info: the server's description of its nodes.

    Returns:
        node id -> {"class_type", "inputs"}.

    Raises:
        ValueError: a node that the server does not know, or something that this converter does not cover.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node_id, node in nodes.items():
        kind = node["type"]
        if kind in NOTES or kind == "Reroute":
            continue
        if kind not in object_info:
            raise ValueError(f"node {node_id} is a {kind}, which the server does not know: is its pack loaded, or is "
                             "it a subgraph or primitive node, which only the browser converts?")
        if node.get("mode", 0) != 0:
            raise ValueError(f"node {node_id} ({kind}) is muted or bypassed (mode {node['mode']}): only the browser "
                             "converts such a workflow")
        inputs = _widget_inputs(node, object_info[kind])
        for socket in node.get("inputs", ()):
            if socket.get("link") is not None:
                inputs[socket["name"]] = _source(links[socket["link"]], nodes, links)
        prompt[str(node_id)] = {"class_type": kind, "inputs": inputs}
    return prompt


def widgets(description: dict) -> list[tuple[str, dict, int]]:
    """The widgets of a node in the order of ``widgets_values``: (input name, options, values that follow it unused)."""
    found = []
    for group in ("required", "optional"):
        for name, declared in description["input"].get(group, {}).items():
            kind, options = declared[0], (declared[1] if len(declared) > 1 else {})
            if (kind not in WIDGET_TYPES and not isinstance(kind, list)) or options.get("forceInput"):
                continue
            has_control = options.get("control_after_generate", kind == "INT" and name in SEEDS)
            unused = int(bool(has_control)) + int(any(options.get(upload) for upload in UPLOADS))
            found.append((name, {**options, "type": kind}, unused))
    return found


def _widget_inputs(node: dict, description: dict) -> dict:
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    inputs, position = {}, 0
    for name, options, unused in widgets(description):
        inputs[name] = values[position] if position < len(values) else _default(options)
        position += 1 + unused
    if len(values) > position:
        raise ValueError(f"node {node['id']} ({node['type']}) stores {len(values)} widget values, but the node has "
                         f"{position} now: widgets may only be appended")
    return inputs


def _default(options: dict):
    """What the browser shows in a widget that a workflow has no value for."""
    if "default" in options:
        return options["default"]
    choices = options["type"] if isinstance(options["type"], list) else options.get("options", ())
    return choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(options["type"])


def _source(link: list, nodes: dict[int, dict], links: dict[int, list]) -> list:
    """[node id, output slot] that a link comes from, beyond reroutes."""
    _, origin, slot = link[:3]
    while nodes[origin]["type"] == "Reroute":
        before = nodes[origin]["inputs"][0]["link"]
        if before is None:
            raise ValueError(f"reroute {origin} is connected to nothing")
        _, origin, slot = links[before][:3]
    return [str(origin), slot]
