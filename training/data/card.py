"""The data card that every set carries: counts, rules, splits, licence notes, how to cite, and two pictures."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from prefgen.files import read_text
from prefgen.pictures import PUBLISHED, PictureError, read_picture

from .duck import open_set, scalar
from .errors import DataError
from .schema import DISLIKED, LIKED
from .store import Store, images_at

SHEET_USERS = 8  # rows
SHEET_PICTURES = 6  # of each verdict
SHEET_SIDE = 112  # pixels
SHEET_TEXT = 14  # pixels above each row
SHEET_GAP = 12  # pixels between liked and disliked

ORIGIN = {
    "agents": "Each user has about 50 weighted opinions on attributes: strong ones (0.6 to 1), which pictures show or "
    "avoid, and mild ones, which only lean a picture; one in five users has two tastes. A liked picture follows one "
    "taste and shows no strong dislike; a disliked one shows at least two. Items 2n and 2n + 1 of a user are liked "
    "and disliked on the same prompt; the last whole pair is held out. Everything is a pure function of the "
    "configuration, the user and the item.",
    "world": "Simulated users of the atelier's second world, with about nine opinions each: named kinds, continuous "
    "traits of which some have no words, favourite and avoided subjects and company. Half of them have habits, traits "
    "of most of their pictures without an opinion; half of the disliked pictures show much of what is liked. The last "
    "two pictures of a user are a held-out pair of one prompt.",
    "pickapic": "Choices between two pictures, merged for each user: the net score of a picture makes it liked or "
    "disliked.",
    "ratings": "People's own ratings. Scores are turned into verdicts on each user's own scale: liked above, disliked "
    "below their mean, nothing within a margin of it; choices into wins less losses; verdicts are taken as they are, "
    "the newest of a picture.",
    "pamela": "PAMELA's scores from 1 to 5, turned into verdicts on each participant's own scale: liked above, "
    "disliked below their mean, nothing within a margin of it. Its own splits are not taken over.",
}
LICENCE = {
    "agents": "The users, prompts and attributes are made by PrefGen's code and are free of rights of real people. "
    "Pictures of the atelier are drawn by the same code. Pictures of a diffusion pipeline fall under the terms of "
    "that model: read its licence before publishing the set.",
    "world": "Users, prompts and pictures are made by PrefGen's code and are free of rights of real people.",
    "pickapic": "Derived from Pick-a-Pic, which has its own licence and terms of access; this set may be shared only "
    "as they allow. Its users are real people known by number: don't try to learn who they are. Prompts and pictures "
    "come from an open service and may offend; `--nsfw-words` leaves prompts out by a list of yours.",
    "ratings": "Pictures and verdicts belong to those who made them: ask before the set, or an adapter made of it, is "
    "shared. `source_users.csv` says who is who: leave it out of what you share.",
    "pamela": "PAMELA is published under CC BY 4.0: name its authors. Its participants are real people known by "
    "number: don't try to learn who they are.",
}
CITE = {
    "agents": "PrefGen (this repository), with the configuration above; the same configuration makes the same set.",
    "world": "PrefGen (this repository), with the configuration above; the same configuration makes the same set.",
    "pickapic": "Kirstain et al., *Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation*, "
    "2023; and PrefGen (this repository) for the cleaning, with the configuration above.",
    "ratings": "The people who gave the ratings; and PrefGen (this repository), with the configuration above.",
    "pamela": "Maerten et al., *Personalizing Text-to-Image Generation to Individual Taste*, arXiv 2604.07427; and "
    "PrefGen (this repository) for the verdicts, with the configuration above.",
}


def write(store: Store) -> None:
    """Write card.md and its pictures, from the finished tables."""
    with open_set(store.folder) as db:
        histograms = _histograms(db)
        sheet = contact_sheet(store.folder, db)
        text = _text(store, db, sheet is not None)
    store.write_bytes("card/histograms.png", histograms)
    if sheet is not None:
        store.write_bytes("card/contact_sheet.jpg", sheet)
    store.write_bytes("card.md", text.encode())


def versions() -> dict[str, str]:
    """What the bytes of a set depend on besides its configuration."""
    packages = {name: version(name) for name in ("duckdb", "matplotlib", "numpy", "pillow", "pyarrow")}
    return packages | {"python": platform.python_version()}


def _text(store: Store, db: duckdb.DuckDBPyConnection, with_sheet: bool) -> str:
    kind = store.config["kind"]
    users, pictures, pairs = (scalar(db, f"SELECT count(*) FROM {table}") for table in ("users", "pictures", "pairs"))
    prompts = scalar(db, "SELECT count(DISTINCT prompt) FROM pictures")
    splits = db.execute(
        "SELECT split, count(DISTINCT user), count(DISTINCT prompt), count(*), count(*) FILTER (verdict = ?), "
        "count(*) FILTER (heldout) FROM pictures GROUP BY split ORDER BY split DESC",
        [LIKED],
    ).fetchall()
    lines = [
        f"# Data card: {kind}",
        "",
        f"{users:,} users, {pictures:,} pictures, {prompts:,} prompts, {pairs:,} held-out pairs. "
        "`training/data/schema.py` describes the columns.",
        "",
        "## How it was made",
        "",
        ORIGIN[kind],
        "",
        "## Splits",
        "",
        "By user and by prompt, each fixed by a hash. `train` has training users on training prompts, `test` test "
        "users on test prompts, `mixed` one of each: never train on it.",
        "",
        "| split | users | prompts | pictures | liked | held out |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(f'{v:,}' if isinstance(v, int) else v for v in row)} |" for row in splits),
        "",
    ]
    report = store.folder / "report.json"
    if report.exists():
        rules = json.loads(read_text(report))["rules"]
        lines += ["## Rules", "", "In the order in which they were applied.", ""]
        lines += ["| rule | unit | dropped |", "|---|---|---|"]
        lines += [f"| {rule['rule']} | {rule['unit']} | {rule['dropped']:,} |" for rule in rules] + [""]
    lines += ["## Histograms", "", "![histograms](card/histograms.png)", ""]
    if with_sheet:
        lines += ["## Some users, liked left, disliked right", "", "![contact sheet](card/contact_sheet.jpg)", ""]
    lines += ["## Configuration", "", "```json", json.dumps(store.config, indent=1, sort_keys=True), "```", ""]
    lines += ["## Licence notes", "", LICENCE[kind], "", "## How to cite", "", CITE[kind], ""]
    return "\n".join(lines)


def _histograms(db: duckdb.DuckDBPyConnection) -> bytes:
    """Six panels in one PNG; those about opinions and attributes say so when a set has none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    (per_user, per_prompt, shares), (verdicts, opinions, attributes) = figure.subplots(2, 3)

    def counted(values: str) -> list[tuple[int, int]]:
        """(value, how often) of a query with one column n."""
        return db.execute(f"SELECT n, count(*) FROM ({values}) GROUP BY n ORDER BY n").fetchall()

    _weighted(per_user, counted("SELECT count(*) n FROM pictures GROUP BY user"), "pictures a user", "users")
    _weighted(per_prompt, counted("SELECT count(*) n FROM pictures GROUP BY prompt"), "pictures a prompt", "prompts")
    liked = counted("SELECT 100 * liked // (liked + disliked) n FROM users WHERE liked + disliked > 0")
    shares.hist([n for n, _ in liked], bins=range(0, 105, 5), weights=[n for _, n in liked])
    shares.set(xlabel="liked share of a user's history, %", ylabel="users")
    rows = db.execute("SELECT split, verdict, count(*) FROM pictures GROUP BY ALL ORDER BY ALL").fetchall()
    verdicts.bar([f"{split}\n{verdict}" for split, verdict, _ in rows], [n for *_, n in rows])
    verdicts.set_ylabel("pictures")
    per_opinions = counted("SELECT len(flatten(tastes)) + len(dislikes) n FROM users")
    if any(n for n, _ in per_opinions):
        _weighted(opinions, per_opinions, "opinions a user", "users")
    else:
        _empty(opinions, "no opinions known")
    shown = db.execute(
        "SELECT a, count(*) n FROM (SELECT unnest(attributes) a FROM pictures) GROUP BY a ORDER BY n DESC, a LIMIT 25"
    ).fetchall()
    if shown:
        attributes.barh([a for a, _ in shown][::-1], [n for _, n in shown][::-1])
        attributes.tick_params(axis="y", labelsize=7)
        attributes.set_xlabel("pictures that show it (the 25 most shown)")
    else:
        _empty(attributes, "no attributes known")
    file = io.BytesIO()
    # Without the entry that names matplotlib's version.
    figure.savefig(file, format="png", dpi=90, metadata={"Software": None})
    return file.getvalue()


