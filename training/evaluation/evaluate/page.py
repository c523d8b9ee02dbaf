"""The evidence as a page, a record and two figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from prefgen.atelier import users
from prefgen.atelier.editions import FIRST
from prefgen.files import atomic_file, write_atomic
from prefgen.pictures import read_picture

from ...common.files import save_image
from ..rows import BLIND, CONTROLS, METHODS, PARTS, ROWS, SIZES, TRAINED, WEIGHTS
from ..tables import estimate, table
from .painter import GUIDANCE, STEPS, history_of

SHEET_COLUMNS = 16
FIGURE_USERS = 6
FIGURE_HISTORY = 3
QUALITIES = {"cmmd": ".2f", "kid": ".1f", "fid": ".1f", "clip_t": ".1f", "clip_i": ".1f", "diversity": ".3f"}
SIZE_ROWS = {n: "prefgen" if n == 8 else f"size_{n}" for n in SIZES}
WEIGHT_ROWS = ["prefgen" if w == 1 else f"weight_{w:g}" for w in WEIGHTS]
SHORT = {  # over the columns of the figure
    "none": "no preference",
    "mismatched": "another user's",
    "image_only": "image-only adapter",
    "blind_image": "verdicts alone",
    "described": "MLLM's words",
    "reference_03": "reference attention",
    "prefgen": "PrefGen",
    "oracle": "likes in the prompt",
}
EXPLAINED = {  # methods that their label doesn't explain
    "image_only": """The image-only adapter is the same branch, trained on the same data for as many steps, with the
CLIP embedding as its only part (`python -m training.evaluation.ablations image_only`).""",
    "described": """The MLLM's words are its own answer to the closing question, written after the prompt; of two
tastes the first that it names.""",
    "reference_03": """Reference attention is ours after FABRIC (arXiv 2307.10159): no training, the history's
pictures are read by the UNet at every step.""",
}


def write(result: dict, pictures: dict[str, Path], people: list[users.User], out: Path) -> None:
    """methods.json, methods.md and figures/ from what was measured. pictures: {row: file of `save_pictures`}."""
    if beside_prefgen(result["rows"], SIZE_ROWS.values()):
        draw_sizes(result["rows"], out / "figures" / "history_size.png")
    draw_side_by_side(pictures, people, result["prompts"], out / "figures" / "methods.jpg")
    write_atomic(out / "methods.json", json.dumps(result, indent=1).encode() + b"\n")
    write_atomic(out / "methods.md", page(result).encode())


def page(result: dict) -> str:
    """methods.md."""
    rows = result["rows"]
    missing = [row.label for name, row in ROWS.items() if name not in rows]
    left_out = f"Not in this run: {'; '.join(missing)}.\n\n" if missing else ""
    after = f", after the first {result['skipped']}," if result["skipped"] else ","
    explanations = "\n".join(words for name, words in EXPLAINED.items() if name in rows)
    return f"""# What each part of the method brings

`{result["command"]}`: {result["users"]} users of the test split{after} {result["prompts"]} held-out prompts
each (by turns all twenty), so {result["pictures"]} pictures a row; the same noise in every row. Guidance {GUIDANCE},
{STEPS} DDIM steps, histories of 8 + 8 unless said otherwise. Intervals: 95 %, bootstrap over users; "less PrefGen" is
paired. One training seed. [methods.json](methods.json) has every figure, the seeds, the versions and the weights'
checksums.

## Methods

{alignments(rows, METHODS)}

{explanations}

{qualities(rows)}

CMMD and KID go from each user's pictures to {result["liked_drawn"]} renders that this user would like, on the same
prompts (CMMD: the atelier's CLIP, sigma 10, times 1000; KID: the judge's features, cubic kernel; both unbiased, so that
few pictures are enough and values below zero can come). FID: the judge's features of all users' pictures together, so
it says whether the crowd's pictures are like what the crowd likes, not whose they are; too few for its bias to go, but
as many in every row, and without an interval, since resampling would add to the bias. CLIP-T: picture and
prompt without taste; CLIP-I: picture and the mean liked one; 100 times the cosine. Diversity: 1 less the cosine of
CLIP embeddings between {result["seeds_each"]} seeds of one prompt, over {result["seed_users"]} users.
CPU seconds are of all threads, with the history's reading. The atelier's CLIP is small.

