"""The judges' files, joined with the key: nothing that doesn't belong to this study, nothing twice."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prefgen.files import TextError, read_text

from ...data.errors import DataError
from .make import FORMAT

COLUMNS = ["study", "judge", "trial", "left", "right", "choice", "milliseconds", "timestamp"]
CHOICES = ("left", "right", "same")


@dataclass(frozen=True)
class Answer:
    """One choice. picture: the one chosen, None for no difference; method: whose it is."""

    judge: str
    trial: str
    choice: str
    picture: str | None
    method: str | None
    milliseconds: int
    time: datetime


@dataclass(frozen=True)
class Answers:
    """The latest answer of every judge to every trial; rows that came twice, and how many of these differed."""

    latest: list[Answer]
    duplicates: int
    conflicts: int


def read_key(folder: Path) -> dict:
    """The key of the study in `folder`. DataError if there is none."""
    path = folder / "key.json"
    try:
        key = json.loads(read_text(path))
        if key["format"] != FORMAT:
            raise DataError(f"{path} has format {key['format']}; this version of PrefGen reads {FORMAT}.")
        for trial in key["trials"].values():
            if len(trial["pictures"]) != 2 or trial["mirrors"] not in (None, *key["trials"]):
                raise ValueError("a trial is damaged")
        return {**key, "methods": list(key["methods"]), "study": str(key["study"])}
    except FileNotFoundError as error:
        raise DataError(
            f"There is no {path}: give the folder that `python -m training.evaluation.study make` wrote."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no key of a study: restore it from where the study was made.") from error


def read_answers(files: list[Path], key: dict) -> Answers:
    """Every answer in `files`; of a judge's several to one trial the latest counts. DataError names the line."""
    latest: dict[tuple[str, str], Answer] = {}
    duplicates = 0
    conflicts = 0
    for file in files:
        for line, row in read_file(file):
            answer = checked(row, key, f"{file}, line {line}")
            before = latest.setdefault((answer.judge, answer.trial), answer)
            if before is not answer:
                duplicates += 1
                conflicts += before.picture != answer.picture
                # By their own clock, not by the order of the files: a judge may send a file twice.
                latest[answer.judge, answer.trial] = max(before, answer, key=lambda a: a.time)
    return Answers(list(latest.values()), duplicates, conflicts)


def read_file(file: Path) -> list[tuple[int, dict]]:
    """[(line, row)] of a CSV file as the page saves it."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
        if reader.fieldnames != COLUMNS:
            raise DataError(f"{file} has not the columns {', '.join(COLUMNS)}: give it as the page saved it.")
        rows = [(reader.line_num, row) for row in reader]
    except TextError as error:
        raise DataError(str(error)) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"Can't read {file}: {error}.") from error
    if not rows:
        raise DataError(f"{file} holds no answer: leave it out.")
    return rows


def checked(row: dict, key: dict, where: str) -> Answer:
    """The answer of a row. DataError if the page can't have written it."""
    if None in row or None in row.values():
        raise DataError(f"{where} has not {len(COLUMNS)} cells: give the file as the page saved it.")
    if row["study"] != key["study"]:
        raise DataError(f"{where} is of the study {row['study']!r}, and this is {key['study']!r}: give its own files.")
    trial = key["trials"].get(row["trial"])
    if trial is None:
        raise DataError(
            f"{where}: this study has no trial {row['trial']!r}; the file was edited, ask for the original."
        )
    if {row["left"], row["right"]} != set(trial["pictures"]):
        raise DataError(f"{where}: the pictures are not those of the trial; the file was edited, ask for the original.")
    if not row["judge"].strip():
        raise DataError(f"{where} has no judge: the file was edited, ask for the original.")
    if row["choice"] not in CHOICES:
        raise DataError(f"{where}: the choice {row['choice']!r} is none of {', '.join(CHOICES)}.")
    try:
        milliseconds = int(row["milliseconds"])
        time = datetime.fromisoformat(row["timestamp"].replace("Z", "+00:00"))
        if milliseconds < 0 or time.tzinfo is None:
            raise ValueError
    except ValueError as error:
        raise DataError(f"{where}: milliseconds or timestamp can't be read; ask for the original file.") from error
    picture = None if row["choice"] == "same" else row[row["choice"]]
    return Answer(
        judge=row["judge"],
        trial=row["trial"],
        choice=row["choice"],
        picture=picture,
        method=trial["pictures"].get(picture),
        milliseconds=milliseconds,
        time=time,
    )
