"""A whole set of real users: choices, looks at the pictures, rules, shards, tables, card and manifest.

The rows without their pictures go through DuckDB in the set's work folder. Pictures are read twice, unit by unit: once
to judge them, once to copy the chosen ones, so a shard holds the pictures of one stretch of the source and memory does
not grow with the set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .. import card, duck, engine
from ..errors import DataError
from ..schema import DISLIKED, LIKED, PAIRS, PICTURES, USERS
from ..store import ROW_GROUP, Store, shard_name, write_parquet
from . import looks, rules
from .source import Source, Unit

SHARD_ROWS = 131_072  # of a set without pictures
LOOKS_ROWS = 16_384  # in memory at once
LOOKS = pa.schema([("id", pa.int64()), ("fault", pa.string()), ("hash", pa.int64()), ("digest", pa.binary())])
IDS = pa.schema([("id", pa.int64())])
CHOSEN = pa.schema([("id", pa.int64()), *(field for field in PICTURES if field.name != "image")])
DROPPED = pa.schema(
    [
        ("rule", pa.string()),
        ("unit", pa.string()),  # what was dropped: a row, a picture, a picture of one user, or a user
        ("file", pa.string()),  # of a row, with its number in there
        ("row", pa.int64()),
        ("picture", pa.string()),
        ("user", pa.int64()),
    ]
)


def make(
    source: Source,
    folder: Path,
    limits: rules.Limits,
    unit_mb: int,
    processes: int = 0,
    memory: str = "700MB",
    run: engine.Engine = engine.run,
) -> None:
    """Write the set, or what is missing of it. memory: DuckDB's, the only part that could want more.

    run: an engine's, for the jobs that read pictures. Ray's tasks see the source and the folder under the same paths.
    """
    config = {"kind": "pickapic", "source_sha256": source.digest, "unit_mb": unit_mb} | limits.config()
    run = partial(run, processes=processes)
    duck.check_place(folder)
    store = Store(folder, config)
    if store.done:
        print(f"{folder} is finished already.")
        return
    with store.lock(), duck.explained(store.work, "--memory"):
        if store.done:
            return
        with closing(_read(store, source, limits, memory, processes or engine.cores())) as db:
            rules.start(db)
            if source.images:
                rules.judge_pictures(db, _look(store, source, db, run))
            rules.decide(db, limits)
            if not duck.scalar(db, "SELECT count(*) FROM chosen"):
                raise DataError(
                    f"No user of {source.url} has {limits.min_liked} liked and {limits.min_disliked} disliked "
                    f"pictures: lower --min-liked and --min-disliked or take more files, and delete {store.work}."
                )
            if source.images:
                _copy(store, source, db, run)
            else:
                _write_shards(store, db)
            _write_tables(store, source, db, limits)
        store.write_index()
        card.write(store)
        store.seal(card.versions() | {name: version(name) for name in ("imagehash", "scipy")})


def _read(store: Store, source: Source, limits: rules.Limits, memory: str, threads: int) -> duckdb.DuckDBPyConnection:
    """The database of choices; made under another name first, so that one that is there is complete."""
    complete = store.work / "choices.duckdb"
    half = store.work / "choices.half.duckdb"
    if not complete.exists():
        for leftover in store.work.glob("choices.half.*"):
            if leftover.is_file():
                leftover.unlink()
        with closing(rules.connect(half, memory, threads)) as db:
            rules.read(db, source, limits)
            db.execute("CHECKPOINT")
        half.rename(complete)
    return rules.connect(complete, memory, threads)


@dataclass(frozen=True)
class Job:
    """One unit's pictures, for a worker."""

    source: Source
    unit: Unit
    listed: Path  # Parquet, sorted by id: which pictures
    target: str  # path of the looks, or name of the shard


def _look(store: Store, source: Source, db: duckdb.DuckDBPyConnection, run: engine.Engine) -> list[str]:
    """Judge every picture that a choice names, at its first place. Returns the files of LOOKS."""
    jobs = []
    for number, unit in enumerate(source.units):
        file = f"{number:05d}.parquet"
        job = Job(source, unit, store.work / "listed" / file, str(store.work / "looks" / file))
        jobs.append(job)
        if not Path(job.target).exists():
            query = f"SELECT id FROM pictures WHERE {_inside(unit)} ORDER BY id"
            write_parquet(job.listed, IDS, duck.stream(db, query, IDS))
    todo = [job for job in jobs if not Path(job.target).exists()]
    _run_jobs(partial(run, look_at_unit), todo, len(jobs), "look")
    return [job.target for job in jobs]


def look_at_unit(job: Job) -> None:
    """Write LOOKS of one unit's listed pictures."""
    ids = pq.read_table(job.listed, partitioning=None)["id"].to_numpy()

    def tables() -> Iterator[pa.Table]:
        images = zip(ids.tolist(), job.source.pictures(job.unit, ids), strict=True)
        rows = ((place, *looks.look(data)) for place, data in images)
        while group := list(islice(rows, LOOKS_ROWS)):
            columns = zip(*group, strict=True)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, LOOKS, strict=True)]
            yield pa.table(arrays, LOOKS)

    write_parquet(Path(job.target), LOOKS, tables())


