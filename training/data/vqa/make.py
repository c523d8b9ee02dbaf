"""The questions of a whole set: train.parquet, test.parquet and a report of what their text alone gives away."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from prefgen.files import file_sha256, read_text, write_atomic

from ..duck import BATCH_ROWS, open_set
from ..errors import DataError
from ..schema import LIKED, TEST, TRAIN
from ..store import MANIFEST, write_parquet
from .control import TextOnly, beats_chance
from .questions import ANSWERS, KINDS, Picture, Question, ask

BATCH = 2048  # questions in memory at once
PLACE = pa.struct([("picture", pa.string()), ("shard", pa.int32()), ("row", pa.int32())])
SEEN = pa.struct([*PLACE, ("liked", pa.bool_()), ("prompt", pa.string())])
QUESTIONS = pa.schema(
    [
        ("user", pa.int64()),
        ("number", pa.int32()),  # of the user's questions
        ("kind", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("history", pa.list_(SEEN)),
        ("asked", pa.list_(PLACE)),  # pictures that the question shows, after the history
    ]
)


def make(data: Path, folder: Path, each: int, seed: int) -> dict:
    """Write train.parquet, test.parquet and report.json; returns the report. each: questions a user.

    DataError for a set that is not finished, and for a folder with other questions.
    """
    if not (data / MANIFEST).exists():
        raise DataError(f"{data} has no {MANIFEST}: it is no data set, or its making was not finished.")
    config = {
        "questions_a_user": each,
        "seed": seed,
        "source": json.loads(read_text(data / MANIFEST))["config"],
        "source_sha256": file_sha256(data / MANIFEST),
        "kinds_sha256": _kinds_digest(),
    }
    path = folder / "report.json"
    if path.exists():
        report = json.loads(read_text(path))
        if report["config"] != config:
            raise DataError(f"{folder} holds other questions, of another set or other options: name another folder.")
        print(f"{folder} is finished already.")
        return report
    tally = Tally()
    for split in (TRAIN, TEST):  # the control learns from the first and is asked by the second
        rows = tqdm(questions(data, split, each, seed), desc=split, unit="question", mininterval=1)
        write_parquet(folder / f"{split}.parquet", QUESTIONS, tables(tally.count(split, row) for row in rows))
    report = {"config": config} | tally.report()
    write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _kinds_digest() -> str:
    """SHA-256 of the kinds' wordings and answers: with others the questions are others."""
    kinds = [[kind.name, kind.wordings, kind.answers] for kind in KINDS.values()]
    return hashlib.sha256(json.dumps(kinds).encode()).hexdigest()


def questions(data: Path, split: str, each: int, seed: int) -> Iterator[tuple[int, int, Question]]:
    """(user, number, question) of a split."""
    for user, pictures in users(data, split):
        for number, question in ask(pictures, seed, user, range(each), heldout=split == TEST):
            yield user, number, question


def users(data: Path, split: str) -> Iterator[tuple[int, list[Picture]]]:
    """(user, pictures) of one split, in the order of users; one user in memory at a time."""
    query = f"""SELECT "user", picture, verdict, prompt, attributes, heldout, shard, "row" FROM pictures
        WHERE split = '{split}' ORDER BY "user", item"""
    with open_set(data) as db:
        rows = (row for batch in db.sql(query).to_arrow_reader(BATCH_ROWS) for row in batch.to_pylist())
        for user, own in groupby(rows, key=lambda row: row["user"]):
            yield user, [_picture(row) for row in own]


def _picture(row: dict) -> Picture:
    return Picture(
        picture=row["picture"],
        liked=row["verdict"] == LIKED,
        prompt=row["prompt"],
        attributes=frozenset(row["attributes"] or ()),
        heldout=row["heldout"],
        shard=row["shard"],
        row=row["row"],
    )


def tables(rows: Iterator[tuple[int, int, Question]]) -> Iterator[pa.Table]:
    """Tables of QUESTIONS, BATCH rows each."""
    while batch := list(islice(rows, BATCH)):
        yield pa.Table.from_pylist([_row(*row) for row in batch], QUESTIONS)


def _row(user: int, number: int, question: Question) -> dict:
    def place(picture: Picture) -> dict:
        return {"picture": picture.picture, "shard": picture.shard, "row": picture.row}

    return {
        "user": user,
        "number": number,
        "kind": question.kind,
        "question": question.question,
        "answer": question.answer,
        "history": [place(p) | {"liked": p.liked, "prompt": p.prompt} for p in question.history],
        "asked": [place(p) for p in question.asked],
    }


class Tally:
    """Counts questions and answers as they pass, and lets the text-only control learn from TRAIN and answer TEST."""

    def __init__(self):
        self.control = TextOnly()
        self.kinds: dict[str, Counter] = {TRAIN: Counter(), TEST: Counter()}
        self.answers: Counter = Counter()  # "split kind answer"
        self.right: Counter = Counter()  # kind: what the control got right

    def count(self, split: str, row: tuple[int, int, Question]) -> tuple[int, int, Question]:
        """Count one row of a split and hand it on."""
        question = row[-1]
        self.kinds[split][question.kind] += 1
        if question.kind in ANSWERS:
            self.answers[f"{split} {question.kind} {question.answer}"] += 1
            if split == TRAIN:
                self.control.learn(question)
            else:
                self.right[question.kind] += self.control.answer(question) == question.answer
        return row

    def report(self) -> dict:
        """For report.json."""
        text_only = {}
        for kind in ANSWERS:
            right = self.right[kind]
            asked = self.kinds[TEST][kind]
            if asked:
                text_only[kind] = {"right": right, "asked": asked, "gives_away": beats_chance(right, asked)}
        return {
            "questions": {split: dict(sorted(counts.items())) for split, counts in self.kinds.items()},
            "answers": dict(sorted(self.answers.items())),
            "text_only": text_only,
        }
