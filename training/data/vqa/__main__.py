"""Preference VQA from any data set of the common schema.

    python -m training.data.vqa data/agents data/agents-vqa

Questions of five kinds about users' histories (would this user like this picture; which of the two; what do the liked
ones share; what is avoided; the taste in words), balanced, answerable from the history alone. Sets without attributes,
such as Pick-a-Pic, give the first two. Pictures stay where they are: a question names shard and row. Ends with 1 when a
text-only control answers better than chance.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from prefgen.files import file_sha256, read_text, write_atomic

from ...common.arguments import natural, positive
from ...common.errors import exit_with_message
from ..duck import open_set
from ..errors import DataError
from ..schema import LIKED, TEST, TRAIN
from ..store import MANIFEST, write_parquet
from .control import TextOnly, beats_chance
from .questions import ANSWERS, Picture, Question, ask

AT_ONCE = 2048  # questions held in memory
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
READ = 'SELECT "user", picture, verdict, prompt, attributes, heldout, shard, "row" FROM pictures'


def users(data: Path, split: str) -> Iterator[tuple[int, list[Picture]]]:
    """(user, pictures) of one split, in the order of users; one user in memory at a time."""
    with open_set(data) as db:
        reader = db.sql(f"{READ} WHERE split = '{split}' ORDER BY \"user\", item").to_arrow_reader(16_384)
        current, pictures = None, []
        for batch in reader:
            for row in batch.to_pylist():
                if row["user"] != current:
                    if pictures:
                        yield current, pictures
                    current, pictures = row["user"], []
                shown = frozenset(row["attributes"] or ())
                place = row["heldout"], row["shard"], row["row"]
                pictures.append(Picture(row["picture"], row["verdict"] == LIKED, row["prompt"], shown, *place))
        if pictures:
            yield current, pictures


def rows_of(data: Path, split: str, each: int, seed: int) -> Iterator[tuple[int, int, Question]]:
    """(user, number, question) of a split."""
    for user, pictures in users(data, split):
        for number, question in ask(pictures, seed, user, range(each), heldout=split == TEST):
            yield user, number, question


def table(rows: list[tuple[int, int, Question]]) -> pa.Table:
    def place(p: Picture) -> dict:
        return {"picture": p.picture, "shard": p.shard, "row": p.row}

    return pa.Table.from_pylist(
        [
            {
                "user": user,
                "number": number,
                "kind": q.kind,
                "question": q.question,
                "answer": q.answer,
                "history": [place(p) | {"liked": p.liked, "prompt": p.prompt} for p in q.history],
                "asked": [place(p) for p in q.asked],
            }
            for user, number, q in rows
        ],
        QUESTIONS,
    )


def make(data: Path, folder: Path, each: int, seed: int) -> dict:
    """Write train.parquet, test.parquet and report.json; returns the report. DataError for no whole data set."""
    if not (data / MANIFEST).exists():
        raise DataError(f"{data} has no {MANIFEST}: it is no data set, or its making was not finished.")
    source = json.loads(read_text(data / MANIFEST))
    config = {"questions_a_user": each, "seed": seed, "source": source["config"]}
    config["source_sha256"] = file_sha256(data / MANIFEST)
    done = folder / "report.json"
    if done.exists() and json.loads(read_text(done))["config"] == config:
        print(f"{folder} is finished already.")
        return json.loads(read_text(done))
    if done.exists():
        raise DataError(f"{folder} holds questions of another set or other options: name another folder.")
    control, kinds, answers, right = TextOnly(), {TRAIN: Counter(), TEST: Counter()}, Counter(), Counter()

    def tables(split: str) -> Iterator[pa.Table]:
        held = []
        for user, number, question in tqdm(
            rows_of(data, split, each, seed), desc=split, unit="question", mininterval=1
        ):
            kinds[split][question.kind] += 1
            if question.kind in ANSWERS:
                answers[f"{split} {question.kind} {question.answer}"] += 1
            if split == TRAIN:
                control.learn(question)
            elif question.kind in ANSWERS:
                right[question.kind] += control.answer(question) == question.answer
            held.append((user, number, question))
            if len(held) == AT_ONCE:
                yield table(held)
                held.clear()
        if held:
            yield table(held)

    for split in (TRAIN, TEST):  # the control learns from the first and is asked by the second
        write_parquet(folder / f"{split}.parquet", QUESTIONS, tables(split))
    report = {
        "config": config,
        "questions": {split: dict(sorted(counts.items())) for split, counts in kinds.items()},
        "answers": dict(sorted(answers.items())),
        "text_only": {
            kind: {"right": right[kind], "asked": kinds[TEST][kind], "gives_away": beats_chance(right[kind], asked)}
            for kind in ANSWERS
            if (asked := kinds[TEST][kind])
        },
    }
    write_atomic(done, (json.dumps(report, indent=1) + "\n").encode())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.vqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of a finished data set")
    parser.add_argument("folder", type=Path, help="where the questions go")
    parser.add_argument("--each", type=positive, default=10, help="questions a user")
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args()
    with exit_with_message():
        report = make(args.data, args.folder, args.each, args.seed)
    print(json.dumps({key: report[key] for key in ("questions", "answers", "text_only")}, indent=1))
    given_away = [kind for kind, control in report["text_only"].items() if control["gives_away"]]
    if given_away:
        raise SystemExit(f"The text alone answers {', '.join(given_away)} better than chance: don't train on this set.")


if __name__ == "__main__":
    main()