![The same prompt and noise, by the methods](figures/methods.jpg)

{row_sections(rows)}## Users and families apart

Alignment over a part of the families counts users who like and dislike something in it.

{group_alignments(result["groups"], [name for name in METHODS if name in rows])}

## What is not here

{left_out}CSD, PickScore and the ViPer proxy judge real bases:
[compare.md](../compare.md).
"""


def row_sections(rows: dict) -> str:
    """A section for every question that some of the rows answer."""
    return "".join(
        [
            section(
                "Controls and histories",
                "Colours only: the pixels of each history picture in random order. Swapped: liked pictures shown as "
                "disliked and the\nreverse.",
                rows,
                ["prefgen", *CONTROLS],
            ),
            section(
                "Parts of the user vector, by the artist's weights",
                "Zeroed, not retrained (training drops each part at times), so this is no ablation.",
                rows,
                ["prefgen", *PARTS],
            ),
            section(
                "Weight of the user attention",
                "As the artist sets it in Apply User Cross-Attention; every other table has 1.",
                rows,
                WEIGHT_ROWS,
                write_table=weights,
            ),
            section(
                "Trained otherwise",
                "One thing changed, all else as shipped (`python -m training.evaluation.ablations`).",
                rows,
                ["prefgen", *TRAINED],
            ),
            section(
                "From verdicts alone",
                "Trained on nothing but which pictures were liked, as people's own ratings tell: no attributes, no "
                "teacher that is\ntold the taste (`python -m training.evaluation.ablations blind_image`).",
                rows,
                ["prefgen", *BLIND],
                write_table=against_others,
            ),
            section(
                "Size of the history",
                "",
                rows,
                list(SIZE_ROWS.values()),
                "![Alignment by the number of liked and of disliked pictures](figures/history_size.png)",
            ),
        ]
    )


def beside_prefgen(rows: dict, names: Iterable[str]) -> bool:
    """Whether any of these rows but PrefGen's own was run."""
    return any(name in rows for name in names if name != "prefgen")


def alignments(rows: dict, names: Iterable[str]) -> str:
    """Alignment of some rows against PrefGen."""
    lines = []
    for name in names:
        if name in rows:
            r = rows[name]
            less = "" if name == "prefgen" else estimate(r["minus_prefgen"])
            lines.append([r["label"], estimate(r["alignment"]), less, estimate(r["gain_share"]), r["subject"]["mean"]])
    return table(["picture", "alignment", "less PrefGen", "share of the oracle's gain", "subject named"], lines)


def against_others(rows: dict, names: list[str]) -> str:
    """Alignment of some rows, and how much of it another user's preference doesn't give."""
    lines = [
        [
            r["label"],
            estimate(r["alignment"]),
            estimate(r["minus_other"]) if "minus_other" in r else "",
            r["subject"]["mean"],
        ]
        for r in (rows[name] for name in names if name in rows)
    ]
    return table(["picture", "alignment", "less another user's", "subject named"], lines)


def section(
    title: str,
    words: str,
    rows: dict,
    names: list[str],
    after: str = "",
    write_table: Callable[[dict, list[str]], str] = alignments,
) -> str:
    """A table of PrefGen and some rows under a heading; nothing where none of them was run."""
    if not beside_prefgen(rows, names):
        return ""
    return "\n\n".join(part for part in (f"## {title}", words, write_table(rows, names), after) if part) + "\n\n"


def weights(rows: dict, names: list[str]) -> str:
    """What the artist's weight trades, and how it stands beside the words in the prompt where those were run."""
    rows = {name: rows[name] for name in names if name in rows}
    beside_words = all("minus_words" in row for row in rows.values())
    lines = []
    for name, r in rows.items():
        own = name == "prefgen"
        words = [estimate(r["minus_words"])] if beside_words else []
        lines.append(
            ["weight 1" if own else r["label"], estimate(r["alignment"]), "" if own else estimate(r["minus_prefgen"])]
            + [*words, r["subject"]["mean"], estimate(r["cmmd"], ".2f"), estimate(r["kid"], ".1f")]
        )
    words = ["less words and negative prompt"] if beside_words else []
    head = ["weight", "alignment", "less PrefGen", *words, "subject named", "CMMD to the liked ↓", "KID to the liked ↓"]
    return table(head, lines)


