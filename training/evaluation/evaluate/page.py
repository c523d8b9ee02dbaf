"""The evidence as a page, a record and two figures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from prefgen.atelier import users
from prefgen.atelier.models import IMAGE_SIZE
from prefgen.files import write_atomic
from prefgen.pictures import read_picture

from .painter import GUIDANCE, STEPS, history_of
from .rows import CONTROLS, METHODS, PARTS, ROWS, SIZES, TRAINED, WEIGHTS

COLUMNS = 16  # of a file of kept pictures
FIGURE_USERS, FIGURE_HISTORY = 6, 3
QUALITIES = (("cmmd", 2), ("kid", 1), ("fid", 1), ("clip_t", 1), ("clip_i", 1))  # decimals
SIZE_ROWS = {n: "prefgen" if n == 8 else f"size_{n}" for n in SIZES}
WEIGHT_ROWS = ["prefgen" if w == 1 else f"weight_{w:g}" for w in WEIGHTS]
SHORT = {  # over the columns of the figure
    "none": "no preference",
    "mismatched": "another user's",
    "image_only": "image-only adapter",
    "described": "MLLM's words",
    "reference_03": "reference attention",
    "prefgen": "PrefGen",
    "oracle": "likes in the prompt",
}


def save_pictures(pictures: torch.Tensor, path: Path) -> None:
    """Pictures [n, 3, S, S] uint8 as one lossless file, COLUMNS in a row."""
    n, _, side, _ = pictures.shape
    rows = -(-n // COLUMNS)
    sheet = torch.zeros(rows * COLUMNS, 3, side, side, dtype=torch.uint8)
    sheet[:n] = pictures
    sheet = sheet.view(rows, COLUMNS, 3, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, COLUMNS * side, 3)
    _save(Image.fromarray(sheet.numpy()), path)


def kept_picture(path: Path, number: int) -> Image.Image:
    """One picture of a file of `save_pictures`."""
    top, left = (IMAGE_SIZE * place for place in divmod(number, COLUMNS))
    sheet = read_picture(path, long_side=None)
    return Image.fromarray(sheet[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])


def write(result: dict, pictures: dict[str, Path], people: list[users.User], out: Path) -> None:
    """methods.json, methods.md and figures/ from what was measured. pictures: {row: file of its kept pictures}."""
    if beside_prefgen(result["rows"], SIZE_ROWS.values()):
        sizes(result["rows"], out / "figures" / "history_size.png")
    side_by_side(pictures, people, result["prompts"], out / "figures" / "methods.jpg")
    write_atomic(out / "methods.json", json.dumps(result, indent=1).encode() + b"\n")
    write_atomic(out / "methods.md", text(result).encode())


def span(entry: dict, digits: int = 3) -> str:
    """A mean and its interval."""
    if entry["mean"] is None:
        return "-"
    mean = f"{entry['mean']:.{digits}f}"
    return mean if entry["ci95"] is None else f"{mean} ({' to '.join(f'{x:.{digits}f}' for x in entry['ci95'])})"


def table(rows: dict, names: list[str]) -> str:
    """Alignment of some rows against PrefGen."""
    lines = [
        "| picture | alignment | less PrefGen | share of the oracle's gain | subject named |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in names if name in rows):
        r = rows[name]
        less = "" if name == "prefgen" else span(r["minus_prefgen"])
        lines.append(
            f"| {r['label']} | {span(r['alignment'])} | {less} | {span(r['gain_share'])} | {r['subject']['mean']:.3f} |"
        )
    return "\n".join(lines)


def beside_prefgen(rows: dict, names: Iterable[str]) -> bool:
    """Whether any of these rows but PrefGen's own was run."""
    return any(name in rows for name in names if name != "prefgen")


def section(title: str, words: str, rows: dict, names: list[str], after: str = "", make=table) -> str:
    """A table of PrefGen and some rows under a heading; nothing where none of them was run."""
    if not beside_prefgen(rows, names):
        return ""
    return "\n\n".join(part for part in (f"## {title}", words, make(rows, names), after) if part) + "\n\n"


