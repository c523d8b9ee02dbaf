"""The options of Apply User Cross-Attention that an artist chooses from a list or types, as numbers: which of a UNet's
cross-attentions a user reaches and how strongly, when, and in which pictures of a batch.

A block's address is ("input" | "output" | "middle", stage, transformer), as ComfyUI counts them; artists write in8,
out1, mid, or in8.3 for one transformer of a stage. Flux has ("double" | "single", block, 0), double3 and single12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

Block = tuple[str, int, int]
Points = tuple[tuple[float, float], ...]  # (place, weight) in order of their places

PRESETS = ("all", "style", "composition")
SHORT = {"input": "in", "middle": "mid", "output": "out", "double": "double", "single": "single", "text": "text"}
# Not a block, but named among them: the text's tokens in the single blocks of Flux, which no preset reaches.
TEXT: Block = ("text", 0, 0)


def parse_block_weights(
    addresses: Sequence[Block], widths: Sequence[int], blocks: str = "all", block_weights: str = ""
) -> tuple[float, ...]:
    """The weight of every block: that of the preset `blocks`, 0 or 1, unless `block_weights` sets another one.

    widths: attention width of each block. block_weights: "name=weight" entries between commas or lines; a name is a
    stage (in8, out1, mid), one transformer of it (in8.3), a side (in, out), a block of Flux (double3, single12), all of
    its double or single blocks, or all; later entries win. Raises ValueError with one sentence.
    """
    weights = dict.fromkeys(addresses, 0.0)
    weights |= dict.fromkeys(preset_blocks(addresses, widths, blocks), 1.0)
    for name, weight in entries(block_weights, "block_weights", "in8=0.5, out1=1, mid=0"):
        named = [address for address in addresses if name.lower() in names(address)]
        if not named:
            raise ValueError(f"block_weights: this model has no block {name!r}; it has {listed(addresses)}.")
        weights |= dict.fromkeys(named, weight)
    return tuple(weights[address] for address in addresses)


def parse_weight_schedule(weight_schedule: str) -> Points:
    """(share of the sampling 0..1, weight) points, from "0=1, 0.5=0.3, 1=0"; none from an empty text. Raises ValueError
    with one sentence."""
    weights = {}
    for name, weight in entries(weight_schedule, "weight_schedule", "0=1, 0.5=0.3, 1=0"):
        share = finite_number(name)
        if share is None or not 0 <= share <= 1:
            raise ValueError(
                f"weight_schedule: {name!r} is not a share of the sampling, which goes from 0 (start) to 1 (end)."
            )
        weights[share] = weight
    return tuple(sorted(weights.items()))


def parse_item_weights(item_weights: str) -> Points:
    """(number of the item in the batch, weight) points, from "0=1, 15=0"; none from an empty text. Raises ValueError
    with one sentence."""
    weights = {}
    for name, weight in entries(item_weights, "item_weights", "0=1, 15=0"):
        if not name.isdecimal():
            raise ValueError(f"item_weights: {name!r} is not the number of a batch item; they are counted from 0.")
        weights[float(name)] = weight
    return tuple(sorted(weights.items()))


def interpolated(points: Points, place: float) -> float:
    """The weight at a place: straight lines between the points, level before the first and after the last."""
    before = [point for point in points if point[0] <= place]
    after = [point for point in points if point[0] > place]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    start, low = before[-1]
    end, high = after[0]
    return low + (high - low) * (place - start) / (end - start)


def is_zero(points: Points) -> bool:
    """Whether points give the weight 0 everywhere; none give 1."""
    return bool(points) and not any(weight for _, weight in points)


def preset_blocks(addresses: Sequence[Block], widths: Sequence[int], preset: str) -> list[Block]:
    """The blocks of a preset, chosen by the shape of the UNet. Raises ValueError with one sentence."""
    if preset not in PRESETS:
        raise ValueError(f"There is no block preset {preset!r}: choose {', '.join(PRESETS)}.")
    if preset == "all":
        return [address for address in addresses if address != TEXT]
    if any(address[0] == "double" for address in addresses):
        raise ValueError(
            f"Nobody has found which blocks of Flux are those of {preset}: choose all in blocks, or weigh single ones "
            "in block_weights, such as double0=0.5."
        )
    # InstantStyle (arXiv 2404.02733) finds style in SDXL's up_blocks.0.attentions.1 and layout in its
    # down_blocks.2.attentions.1; its script for SD1.5, whose stages have one transformer each, takes up_blocks.1 for
    # style, and down_blocks.2 with the middle for layout. So: the coarsest level with cross-attention on the way up or
    # down, of which a deep UNet gives one stage.
    level = coarsest_level(addresses, widths, "output" if preset == "style" else "input")
    if any(transformer > 0 for _, _, transformer in level):
        stages = sorted({stage for _, stage, _ in level})
        chosen = stages[:2][-1] if preset == "style" else stages[-1]
        return [address for address in level if address[1] == chosen]
    middle = [address for address in addresses if address[0] == "middle"]
    return level + middle if preset == "composition" else level


def coarsest_level(addresses: Sequence[Block], widths: Sequence[int], side: str) -> list[Block]:
    """The blocks of one side, "input" or "output", that are as wide as the widest of them."""
    width_of = {address: width for address, width in zip(addresses, widths, strict=True) if address[0] == side}
    return [address for address, width in width_of.items() if width == max(width_of.values())]


def entries(text: str, option: str, example: str) -> Iterator[tuple[str, float]]:
    """(name, weight) of every "name=weight" in what an artist typed for an option; a colon does as well. Raises
    ValueError with one sentence that shows the example."""
    for entry in re.split(r"[,;\n]", text or ""):
        if not entry.strip():
            continue
        name, _, value = (part.strip() for part in entry.replace(":", "=", 1).partition("="))
        weight = finite_number(value)
        if not name or weight is None:
            raise ValueError(f'{option}: {entry.strip()!r} is not a name and a number; write it as in "{example}".')
        yield name, weight


def finite_number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def names(address: Block) -> tuple[str, ...]:
    """Everything a block answers to."""
    side, stage, transformer = address
    short = SHORT[side]
    if side == "text":
        return (short,)
    name = short if side == "middle" else f"{short}{stage}"
    return "all", short, name, f"{name}.{transformer}"


def listed(addresses: Sequence[Block]) -> str:
    """The stages of a model as an artist writes them: "in4, in5, in7, in8, mid, out0 to out5"."""
    parts = []
    for side, short in SHORT.items():
        for stages in consecutive(sorted({address[1] for address in addresses if address[0] == side})):
            if side in ("middle", "text"):
                parts.append(short)
            elif len(stages) > 2:
                parts.append(f"{short}{stages[0]} to {short}{stages[-1]}")
            else:
                parts += [f"{short}{stage}" for stage in stages]
    return ", ".join(parts)


def consecutive(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers in order, split wherever one is missing."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
