"""A graph as the front end saves it, built node by node from what a server says of its nodes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from scripts import graph

OURS = "PrefGen_"
# What the front end shows of a graph as an App (older ones pass over it): the widgets that an artist
# changes, and the nodes whose pictures are the result.
APP_WIDGETS = {
    "PrefGen_LoadPreferenceHistory": ("history",),
    "PrefGen_ApplyTaste": ("taste", "strength"),
    "PrefGen_ApplyUserCrossAttention": ("weight",),
    "PrimitiveStringMultiline": ("value",),
    "LoadImage": ("image",),
}
APP_PROMPT = ("CLIPTextEncode", "Prompt")
APP_RESULTS = ("SaveImage",)


class Place:
    """A node on the canvas: what `Canvas.add` gives back. `place[slot]` is one of its outputs, for another's input."""

    def __init__(self, entry: dict):
        self.entry = entry

    def __getitem__(self, slot: int) -> tuple[dict, int]:
        return self.entry, slot


@dataclass
class Canvas:
    """A graph as the front end saves it. info: the server's /object_info."""

    info: dict
    nodes: list[dict] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    groups: list[dict] = field(default_factory=list)

    def add(self, kind: str, x: int, y: int, width: int, height: int, title: str = "", /, **values) -> Place:
        """A node. values: by input, what a widget holds, or an output of another node (`place[slot]`)."""
        schema = self.info[kind]
        specs = {
            name: (spec, group == "optional")
            for group in ("required", "optional")
            for name, spec in schema["input"].get(group, {}).items()
        }
        unknown = values.keys() - specs.keys()
        if unknown:
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}.")
        entry = self._node(kind, x, y, width, height, title)
        widgets = graph.widget_names(schema)
        entry["inputs"] = [_socket(name, *specs[name], name in widgets) for name in specs]
        entry["outputs"] = [
            {"name": name, "type": kind_of, "links": []}
            for name, kind_of in zip(schema["output_name"], schema["output"], strict=True)
        ]
        for name, value in values.items():
            if isinstance(value, tuple):
                self._connect(*value, entry, name)
        entry["widgets_values"] = [
            "fixed" if name is None else _value(specs[name][0], values.get(name)) for name in widgets
        ]
        pack = "prefgen" if kind.startswith(OURS) else "comfy-core"
        version = "0.1.0" if pack == "prefgen" else "0.3.75"
        entry["properties"] = {"Node name for S&R": kind, "cnr_id": pack, "ver": version}
        return Place(entry)

    def note(self, text: str) -> None:
        """A note at the top left."""
        entry = self._node("MarkdownNote", 0, 0, 370, 490, "Read me")
        entry |= {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [text]}

    def group(self, title: str, color: str, *places: Place) -> None:
        """A frame around nodes."""
        boxes = [(*place.entry["pos"], *place.entry["size"]) for place in places]
        left = min(box[0] for box in boxes) - 20
        top = min(box[1] for box in boxes) - 80
        right = max(box[0] + box[2] for box in boxes) + 20
        bottom = max(box[1] + box[3] for box in boxes) + 20
        bounding = [left, top, right - left, bottom - top]
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": bounding,
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )

    def saved(self, name: str) -> dict:
        """All of it, in the front end's layout; its id depends on its name alone."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"prefgen/{name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [130, 260]}, "linearData": self._app()},
            "version": 0.4,
        }

    def _app(self) -> dict:
        """The graph as an App: [node, widget] in the order in which they were drawn, and the nodes with results."""
        inputs = []
        for node in self.nodes:
            widgets = APP_WIDGETS.get(node["type"], ())
            if (node["type"], node.get("title")) == APP_PROMPT:
                widgets = ("text",)
            inputs += [[node["id"], name] for name in widgets]
        return {"inputs": inputs, "outputs": [node["id"] for node in self.nodes if node["type"] in APP_RESULTS]}

    def _node(self, kind: str, x: int, y: int, width: int, height: int, title: str) -> dict:
        number = len(self.nodes) + 1
        entry = {"id": number, "type": kind, "pos": [x, y], "size": [width, height], "flags": {}, "order": number - 1}
        entry |= {"mode": 0, **({"title": title} if title else {})}
        self.nodes.append(entry)
        return entry

    def _connect(self, origin: dict, slot: int, target: dict, name: str) -> None:
        number = len(self.links) + 1
        index = next(i for i, entry in enumerate(target["inputs"]) if entry["name"] == name)
        origin["outputs"][slot]["links"].append(number)
        target["inputs"][index]["link"] = number
        kind = origin["outputs"][slot]["type"]
        self.links.append([number, origin["id"], slot, target["id"], index, kind])


def _socket(name: str, spec: list, optional: bool, widget: bool) -> dict:
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    return {
        "name": name,
        "type": kind,
        **({"shape": 7} if optional else {}),
        **({"widget": {"name": name}} if widget else {}),
        "link": None,
    }


def _value(spec: list, value):
    """What a widget holds: what it was given, else its default, else the first of its options."""
    if value is not None and not isinstance(value, tuple):
        return value
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    return choices[0] if choices else ""