def _copy(store: Store, source: Source, db: duckdb.DuckDBPyConnection, run: engine.Engine) -> None:
    """A shard for every unit that has chosen pictures, in the order of the source."""
    jobs = []
    for number, unit in enumerate(source.units):
        if not duck.scalar(db, f"SELECT count(*) FROM chosen WHERE {_inside(unit)}"):
            continue
        job = Job(source, unit, store.work / "chosen" / f"{number:05d}.parquet", shard_name(len(jobs)))
        jobs.append(job)
        if not store.finished(job.target):
            query = f"FROM chosen WHERE {_inside(unit)} ORDER BY id, user"
            write_parquet(job.listed, CHOSEN, duck.stream(db, query, CHOSEN))
    todo = [job for job in jobs if not store.finished(job.target)]
    _run_jobs(partial(run, partial(copy_unit, store)), todo, len(jobs), "copy")


def copy_unit(store: Store, job: Job) -> None:
    """Write one shard: the chosen pictures of a unit, with their bytes as published."""
    store.write(job.target, PICTURES, _with_images(job))


def _with_images(job: Job) -> Iterator[pa.Table]:
    chosen = pq.read_table(job.listed, partitioning=None)
    places, repeats = np.unique(chosen["id"].to_numpy(), return_counts=True)  # one picture may be of several users
    images: list[bytes | None] = []
    start = 0
    for data, times in zip(job.source.pictures(job.unit, places), repeats.tolist(), strict=True):
        images += [data] * times
        if len(images) >= ROW_GROUP:
            yield _pictures(chosen.slice(start, len(images)), images)
            start += len(images)
            images = []
    if images:
        yield _pictures(chosen.slice(start), images)


def _pictures(rows: pa.Table, images: list[bytes | None]) -> pa.Table:
    return pa.table([pa.array(images, pa.binary()), *(rows[name] for name in PICTURES.names[1:])], PICTURES)


def _run_jobs(run: Callable[[list[Job]], Iterable], todo: list[Job], total: int, title: str) -> None:
    """Run what is left to do of `total` jobs, under a progress bar."""
    with tqdm(total=total, initial=total - len(todo), unit="unit", desc=title, mininterval=1) as bar:
        for _ in run(todo):
            bar.update()


def _write_shards(store: Store, db: duckdb.DuckDBPyConnection) -> None:
    """The shards of a set without pictures, in the order of users and items."""
    db.execute("CREATE TEMP TABLE numbered AS SELECT *, row_number() OVER (ORDER BY user, item) - 1 AS n FROM chosen")
    rows = duck.scalar(db, "SELECT count(*) FROM numbered")
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        query = f"FROM numbered WHERE n BETWEEN {start} AND {start + SHARD_ROWS - 1} ORDER BY n"
        store.write(shard_name(number), PICTURES, duck.stream(db, query, PICTURES))


def _write_tables(store: Store, source: Source, db: duckdb.DuckDBPyConnection, limits: rules.Limits) -> None:
    """users.parquet, pairs.parquet, dropped.parquet and report.json."""
    users = f"""SELECT user, any_value(users.split) AS split,
        count(*) FILTER (verdict = '{LIKED}' AND NOT heldout) AS liked,
        count(*) FILTER (verdict = '{DISLIKED}' AND NOT heldout) AS disliked, count(*) FILTER (heldout) // 2 AS pairs
        FROM chosen JOIN users USING (user) GROUP BY user ORDER BY user"""
    store.write("users.parquet", USERS, duck.stream(db, users, USERS))
    pairs = """SELECT pairs.user, pair, l.prompt, l.picture AS liked, d.picture AS disliked, l.split FROM pairs
        JOIN chosen l ON l.user = pairs.user AND l.id = liked JOIN chosen d ON d.user = pairs.user AND d.id = disliked
        ORDER BY pairs.user, pair"""
    store.write("pairs.parquet", PAIRS, duck.stream(db, pairs, PAIRS))
    store.write("dropped.parquet", DROPPED, _dropped(db, source))
    store.write_bytes("report.json", (json.dumps(_report(db, source, limits), indent=1) + "\n").encode())


def _report(db: duckdb.DuckDBPyConnection, source: Source, limits: rules.Limits) -> dict:
    """How many rows came in, what came out, and what each rule dropped."""
    idle = set() if source.images else set(rules.IMAGE_RULES)
    if not limits.nsfw_words:
        idle.add(rules.NSFW)
    tables = {"choices": "live", "pictures": "chosen", "users": "sides", "pairs": "pairs"}
    totals = {name: duck.scalar(db, f"SELECT count(*) FROM {table}") for name, table in tables.items()}
    applied = rules.counts(db, [name for name in rules.RULES if name not in idle])
    not_applied = [name for name in rules.RULES if name in idle]
    return {"rows": sum(source.rows)} | totals | {"rules": applied, "not_applied": not_applied}


def _dropped(db: duckdb.DuckDBPyConnection, source: Source) -> Iterator[pa.Table]:
    """DROPPED in the order of the rules."""
    order = " ".join(f"WHEN '{name}' THEN {i}" for i, name in enumerate(rules.RULES))
    starts = np.concatenate([[0], np.cumsum(source.rows)])
    db.register("starts", pa.table({"file": list(source.files), "start": starts[:-1], "stop": starts[1:]}))
    yield from duck.stream(
        db,
        f"""SELECT rule, unit, file, number - start AS row, uid AS picture, user FROM gone
        LEFT JOIN pictures ON pictures.id = gone.picture
        LEFT JOIN starts ON number >= start AND number < stop
        ORDER BY CASE rule {order} END, number, user, gone.picture""",
        DROPPED,
    )
    db.unregister("starts")


def _inside(unit: Unit) -> str:
    """SQL: whether a picture's id lies in a unit."""
    return f"id >= {2 * unit.start} AND id < {2 * (unit.start + unit.rows)}"