def weights(rows: dict, names: list[str]) -> str:
    """What the artist's weight trades, and how it stands beside the words in the prompt where those were run."""
    there = [name for name in names if name in rows]
    beside = all("minus_words" in rows[name] for name in there)
    titles = ["weight", "alignment", "less PrefGen", *(["less words and negative prompt"] if beside else [])]
    titles += ["subject named", "CMMD to the liked ↓", "KID to the liked ↓"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in there:
        r = rows[name]
        label, less = ("weight 1", "") if name == "prefgen" else (r["label"], span(r["minus_prefgen"]))
        figures = [span(r["alignment"]), less, *([span(r["minus_words"])] if beside else [])]
        figures += [f"{r['subject']['mean']:.3f}", span(r["cmmd"], 2), span(r["kid"], 1)]
        lines.append(f"| {' | '.join([label, *figures])} |")
    return "\n".join(lines)


def qualities(rows: dict) -> str:
    """The methods' other figures."""
    lines = [
        "| picture | CMMD to the liked ↓ | KID to the liked ↓ | FID, all users ↓ | CLIP-T ↑ | CLIP-I ↑ | diversity ↑ "
        "| CPU s a picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in METHODS if name in rows):
        r = rows[name]
        figures = [span(r[key], digits) for key, digits in QUALITIES]
        figures += [span(r["diversity"]), f"{r['cpu_seconds_a_picture']:.2f}"]
        lines.append(f"| {r['label']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def apart(groups: dict, names: list[str]) -> str:
    """Alignment over some of the users or families."""
    lines = [
        "| pictures of | users | " + " | ".join(ROWS[n].label for n in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for label, g in groups.items():
        lines.append(f"| {label} | {g['none']['users']} | " + " | ".join(span(g[n]) for n in names) + " |")
    return "\n".join(lines)


def text(result: dict) -> str:
    """methods.md."""
    rows = result["rows"]
    missing = [row.label for name, row in ROWS.items() if name not in rows]
    left_out = f"Not in this run: {'; '.join(missing)}.\n\n" if missing else ""
    after = f", after the first {result['skipped']}," if result["skipped"] else ","
    sections = "".join(
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
                make=weights,
            ),
            section(
                "Trained otherwise",
                "One thing changed, all else as shipped (`python -m training.evaluation.ablations`).",
                rows,
                ["prefgen", *TRAINED],
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
    return f"""# What each part of the method brings

`{result["command"]}`: {result["users"]} users of the test split{after} {result["prompts"]} held-out prompts
each (by turns all twenty), so {result["pictures"]} pictures a row; the same noise in every row. Guidance {GUIDANCE},
{STEPS} DDIM steps, histories of 8 + 8 unless said otherwise. Intervals: 95 %, bootstrap over users; "less PrefGen" is
paired. One training seed. [methods.json](methods.json) has every figure, the seeds, the versions and the weights'
checksums.

## Methods

{table(rows, METHODS)}

{how_methods_work(rows)}

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

{sections}## Users and families apart

Alignment over a part of the families counts users who like and dislike something in it.

{apart(result["groups"], [n for n in METHODS if n in rows])}

## What is not here

{left_out}CSD, PickScore and the ViPer proxy judge real bases:
[compare.md](../compare.md).
"""


def how_methods_work(rows: dict) -> str:
    """A sentence or two on each method that was run and that its label doesn't explain."""
    about = {
        "image_only": """The image-only adapter is the same branch, trained on the same data for as many steps, with the
CLIP embedding as its only part (`python -m training.evaluation.ablations image_only`).""",
        "described": """The MLLM's words are its own answer to the closing question, written after the prompt; of two
tastes the first that it names.""",
        "reference_03": """Reference attention is ours after FABRIC (arXiv 2307.10159): no training, the history's
pictures are read by the UNet at every step.""",
    }
    return "\n".join(told for name, told in about.items() if name in rows)


def sizes(rows: dict, path: Path) -> None:
    """Alignment by history size, with none and oracle as bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = {n: rows[name]["alignment"] for n, name in SIZE_ROWS.items() if name in rows}
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in (("oracle", "tab:green"), ("none", "tab:grey")):
        axes.axhspan(*rows[name]["alignment"]["ci95"], color=colour, alpha=0.2, label=rows[name]["label"])
    means = np.array([e["mean"] for e in known.values()])
    error = np.abs(np.array([e["ci95"] for e in known.values()]).T - means)
    axes.errorbar(list(known), means, error, marker="o", capsize=3, label="PrefGen")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(known), [f"{n} + {n}" for n in known])
    axes.set(xlabel="liked + disliked pictures", ylabel="alignment")
    axes.legend(loc="center right", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def side_by_side(pictures: dict[str, Path], people: list[users.User], prompts: int, path: Path) -> None:
    """A row a user: some of the history (liked above disliked), then the first prompt by each method."""
    names, side, small = [name for name in SHORT if name in pictures], IMAGE_SIZE, IMAGE_SIZE // 2
    shown, left, head = people[:FIGURE_USERS], FIGURE_HISTORY * small + 12, 18
    sheet = Image.new("RGB", (left + len(names) * (side + 4), head + len(shown) * (side + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 3), "liked above disliked", fill="black")
    for column, name in enumerate(names):
        draw.text((left + column * (side + 4) + 2, 3), SHORT[name], fill="black")
    for row, person in enumerate(shown):
        top = head + row * (side + 6)
        for line, verdict in enumerate(history_of(person, FIGURE_HISTORY)):
            for i, picture in enumerate(verdict):
                thumb = Image.fromarray((picture * 255).round().byte().numpy()).resize((small, small), Image.LANCZOS)
                sheet.paste(thumb, (i * small, top + line * small))
        for column, name in enumerate(names):
            sheet.paste(kept_picture(pictures[name], row * prompts), (left + column * (side + 4), top))
    _save(sheet, path)


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", quality=90)
    write_atomic(path, buffer.getvalue())
