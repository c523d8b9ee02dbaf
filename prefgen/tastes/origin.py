"""What a picture's file says of itself: prompt, seed and model of what made it, and how many stars somebody gave it.

Read from the metadata alone, bounded, and never trusted: all of it is text that a stranger may have written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from ..files import whole_letters

MAX_TEXT = 1 << 20  # characters of metadata that are looked at
MAX_PROMPT = 4000
# The stars of XMP (Adobe's xmp:Rating): -1 is rejected, 0 is none.
RATING = re.compile(rb"xmp:Rating\s*(?:=\s*[\"']|>)\s*(-?\d+(?:\.\d+)?)")
LIKED_STARS, DISLIKED_STARS = 4, 1
SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True)
class Origin:
    """What a picture was made with; "" and None where it doesn't say."""

    prompt: str = ""
    seed: int | None = None
    model: str = ""


def origin_of(path: Path) -> Origin:
    """The origin of a picture's file, as ComfyUI (PNG text, EXIF of WebP) or A1111 (`parameters`) write it."""
    try:
        with Image.open(path) as image:
            texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
            exif = image.getexif()
            # ComfyUI's animated WebP: "prompt:{...}" in the tag Model, "workflow:{...}" in Make.
            for tag in (ExifTags.Base.Model, ExifTags.Base.Make, ExifTags.Base.ImageDescription):
                key, _, value = str(exif.get(tag, "")).partition(":")
                if key in ("prompt", "workflow"):
                    texts.setdefault(key, value)
    except Exception:  # noqa: BLE001  Pillow raises nearly anything on odd metadata, and nothing depends on it
        return Origin()
    if "prompt" in texts:
        return of_graph(texts["prompt"])
    if "parameters" in texts:
        return of_parameters(texts["parameters"])
    return Origin()


def of_graph(text: str) -> Origin:
    """The origin in a graph of ComfyUI's API format: the sampler, and what its inputs lead to."""
    try:
        graph = json.loads(text) if len(text) <= MAX_TEXT else None
    except (ValueError, RecursionError):
        return Origin()
    if not isinstance(graph, dict):
        return Origin()
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict)}
    sampler = next((n for n in nodes.values() if "positive" in _inputs(n) and _seed(n) is not None), None)
    if sampler is None:
        return Origin()
    prompts = (_text(nodes, node) for node in _upstream(nodes, _inputs(sampler)["positive"]))
    models = (_model(node) for node in _upstream(nodes, _inputs(sampler).get("model")))
    prompt = next(filter(None, prompts), "")
    model = next(filter(None, models), "")
    return Origin(one_line(prompt), _seed(sampler), one_line(model)[:200])


def _text(nodes: dict[str, dict], node: dict) -> str:
    """The text of a node that encodes one; where it comes from another node, the first text on the way there."""
    text = _inputs(node).get("text")
    if isinstance(text, list):
        values = (value for up in _upstream(nodes, text) for value in _inputs(up).values())
        text = next((value for value in values if isinstance(value, str)), "")
    return text if isinstance(text, str) else ""


def _model(node: dict) -> str:
    """The file that a node loads a model from, "" for any other node."""
    names = (_inputs(node).get(key) for key in ("ckpt_name", "unet_name"))
    return next((name for name in names if isinstance(name, str)), "")


def of_parameters(text: str) -> Origin:
    """The origin in the text that A1111 and its kin write: the prompt, then "Negative prompt:", then "Steps: ..."."""
    text = text[:MAX_TEXT]
    prompt = re.split(r"\n(?:Negative prompt:|Steps:)", text, maxsplit=1)[0]
    seed = re.search(r"\bSeed: (\d{1,20})\b", text)
    model = re.search(r"\bModel: ([^,\n]{1,200})", text)
    return Origin(one_line(prompt), int(seed[1]) if seed else None, model[1].strip() if model else "")


def one_line(text: str) -> str:
    """Text on one line, within MAX_PROMPT characters, "?" for half a letter (JSON may hold one, no file can)."""
    return " ".join(whole_letters(text).split())[:MAX_PROMPT]


def _inputs(node: dict) -> dict:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _seed(node: dict) -> int | None:
    for key in ("seed", "noise_seed"):
        value = _inputs(node).get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _upstream(nodes: dict[str, dict], link: object) -> list[dict]:
    """The nodes that a link leads to, nearest first."""
    nearest: list[dict] = []
    waiting = [link]
    seen: set[str] = set()
    while waiting and len(seen) < 1000:
        link = waiting.pop(0)
        if not (isinstance(link, list) and len(link) == 2) or str(link[0]) in seen or str(link[0]) not in nodes:
            continue
        seen.add(str(link[0]))
        node = nodes[str(link[0])]
        nearest.append(node)
        waiting += list(_inputs(node).values())
    return nearest


def stars_of(path: Path) -> int | None:
    """How many stars a picture has: in the sidecar beside it (photo.xmp or photo.jpg.xmp), else in its own XMP."""
    for sidecar in (path.with_suffix(".xmp"), path.with_name(f"{path.name}.xmp")):
        if sidecar.is_file():
            with open(sidecar, "rb") as file:
                stars = _rating(file.read(SIDECAR_BYTES))
            if stars is not None:
                return stars
    try:
        with Image.open(path) as image:
            packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    except Exception:  # noqa: BLE001  as in origin_of
        return None
    return _rating(packet.encode() if isinstance(packet, str) else bytes(packet))


def _rating(packet: bytes) -> int | None:
    match = RATING.search(packet)
    # Of any number of digits.
    return round(min(max(float(match[1]), -1), 5)) if match else None


def verdict_of_stars(stars: int | None) -> str:
    """ "liked" for 4 and 5 stars, "disliked" for 1 and for rejected, else ""."""
    if stars is None or stars == 0:
        return ""
    if stars >= LIKED_STARS:
        return "liked"
    return "disliked" if stars <= DISLIKED_STARS else ""
