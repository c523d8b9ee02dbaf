"""A whole set of people's own ratings: looks at the pictures, rules, shards, tables, card and manifest."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .. import card, engine
from ..errors import DataError
from ..pickapic import looks
from ..schema import PAIRS, PICTURES, USERS, user_split
from ..store import ROW_GROUP, Store, shard_name, write_parquet
from .images import images_of
from .rating import MISSING, ONLY_OF, RULES, Dropped, Key, Source, counts
from .rules import Judged, Limits, Person, decide

LOOKS_AT_ONCE = 512  # pictures of a job
SHARD_PICTURES = 4096
LOOKS = pa.schema([("digest", pa.string()), ("fault", pa.string())])
DROPPED = pa.schema([(name, pa.string()) for name in ("rule", "unit", "place", "picture", "user")])
PEOPLE = "source_users.csv"


def make(source: Source, folder: Path, limits: Limits, processes: int = 0, run: engine.Engine = engine.run) -> None:
    """Write the set, or what is missing of it. run: an engine's, for the jobs that read pictures."""
    kind = "pamela" if source.form == "pamela" else "ratings"
    config = {"kind": kind, "form": source.form, "scale": source.scale, "source_sha256": source.digest}
    store = Store(folder, config | asdict(limits))
    if store.done:
        print(f"{folder} is finished already.")
        return
    run = partial(run, processes=processes)
    with store.lock():
        if store.done:
            return
        pictures, faults = _look(store, source, run)
        people, dropped = decide(source, pictures, limits)
        dropped = [*source.dropped, *faults, *dropped]
        if not people:
            raise DataError(_nobody(source, dropped, limits))
        _copy(store, source, people, run)
        _write_tables(store, source, people, dropped)
        store.write_index()
        card.write(store)
        store.seal(card.versions() | {"imagehash": version("imagehash")})


def _nobody(source: Source, dropped: list[Dropped], limits: Limits) -> str:
    rules = [f"{row['dropped']} {row['name']}" for row in counts(dropped, source.scale) if row["dropped"]]
    return (
        f"No user of {source.root} has {limits.min_liked} liked and {limits.min_disliked} disliked pictures; of "
        f"{source.rows} rows were dropped: {', '.join(rules) or 'none'}. Lower --min-liked and --min-disliked, or mend "
        "the source, and name another folder."
    )


@dataclass(frozen=True)
class Job:
    """Pictures for a worker: keys in order. target: path of the looks, or name of the shard; rows: of the shard."""

    root: Path
    keys: list[Key]
    target: str
    rows: list[dict] | None = None


def _look(
    store: Store, source: Source, run: Callable[[list[Job]], Iterable]
) -> tuple[dict[Key, str | None], list[Dropped]]:
    """({picture: SHA-256 of its bytes, None for a faulty one}, what is wrong with those), each looked at once."""
    keys = list(dict.fromkeys(rating.image for rating in source.ratings))
    jobs = []
    for number, start in enumerate(range(0, len(keys), LOOKS_AT_ONCE)):
        target = store.work / "looks" / f"{number:05d}.parquet"
        jobs.append(Job(source.root, keys[start : start + LOOKS_AT_ONCE], str(target)))
    _run_jobs(run, look, [job for job in jobs if not Path(job.target).exists()], len(jobs), "look")
    pictures: dict[Key, str | None] = {}
    faults = []
    for job in jobs:
        for key, row in zip(job.keys, pq.read_table(job.target, partitioning=None).to_pylist(), strict=True):
            pictures[key] = None if row["fault"] else row["digest"]
            if row["fault"]:
                faults.append(Dropped(row["fault"], picture=" ".join(filter(None, key))))
    return pictures, faults


def look(job: Job) -> None:
    """Write LOOKS of a job's pictures."""
    rows = []
    for data in images_of(job.root, job.keys):
        fault = looks.judge(data)[0] if data is not None else MISSING
        rows.append({"digest": hashlib.sha256(data or b"").hexdigest(), "fault": fault})
    write_parquet(Path(job.target), LOOKS, [pa.Table.from_pylist(rows, LOOKS)])


