"""compare.md: the table of methods, in the shape of the paper's Table 1."""

from __future__ import annotations

from ..scores import Csd
from .score import MEASURES


def page(result: dict, csd: bool) -> str:
    """The page of a finished comparison. csd: whether CSD was asked, whose authors want something said."""
    rows = result["rows"]
    shown = [name for name in MEASURES if any(name in row for row in rows.values())]
    head = ["method", *shown, "seconds a picture"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows.values():
        cells = [row["label"], *(cell(row.get(name)) for name in shown), f"{row['seconds_a_picture']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    legend = [
        f"- `{name}`: {MEASURES[name][0]}; {'more' if MEASURES[name][1] else 'less'} is better." for name in shown
    ]
    base = result["base"]
    return "\n".join(
        [
            f"# Methods on {base['family']}, {base['pixels']} px",
            "",
            f"`{result['command']}`",
            "",
            f"{len(result['users'])} held-out users, {result['prompts']} held-out prompts each, "
            f"{result['seeds']} seeds: {result['pictures']} pictures a row. Means over users, 95 % intervals from "
            "resampling users; below them the difference from PrefGen.",
            "",
            *lines,
            "",
            *legend,
            *([f"- {Csd.DISCLAIMER}"] if csd else []),
            "",
        ]
    )


def cell(entry: dict | None) -> str:
    """ "0.61 [0.55, 0.67]<br>-0.03 [-0.08, 0.02]" """
    if entry is None:
        return "-"
    apart = entry["minus_prefgen"]
    return "<br>".join(f"{e['mean']:.3f} [{e['ci95'][0]:.3f}, {e['ci95'][1]:.3f}]" for e in (entry, apart))
