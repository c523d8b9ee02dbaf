"""Turn a graph as the front end saves it (workflows/*.json) into the form that ComfyUI's HTTP API runs.

The browser does the same when somebody presses Queue; this is the part of it that our own graphs need.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

# Modes of a node, as the front end saves them.
MUTED = 2
BYPASSED = 4

NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def load(path: Path) -> dict:
    """Read a saved graph. Raises ValueError with one sentence if it isn't one."""
    try:
        workflow = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a saved graph: {error}.") from error
    if not isinstance(workflow, dict) or "nodes" not in workflow:
        raise ValueError(f"{path} is not a saved graph: it has no nodes.")
    return workflow


def widget_names(schema: dict) -> list[str | None]:
    """The widgets of a node in the order in which the front end saves their values, from its /object_info entry.

    None stands for the "control after generate" box that the front end puts behind a seed: a value, but no input.
    """
    names: list[str | None] = []
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            kind = spec[0]
            options = spec[1] if len(spec) > 1 else {}
            if options.get("forceInput") or not (isinstance(kind, list) or kind in WIDGET_TYPES):
                continue
            names.append(name)
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                names.append(None)
    return names


def to_api(workflow: dict, object_info: dict) -> dict:
    """The API form of a saved graph: {node id: {"class_type", "inputs", "_meta": {"title"}}}.

    Notes and muted nodes fall away, a bypassed node hands each output its first input of that type, as in the browser.
    Raises ValueError naming the node if the server doesn't know it.
    """
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTES}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def source(link_id: int | None) -> list | None:
        """[node id, output slot] that feeds a link, seen through bypassed nodes."""
        if link_id is None:
            return None
        node_id, slot = links[link_id]
        node = nodes[node_id]
        if node.get("mode", 0) == MUTED:
            return None
        if node.get("mode", 0) == BYPASSED:
            kind = node["outputs"][slot]["type"]
            entry = next((entry for entry in node["inputs"] if entry["type"] == kind), None)
            return entry and source(entry.get("link"))
        return [str(node_id), slot]

    graph = {}
    for node_id, node in nodes.items():
        if node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        schema = object_info.get(node["type"])
        if schema is None:
            raise ValueError(f"The graph uses the node {node['type']}, which this ComfyUI doesn't have.")
        values = zip(widget_names(schema), node.get("widgets_values") or [], strict=False)
        inputs = {name: value for name, value in values if name is not None}
        for entry in node.get("inputs", []):
            origin = source(entry.get("link"))
            if origin:
                inputs[entry["name"]] = origin
        title = node.get("title") or schema.get("display_name") or node["type"]
        graph[str(node_id)] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return graph


def find(graph: dict, class_type: str, title: str | None = None) -> str:
    """The id of the one node of `class_type` (and `title`) in an API graph. ValueError if there isn't exactly one."""
    matching = [
        node_id
        for node_id, node in graph.items()
        if node["class_type"] == class_type and title in (None, node["_meta"]["title"])
    ]
    if len(matching) != 1:
        named = f' titled "{title}"' if title else ""
        raise ValueError(f"The graph has {len(matching)} nodes {class_type}{named}; exactly one is needed.")
    return matching[0]


def only(graph: dict, outputs: list[str]) -> dict:
    """A copy of an API graph with the nodes `outputs` and everything that feeds them."""
    needed = set()
    waiting = list(outputs)
    while waiting:
        node_id = waiting.pop()
        if node_id not in needed:
            needed.add(node_id)
            waiting += [value[0] for value in graph[node_id]["inputs"].values() if isinstance(value, list)]
    return {node_id: copy.deepcopy(node) for node_id, node in graph.items() if node_id in needed}
