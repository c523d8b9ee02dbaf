"""From pictures to a folder: `page` for the judges, `key.json` for whoever asks them."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path

from PIL import Image

from prefgen.pictures import PictureError, read_picture

from ...data.errors import DataError
from .pictures import VERDICTS, Pictures

PAGE = Path(__file__).parent / "page"
HISTORY_SIZE = 384  # pixels at most: history pictures are shown small
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What to ask. pairs: methods to compare, all if empty; trials: at most so many, 0 for all; repeats: so many
    of them are shown a second time, mirrored."""

    pairs: tuple[tuple[str, str], ...] = ()
    trials: int = 60
    repeats: int = 6
    seed: int = 0
    title: str = "Which picture suits this person better?"


def make(pictures: Pictures, folder: Path, plan: Plan) -> str:
    """Write the study to `folder`, which must be new or empty. Returns a sentence on what it holds."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty: give a new folder, since answers need the key they were made with.")
    trials, possible = choose(pictures, plan)
    check_sizes(pictures, trials)
    blind = Blind()
    page, key = content(pictures, trials, plan, blind)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that it appears whole or not at all.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        partial.chmod(0o755)
        shutil.copytree(PAGE, partial / "page")
        blind.write(partial / "page" / "pictures")
        (partial / "page" / "data.js").write_text(f"const STUDY = {json.dumps(page)};\n", encoding="utf-8")
        (partial / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder)
    except OSError as error:
        raise DataError(f"Can't write {folder}: {error.strerror or error}.") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    repeats = len(page["trials"]) - len(trials)
    return (
        f"{len(trials)} of {possible} possible comparisons, {repeats} mirrored repeats, {len(page['users'])} users.\n"
        f"Give judges the folder {folder / 'page'} (they open index.html); keep {folder / 'key.json'} to yourself."
    )


@dataclass(frozen=True)
class Trial:
    user: str
    prompt: str
    methods: tuple[str, str]


def choose(pictures: Pictures, plan: Plan) -> tuple[list[Trial], int]:
    """(trials, how many were possible): pairs by turns, within a pair users by turns. DataError if there are none."""
    methods = pictures.methods
    if len(methods) < 2:
        raise DataError(f"There is only the method {methods[0]!r}: a comparison needs two.")
    for method in {method for pair in plan.pairs for method in pair} - set(methods):
        raise DataError(f"There is no method {method!r}: the pictures are of {', '.join(methods)}.")
    rng = random.Random(plan.seed)
    by_pair = []
    for pair in plan.pairs or list(combinations(methods, 2)):
        by_user: dict[str, list[Trial]] = {}
        for (user, prompt), files in pictures.painted.items():
            if files.keys() >= set(pair):
                by_user.setdefault(user, []).append(Trial(user, prompt, pair))
        if not by_user and plan.pairs:
            raise DataError(f"No user and prompt has pictures of both {pair[0]!r} and {pair[1]!r}.")
        lists = list(by_user.values())
        # A shorter study is the beginning of a longer one, with every user as often as it goes.
        for trials in lists:
            rng.shuffle(trials)
        rng.shuffle(lists)
        by_pair.append(by_turns(lists))
    trials = by_turns(by_pair)
    if not trials:
        raise DataError("No user and prompt has pictures of two methods: there is nothing to compare.")
    return trials[: plan.trials or None], len(trials)


def by_turns(lists: list[list]) -> list:
    """The first of each list, then the second of each, and so on."""
    return [item for group in zip_longest(*lists) for item in group if item is not None]


def check_sizes(pictures: Pictures, trials: list[Trial]) -> None:
    """DataError where a picture's size would tell its method."""
    for trial in trials:
        files = [pictures.painted[trial.user, trial.prompt][method] for method in trial.methods]
        sizes = [opened(file).size for file in files]
        if sizes[0] != sizes[1]:
            (width, height), (other_width, other_height) = sizes
            raise DataError(
                f"{files[0]} is {width} x {height} and {files[1]} {other_width} x {other_height}: their size would "
                "tell judges the method; bring them to one size."
            )


def content(pictures: Pictures, trials: list[Trial], plan: Plan, blind: Blind) -> tuple[dict, dict]:
    """(what the page has, what the key has). Every number and name is random: a judge who reads the page's source
    learns neither methods nor users."""
    study = secrets.token_hex(4)
    users: dict[str, str] = {}
    histories: dict[str, dict] = {}
    for user in dict.fromkeys(trial.user for trial in trials):
        users[user] = secrets.token_hex(4)
        histories[users[user]] = {
            verdict: [blind.name(path, HISTORY_SIZE) for path in pictures.histories[user][verdict]]
            for verdict in VERDICTS
        }
    sides = {trial: secrets.SystemRandom().sample(trial.methods, 2) for trial in trials}
    ids = {trial: secrets.token_hex(4) for trial in trials}
    repeated = random.Random(plan.seed + 1).sample(trials, min(plan.repeats, len(trials)))
    questions = [(trial, ids[trial], None) for trial in trials]
    questions += [(trial, secrets.token_hex(4), ids[trial]) for trial in repeated]
    page_trials = []
    key = {}
    for trial, number, mirrors in questions:
        files = pictures.painted[trial.user, trial.prompt]
        names = [blind.name(files[method]) for method in sides[trial]]
        entry = {"id": number, "user": users[trial.user], "prompt": trial.prompt, "pictures": names}
        page_trials.append(entry | ({"mirrors": mirrors} if mirrors else {}))
        key[number] = {
            "user": trial.user,
            "prompt": trial.prompt,
            "pictures": dict(zip(names, sides[trial], strict=True)),
            "mirrors": mirrors,
        }
    # By their random numbers, so that no order tells which trial is a repeat.
    page_trials.sort(key=lambda entry: entry["id"])
    page = {"study": study, "title": plan.title, "users": histories, "trials": page_trials}
    about = {"format": FORMAT, "study": study, "seed": plan.seed, "methods": pictures.methods, "trials": key}
    return page, about


class Blind:
    """Pictures under random names: every place where one is shown has a name of its own, so that not even the number
    of its uses tells a method."""

    def __init__(self):
        self.shown: dict[str, tuple[Path, int | None]] = {}

    def name(self, path: Path, size: int | None = None) -> str:
        """A new name for a picture, shrunk to `size` pixels a side at most."""
        name = secrets.token_hex(8)
        self.shown[name] = (path, size)
        return name

    def write(self, folder: Path) -> None:
        """Every picture as `folder`/NAME.png, in the order of the names and all of one age."""
        folder.mkdir()
        for name, (path, size) in sorted(self.shown.items()):
            file = folder / f"{name}.png"
            opened(path, size).save(file)
            # When a file was written would tell in which order pictures were named.
            os.utime(file, (0, 0))


def opened(path: Path, size: int | None = None) -> Image.Image:
    """The picture as it is seen, RGB on white, with nothing but its pixels, shrunk to `size` pixels a side at most.
    DataError if it is none."""
    try:
        return Image.fromarray(read_picture(path, size))
    except PictureError as error:
        raise DataError(f"Can't read the picture {path}: {error.reason}.") from error
