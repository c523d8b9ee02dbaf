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
    return {"search_aliases": list(words)} if "search_aliases" in {field.name for field in fields(io.Schema)} else {}
