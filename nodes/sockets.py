"""The types that travel between PrefGen's nodes."""

from dataclasses import fields

from comfy_api.latest import io

CATEGORY = "PrefGen"

MLLM = io.Custom("PREFGEN_MLLM")
Preference = io.Custom("PREFGEN_PREFERENCE")
User = io.Custom("PREFGEN_USER")


def advanced(entry: io.Input) -> io.Input:
    """An input that newer front ends fold away and older ones show. ComfyUI 0.3.75 has no keyword for it."""
    entry.extra_dict = {**entry.extra_dict, "advanced": True}
    return entry


def searched(*words: str) -> dict:
    """What else a node is searched by, for its schema. ComfyUI 0.3.75's takes no such words."""
    return _where_known(search_aliases=list(words))


def shows_something() -> dict:
    """For the schema of a node with a preview of its own: newer ComfyUI then shows it again after the page was loaded
    anew, while the node's result is cached."""
    return _where_known(has_intermediate_output=True)


def _where_known(**settings) -> dict:
    """The settings that this ComfyUI's schema has."""
    return {name: value for name, value in settings.items() if name in {field.name for field in fields(io.Schema)}}
