"""What each decoder layer knows of the user, as tables and as a figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .tables import estimate, table

MEASURES = {
    "same_user": "same user's history nearest",
    "named": "user named by a linear probe",
    "liked_first": "liked above disliked",
    "traits": "liked attributes, precision at k",
}
ROW_LABELS = {
    "colour": "colour alone",
    "embedding": "embedding (input of the decoder)",
    "compared": "embedding, asked pictures compared by hand",
    "e_sem": "**e_sem**, its layers joined",
    "e_core": "**e_core**",
}


def page(figures: dict) -> str:
    """The figures of `probe_layers` as Markdown tables."""
    rows = figures["table"]
    names = [name for name in MEASURES if name in rows["colour"]]
    head = [MEASURES[name] for name in names]
    readings = [[label_of(row), *(estimate(entry[name]) for name in names)] for row, entry in rows.items()]
    shuffled = [estimate(rows["e_core"][f"{name}_shuffled"]) for name in names]
    # Only `liked_first` asks about a picture beside a history, so that there can be another user's.
    stranger = [estimate(rows["e_sem"]["liked_first_stranger"]) if name == "liked_first" else "" for name in names]
    readings += [["shuffled labels (e_core's layer)", *shuffled], ["another user's history (e_sem)", *stranger]]
    differences = [
        [" less ".join(map(label_of, pair.split(" - "))), *(estimate(entry[name], signed=True) for name in names)]
        for pair, entry in figures["differences"].items()
    ]
    doubts = "".join(f"**{sentence}** " for sentence in figures.get("unbeaten", ()))
    if doubts:
        doubts += "The chosen layers mean little where that is so.\n\n"
    users = figures["users"]
    return f"""{doubts}e_sem: layers {figures["sem_layers"]} joined, e_core: layer {figures["core_layer"]} of \
{len(decoder_layers(rows))} (0 is the first decoder layer). Chosen on {users["choose"]} users, the figures below are \
of {users["report"]} others of the test split; the probes of the last two columns were fitted on {users["fit"]} more. \
{figures["histories"]} histories a user. 95 % intervals, bootstrap over users.

{table(["read", *head], readings)}

Differences, paired by user:

{table(["", *head], differences)}
"""


def label_of(row: str) -> str:
    return ROW_LABELS.get(row, f"layer {row}")


def decoder_layers(rows: dict) -> list[str]:
    """The rows that are decoder layers, lowest first; the others are controls and the chosen ones."""
    return [row for row in rows if row.isdecimal()]


def draw(figures: dict, path: Path) -> None:
    """One panel a measure: every layer with its interval, and the controls."""
    from matplotlib.figure import Figure

    rows = figures["table"]
    layers = decoder_layers(rows)
    names = [name for name in MEASURES if name in rows["colour"]]
    sheet = Figure(figsize=(3.4 * len(names), 3.5), layout="constrained")
    axes = sheet.subplots(1, len(names), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        draw_panel(axis, rows, layers, name)
    axes[0].set_ylabel("share, unseen users")
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    sheet.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize="small")
    sheet.savefig(path, dpi=110)


def draw_panel(axis, rows: dict, layers: list[str], name: str) -> None:
    """One measure over the layers, on matplotlib axes."""

    def means(measure: str) -> list[float]:
        return [rows[layer][measure]["mean"] for layer in layers]

    x = list(map(int, layers))
    bounds = np.array([rows[layer][name]["ci95"] for layer in layers])
    axis.fill_between(x, bounds[:, 0], bounds[:, 1], alpha=0.2)
    axis.plot(x, means(name), "o-", label="last token")
    axis.axhline(rows["embedding"][name]["mean"], ls="-.", color="tab:green", label="embedding")
    axis.axhline(rows["colour"][name]["mean"], ls="--", color="tab:orange", label="colour alone")
    if name == "liked_first":
        compared = rows["compared"][name]["mean"]
        axis.axhline(compared, ls=(0, (1, 4)), color="tab:green", label="embedding, compared")
    axis.plot(x, means(f"{name}_shuffled"), ":", color="grey", label="shuffled labels")
    if name == "liked_first":
        axis.plot(x, means("liked_first_stranger"), ":", color="tab:red", label="another's history")
    axis.set(title=MEASURES[name], xlabel="decoder layer", ylim=(0, 1.02))
