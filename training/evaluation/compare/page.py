"""compare.md: the table of methods, in the shape of the paper's Table 1."""

from __future__ import annotations

from ..scores import Csd
from ..tables import estimate, table
from .score import MEASURES


def page(result: dict, csd: bool) -> str:
    """The page of a finished comparison. csd: whether CSD was asked, whose authors want something said."""
    rows = result["rows"].values()
    measures = [name for name in MEASURES if any(name in row for row in rows)]
    methods = table(
        ["method", *measures, "seconds a picture"],
        [
            [row["label"], *(figures(row.get(name)) for name in measures), f"{row['seconds_a_picture']:.2f}"]
            for row in rows
        ],
    )
    legend = []
    for name in measures:
        words, more_is_better = MEASURES[name]
        legend.append(f"- `{name}`: {words}; {'more' if more_is_better else 'less'} is better.")
    if csd:
        legend.append(f"- {Csd.DISCLAIMER}")
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
            methods,
            "",
            *legend,
            "",
            "## Taste and leak over no preference",
            "",
            "Unrelated pictures look alike already, so what counts is the difference from the row without a "
            "preference: how much nearer the pictures came to liked ones that the method never saw, how much nearer to "
            "one that it saw, and how much of the first came for the second.",
            "",
            leak_table(result["rows"]),
            "",
        ]
    )


def leak_table(rows: dict[str, dict]) -> str:
    """Taste and leak of every row over the one without a preference."""
    taste_name = "csd" if any("csd" in row for row in rows.values()) else "clip_i"
    lines = []
    for row in rows.values():
        if taste_name in row and "leak" in row:
            taste = row[taste_name]["minus_null"]
            leak = row["leak"]["minus_null"]
            ratio = f"{taste['mean'] / leak['mean']:.2f}" if leak["mean"] else "-"
            lines.append([row["label"], estimate(taste), estimate(leak), ratio])
    return table(["method", f"taste ({taste_name})", "leak", "taste a leak"], lines)


def figures(entry: dict | None) -> str:
    """ "0.612 (0.551 to 0.673)<br>-0.031 (-0.083 to 0.021)" """
    return "-" if entry is None else f"{estimate(entry)}<br>{estimate(entry['minus_prefgen'])}"