def _weighted(axis, rows: list[tuple[int, int]], x: str, y: str) -> None:
    """A histogram of (value, how often), with logarithmic bins where values spread widely."""
    from matplotlib.ticker import MaxNLocator

    values, counts = zip(*rows, strict=True) if rows else ((0,), (0,))
    spread = max(values) - min(values)
    if spread > 200:
        bins = np.geomspace(max(1, min(values)), max(values) + 1, 40)
        axis.set_xscale("log")
    else:
        bins = np.arange(min(values), max(values) + 2, max(1, spread // 40)) - 0.5
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.hist(values, bins=bins, weights=counts, rwidth=0.9)
    axis.set(xlabel=x, ylabel=y)


def _empty(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center")
    axis.set_axis_off()


def contact_sheet(folder: Path, db: duckdb.DuckDBPyConnection, seed: int = 0) -> bytes | None:
    """Random users' histories, one a row: liked left, disliked right. JPEG; None for a set without images."""
    shuffled = "SELECT user FROM users ORDER BY hash(user + ?), user LIMIT ?"
    users = [user for (user,) in db.execute(shuffled, [seed, SHEET_USERS]).fetchall()]
    width = SHEET_PICTURES * SHEET_SIDE
    height = SHEET_SIDE + SHEET_TEXT
    sheet = Image.new("RGB", (2 * width + SHEET_GAP, max(1, len(users)) * height), "white")
    any_picture = False
    for row, user in enumerate(users):
        ImageDraw.Draw(sheet).text((2, row * height + 1), f"user {user}", fill="black")
        for column, verdict in enumerate((LIKED, DISLIKED)):
            for place, image in _first_pictures(folder, db, user, verdict):
                any_picture = True
                x = column * (width + SHEET_GAP) + place * SHEET_SIDE
                y = row * height + SHEET_TEXT - 1
                sheet.paste(ImageOps.contain(image, (SHEET_SIDE - 2, SHEET_SIDE - 2)), (x, y))
    if not any_picture:
        return None
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=88)
    return file.getvalue()


def _first_pictures(
    folder: Path, db: duckdb.DuckDBPyConnection, user: int, verdict: str
) -> Iterator[tuple[int, Image.Image]]:
    """(place, picture) of the first of a user's history; what is absent or can't be read, the check names."""
    places = db.execute(
        "SELECT shard, row FROM pictures WHERE user = ? AND verdict = ? AND NOT heldout ORDER BY item LIMIT ?",
        [user, verdict, SHEET_PICTURES],
    ).fetchall()
    with suppress(DataError):
        for place, data in images_at(folder, *np.array(places, np.int64).reshape(-1, 2).T):
            with suppress(PictureError):
                yield place, Image.fromarray(read_picture(data or b"", formats=PUBLISHED))
