"""Which of a UNet's cross-attentions a user reaches, and how strongly: presets, and weights as an artist types them.

A block is ("input" | "output" | "middle", stage, transformer), as ComfyUI counts them; artists write in8, out1, mid, or
in8.3 for one transformer of a stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

Block = tuple[str, int, int]

PRESETS = ("all", "style", "composition")
SHORT = {"input": "in", "output": "out", "middle": "mid"}
EXAMPLE = '"in8=0.5, out1=1, mid=0"'


def block_weights(
    blocks: Sequence[Block], widths: Sequence[int], preset: str = "all", text: str = ""
) -> tuple[float, ...]:
    """The weight of every block: that of the preset, 0 or 1, unless `text` sets another one.

    widths: attention width of each block. text: "name=weight" entries between commas or lines; a name is a stage (in8,
    out1, mid), one transformer of it (in8.3), a side (in, out) or all; later entries win. Raises ValueError with one
    sentence.
    """
    weights = dict.fromkeys(blocks, 0.0) | dict.fromkeys(preset_blocks(blocks, widths, preset), 1.0)
    for entry, name, weight in entries(text, "block_weights", EXAMPLE):
        meant = [block for block in blocks if name in names(block)]
        if not meant:
            raise ValueError(f"block_weights: this model has no block {entry!r}; it has {listed(blocks)}.")
        weights |= dict.fromkeys(meant, weight)
    return tuple(weights[block] for block in blocks)


def preset_blocks(blocks: Sequence[Block], widths: Sequence[int], preset: str) -> list[Block]:
    """The blocks of a preset, found by the shape of the UNet.

    InstantStyle (arXiv 2404.02733) found style in SDXL's up_blocks.0.attentions.1 and layout in its
    down_blocks.2.attentions.1; its script for SD1.5, whose stages have one transformer each, takes up_blocks.1 for
    style, and down_blocks.2 with the middle for layout. So: the coarsest level with cross-attention on the way up or
    down, of which a deep UNet gives one stage.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no block preset {preset!r}: choose {', '.join(PRESETS)}.")
    if preset == "all":
        return list(blocks)
    side = "output" if preset == "style" else "input"
    width_of = dict(zip(blocks, widths, strict=True))
    coarsest = max((width_of[block] for block in blocks if block[0] == side), default=0)
    stages = sorted({block[1] for block in blocks if block[0] == side and width_of[block] == coarsest})
    deep = any(block[2] for block in blocks if block[0] == side and block[1] in stages)
    if deep:
        stages = stages[-1:] if preset == "composition" else stages[1:2] or stages
    middle = preset == "composition" and not deep
    return [b for b in blocks if (b[0] == side and b[1] in stages) or (middle and b[0] == "middle")]


def schedule(text: str) -> tuple[tuple[float, float], ...]:
    """(share of the sampling 0..1, weight) points in order, from "0=1, 0.5=0.3, 1=0"; none from an empty text. Raises
    ValueError with one sentence."""
    points = {}
    for entry, share, weight in entries(text, "weight_schedule", '"0=1, 0.5=0.3, 1=0"'):
        at = number(share)
        if at is None or not 0 <= at <= 1:
            raise ValueError(f"weight_schedule: {entry!r} is no share of the sampling; it goes from 0 to 1.")
        points[at] = weight
    return tuple(sorted(points.items()))


def item_weights(text: str) -> tuple[tuple[float, float], ...]:
    """(number of the item in the batch, weight) points in order, from "0=1, 15=0"; none from an empty text. Raises
    ValueError with one sentence."""
    points = {}
    for entry, item, weight in entries(text, "item_weights", '"0=1, 15=0"'):
        if not item.isdecimal():
            raise ValueError(f"item_weights: {entry!r} is no item of a batch; they are counted from 0.")
        points[float(item)] = weight
    return tuple(sorted(points.items()))


def interpolated(points: Sequence[tuple[float, float]], place: float) -> float:
    """The weight at a place: straight lines between the points, level before the first and after the last."""
    before = [point for point in points if point[0] <= place]
    after = [point for point in points if point[0] > place]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (start, low), (end, high) = before[-1], after[0]
    return low + (high - low) * (place - start) / (end - start)


def entries(text: str, what: str, example: str):
    """(name as typed, name in lower case, weight) of every "name=weight" in a text; a colon does as well."""
    for entry in re.split(r"[,;\n]", text or ""):
        if not entry.strip():
            continue
        name, _, value = (part.strip() for part in re.sub(":", "=", entry, count=1).partition("="))
        weight = number(value)
        if not name or weight is None:
            raise ValueError(f"{what}: {entry.strip()!r} is not a name and a number; write it as in {example}.")
        yield name, name.lower(), weight


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def names(block: Block) -> tuple[str, ...]:
    """Everything a block answers to."""
    kind, stage, transformer = block
    short = SHORT[kind]
    name = short if kind == "middle" else f"{short}{stage}"
    return "all", short, name, f"{name}.{transformer}"


def listed(blocks: Sequence[Block]) -> str:
    """The stages of a model as an artist writes them: "in4, in5, in7, in8, mid, out0 to out5"."""
    found = []
    for kind, short in (("input", "in"), ("middle", "mid"), ("output", "out")):
        stages = sorted({block[1] for block in blocks if block[0] == kind})
        for run in _runs(stages):
            if kind == "middle":
                found.append(short)
            elif len(run) > 2:
                found.append(f"{short}{run[0]} to {short}{run[-1]}")
            else:
                found += [f"{short}{stage}" for stage in run]
    return ", ".join(found)


def _runs(stages: Sequence[int]) -> list[list[int]]:
    """Numbers split wherever one is missing."""
    runs: list[list[int]] = []
    for stage in stages:
        if runs and stage == runs[-1][-1] + 1:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return runs