def _copy(store: Store, source: Source, people: list[Person], run: Callable[[list[Job]], Iterable]) -> None:
    """The shards, in the order of users and items, so that a row group has the pictures of few users."""
    rows = ((each, row) for person in people for each, row in _rows(person))
    jobs = []
    while shard := list(islice(rows, SHARD_PICTURES)):
        keys = [each.image for each, _ in shard]
        jobs.append(Job(source.root, keys, shard_name(len(jobs)), [row for _, row in shard]))
    todo = [job for job in jobs if not store.finished(job.target)]
    _run_jobs(run, partial(copy, store), todo, len(jobs), "copy")


def _rows(person: Person) -> Iterator[tuple[Judged, dict]]:
    """Each picture of a user with its row of PICTURES, the image left out."""
    for item, each in enumerate(person.pictures):
        yield (
            each,
            {
                "picture": each.picture,
                "user": person.number,
                "item": item,
                "verdict": each.verdict,
                "prompt": each.prompt,
                "attributes": [],
                "split": each.split,
                "heldout": each.heldout,
                "seed": None,
            },
        )


def copy(store: Store, job: Job) -> None:
    """Write one shard, the pictures with their own bytes. DataError where one has changed since it was looked at."""

    def tables() -> Iterator[pa.Table]:
        images = zip(job.keys, job.rows or (), images_of(job.root, job.keys), strict=True)
        while group := list(islice(images, ROW_GROUP)):
            for key, row, data in group:
                if hashlib.sha256(data or b"").hexdigest() != row["picture"]:
                    raise DataError(
                        f"{job.root / key.file} has changed while it was imported: delete {store.folder}, run it again."
                    )
            yield pa.Table.from_pylist([row | {"image": data} for _, row, data in group], PICTURES)

    store.write(job.target, PICTURES, tables())


def _run_jobs(run: Callable[..., Iterable], function: Callable, todo: list[Job], total: int, title: str) -> None:
    """Run what is left to do of `total` jobs, under a progress bar."""
    with tqdm(total=total, initial=total - len(todo), unit="part", desc=title, mininterval=1) as bar:
        for _ in run(function, todo):
            bar.update()


def _write_tables(store: Store, source: Source, people: list[Person], dropped: list[Dropped]) -> None:
    """users.parquet, pairs.parquet, dropped.parquet, report.json and the users' names in the source."""
    users = []
    pairs = []
    for person in people:
        history = [each for each in person.pictures if not each.heldout]
        liked = sum(each.liked for each in history)
        of_user = {"user": person.number, "split": user_split(person.number), "pairs": len(person.pairs)}
        users.append(
            of_user | {"liked": liked, "disliked": len(history) - liked, "tastes": [], "dislikes": []},
        )
        for number, (one, other) in enumerate(person.pairs):
            pairs.append(
                {
                    "user": person.number,
                    "pair": number,
                    "prompt": one.prompt,
                    "liked": one.picture,
                    "disliked": other.picture,
                    "split": one.split,
                }
            )
    store.write("users.parquet", USERS, [pa.Table.from_pylist(users, USERS)])
    store.write("pairs.parquet", PAIRS, [pa.Table.from_pylist(pairs, PAIRS)])
    order = {name: number for number, name in enumerate(RULES)}
    listed = [each._asdict() | {"unit": RULES[each.rule][0]} for each in sorted(dropped, key=lambda d: order[d.rule])]
    store.write("dropped.parquet", DROPPED, [pa.Table.from_pylist(listed, DROPPED)])
    report = {
        "rows": source.rows,
        "ratings": len(source.ratings),
        "pictures": sum(len(person.pictures) for person in people),
        "users": len(people),
        "pairs": len(pairs),
        "rules": counts(dropped, source.scale),
        "not_applied": [name for name, scale in ONLY_OF.items() if scale != source.scale],
    }
    store.write_bytes("report.json", (json.dumps(report, indent=1) + "\n").encode())
    store.write_bytes(PEOPLE, _people_csv(people))


def _people_csv(people: list[Person]) -> bytes:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["user", "name"])
    writer.writerows([person.number, person.name] for person in people)
    return lines.getvalue().encode()
