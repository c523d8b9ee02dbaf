"""Which taste and which user a picture was painted with, written into the picture's file.

ComfyUI's savers write every entry of a run's `extra_pnginfo`, one dictionary for all nodes of the run. A node that is
answered from ComfyUI's cache never sees it: so our entry is put there when a run is queued, with what the same nodes
did when they last ran, and those that run again write it anew. Its keys are the nodes' ids in the graph that is saved
beside it, since one run may paint several pictures with different users.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass

from comfy_execution.utils import get_executing_context

from ..fusion import FusedUser
from ..lru import LeastRecentlyUsed

KEY = "prefgen"  # of extra_pnginfo, and so of a PNG's text
NODES = ("PrefGen_ApplyUserCrossAttention", "PrefGen_ApplyTaste")
DIGITS = 8  # of a checksum
RUNS = 256  # queued at once
REMEMBERED = 1024  # nodes


@dataclass(frozen=True)
class QueuedRun:
    """entries: what the run's pictures will hold, {node id: entry}. signatures: {node id: of what it depends on}."""

    entries: dict[str, dict]
    signatures: dict[str, str]


_runs: LeastRecentlyUsed = LeastRecentlyUsed(RUNS)
_entries: LeastRecentlyUsed = LeastRecentlyUsed(REMEMBERED)


def register(server) -> None:
    """Have ComfyUI's PromptServer call `on_prompt`, once."""
    if on_prompt not in server.on_prompt_handlers:
        server.add_on_prompt_handler(on_prompt)


def on_prompt(request: dict) -> dict:
    """Put our entry into the metadata of a run that is queued, if it has a node that applies a user. request: what
    POST /prompt got; returned."""
    graph = request.get("prompt")
    if not isinstance(graph, dict):
        return request
    applied = [number for number, node in graph.items() if isinstance(node, dict) and node.get("class_type") in NODES]
    extra = request.setdefault("extra_data", {})
    if not applied or not isinstance(extra, dict):
        return request
    if not isinstance(extra.get("extra_pnginfo"), dict):
        extra["extra_pnginfo"] = {}
    signatures = {str(number): signature(graph, str(number)) for number in applied}
    entries = {number: _entries[key] for number, key in signatures.items() if key in _entries}
    extra["extra_pnginfo"][KEY] = entries
    if request.get("prompt_id") is None:
        request["prompt_id"] = str(uuid.uuid4())
    _runs[str(request["prompt_id"])] = QueuedRun(entries, signatures)
    return request


def note(user: FusedUser | None, weight: float = 0.0, words: dict | None = None) -> None:
    """Write into the pictures of the present run what the node that is being executed applies: a user, the words of a
    taste, or (None) nothing."""
    context = get_executing_context()
    run = _runs[context.prompt_id] if context is not None and context.prompt_id in _runs else None
    if run is None:
        return
    # A node that gets a list runs once for each of it.
    number = f"{context.node_id}.{context.list_index}" if context.list_index else context.node_id
    entry = words if user is None else entry_of(user, weight)
    if entry is None:
        run.entries.pop(number, None)
    else:
        run.entries[number] = entry
    if number in run.signatures:
        if entry is None:
            _entries.pop(run.signatures[number], None)
        else:
            _entries[run.signatures[number]] = entry


def entry_of(user: FusedUser, weight: float) -> dict:
    """What is said of a user: its taste (where known), its own checksum, the adapter's name, and the weight."""
    entry = {"taste": user.taste} if user.taste else {}
    return entry | {"user": user.digest[:DIGITS], "adapter": user.adapter.name, "weight": weight}


def signature(graph: dict, number: str) -> str:
    """A checksum of a node of a queued graph and of all that feeds it."""
    waiting = [number]
    upstream: dict[str, dict] = {}
    while waiting:
        node_id = waiting.pop()
        node = graph.get(node_id)
        if node_id in upstream or not isinstance(node, dict):
            continue
        upstream[node_id] = {key: node.get(key) for key in ("class_type", "inputs")}
        links = [value for value in (node.get("inputs") or {}).values() if isinstance(value, list) and len(value) == 2]
        waiting += [str(value[0]) for value in links]
    return hashlib.sha256(json.dumps([number, upstream], sort_keys=True, default=str).encode()).hexdigest()