def qualities(rows: dict) -> str:
    """The methods' other figures."""
    head = ["picture", "CMMD to the liked ↓", "KID to the liked ↓", "FID, all users ↓", "CLIP-T ↑", "CLIP-I ↑"]
    return table(
        [*head, "diversity ↑", "CPU s a picture"],
        [
            [rows[name]["label"], *(estimate(rows[name][key], form) for key, form in QUALITIES.items())]
            + [f"{rows[name]['cpu_seconds_a_picture']:.2f}"]
            for name in METHODS
            if name in rows
        ],
    )


def group_alignments(groups: dict, names: list[str]) -> str:
    """Alignment over some of the users or families."""
    return table(
        ["pictures of", "users", *(ROWS[name].label for name in names)],
        [[label, g["none"]["users"], *(estimate(g[name]) for name in names)] for label, g in groups.items()],
    )


def draw_sizes(rows: dict, path: Path) -> None:
    """Alignment by history size, with none and oracle as bands."""
    from matplotlib.figure import Figure

    sizes = {n: rows[name]["alignment"] for n, name in SIZE_ROWS.items() if name in rows}
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("oracle", "tab:green"), ("none", "tab:grey")):
        axes.axhspan(*rows[name]["alignment"]["ci95"], color=colour, alpha=0.2, label=rows[name]["label"])
    means = np.array([entry["mean"] for entry in sizes.values()])
    error = np.abs(np.array([entry["ci95"] for entry in sizes.values()]).T - means)
    axes.errorbar(list(sizes), means, error, marker="o", capsize=3, label="PrefGen")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [f"{n} + {n}" for n in sizes])
    axes.set(xlabel="liked + disliked pictures", ylabel="alignment")
    axes.legend(loc="center right", fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def draw_side_by_side(pictures: dict[str, Path], people: list[users.User], prompts: int, path: Path) -> None:
    """A row a user: some of the history (liked above disliked), then the first prompt by each method."""
    names = [name for name in SHORT if name in pictures]
    people = people[:FIGURE_USERS]
    side = FIRST.image_size
    small = side // 2
    left = FIGURE_HISTORY * small + 12
    head = 18
    sheet = Image.new("RGB", (left + len(names) * (side + 4), head + len(people) * (side + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 3), "liked above disliked", fill="black")
    for column, name in enumerate(names):
        draw.text((left + column * (side + 4) + 2, 3), SHORT[name], fill="black")
    for row, person in enumerate(people):
        top = head + row * (side + 6)
        for line, verdict in enumerate(history_of(person, FIGURE_HISTORY)):
            for i, picture in enumerate(verdict):
                thumb = Image.fromarray((picture * 255).round().byte().numpy()).resize((small, small), Image.LANCZOS)
                sheet.paste(thumb, (i * small, top + line * small))
        for column, name in enumerate(names):
            sheet.paste(saved_picture(pictures[name], row * prompts), (left + column * (side + 4), top))
    save_image(sheet, path, quality=90)


def save_pictures(pictures: torch.Tensor, path: Path) -> None:
    """Pictures [n, 3, S, S] uint8 as one lossless file, SHEET_COLUMNS in a row."""
    sheet = make_grid(pictures, nrow=SHEET_COLUMNS, padding=0)
    save_image(Image.fromarray(sheet.movedim(0, -1).numpy()), path)


def saved_picture(path: Path, number: int) -> Image.Image:
    """One picture of a file of `save_pictures`."""
    top, left = (FIRST.image_size * place for place in divmod(number, SHEET_COLUMNS))
    sheet = read_picture(path, long_side=None)
    return Image.fromarray(sheet[top : top + FIRST.image_size, left : left + FIRST.image_size])
