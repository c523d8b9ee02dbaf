"""A whole set of real users: choices, looks at the pictures, rules, shards, tables, card and manifest.

The rows without their pictures go through DuckDB in the set's work folder. Pictures are read twice, unit by unit: once
to judge them, once to copy the chosen ones, so a shard holds the pictures of one stretch of the source and memory does
not grow with the set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from ..schema import PAIRS, PICTURES, USERS
from ..store import ROW_GROUP, Store, shard_name, write_parquet
from . import looks, rules
from .source import Source, Unit

SHARD_ROWS, GROUP_ROWS = 131_072, 16_384  # of a set without pictures
LOOKS = pa.schema([("id", pa.int64()), ("fault", pa.string()), ("hash", pa.int64()), ("digest", pa.binary())])
IDS = pa.schema([("id", pa.int64())])
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


@dataclass(frozen=True)
class Work:
    """One unit's share, for a worker: which pictures, listed in a file, and where they go."""

    source: Source
    unit: Unit
    listed: Path  # Parquet, sorted by id
    target: str  # path of the looks, or name of the shard


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
                rules.judge(db, _look(store, source, db, partial(run, processes=processes)))
            rules.decide(db, limits)
            if not db.execute("SELECT count(*) FROM chosen").fetchall()[0][0]:
                raise DataError(
                    f"No user of {source.url} has {limits.min_liked} liked and {limits.min_disliked} disliked "
                    f"pictures: lower --min-liked and --min-disliked or take more files, and delete {store.work}."
                )
            if source.images:
                _copy(store, source, db, partial(run, processes=processes))
            else:
                _write_shards(store, db)
            _write_tables(store, source, db, limits)
        store.write_index()
        card.write(store)
        store.seal(card.versions() | {name: version(name) for name in ("imagehash", "scipy")})


def _read(store: Store, source: Source, limits: rules.Limits, memory: str, threads: int) -> duckdb.DuckDBPyConnection:
    """The database of choices; made under another name first, so that one that is there is whole."""
    whole, half = store.work / "choices.duckdb", store.work / "choices.half.duckdb"
    if not whole.exists():
        for old in store.work.glob("choices.half.*"):
            if old.is_file():
                old.unlink()
        with closing(rules.connect(half, memory, threads)) as db:
            rules.read(db, source, limits)
            db.execute("CHECKPOINT")
        half.rename(whole)
    return rules.connect(whole, memory, threads)


def _look(store: Store, source: Source, db: duckdb.DuckDBPyConnection, run: engine.Engine) -> list[str]:
    """Judge every picture that a choice names, at its first place. Returns the files of LOOKS."""
    jobs = []
    for number, unit in enumerate(source.units):
        listed, target = (store.work / kind / f"{number:05d}.parquet" for kind in ("listed", "looks"))
        jobs.append(Work(source, unit, listed, str(target)))
        if not target.exists():
            write_parquet(listed, IDS, _tables(db, f"SELECT id FROM pictures WHERE {_inside(unit)} ORDER BY id", IDS))
    todo = [job for job in jobs if not Path(job.target).exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="unit", desc="look", mininterval=1) as bar:
        for _ in run(look_at_unit, todo):
            bar.update()
    return [job.target for job in jobs]


def look_at_unit(work: Work) -> None:
    """Write LOOKS of one unit's listed pictures."""
    ids = pq.read_table(work.listed, partitioning=None)["id"].to_numpy()

    def tables() -> Iterator[pa.Table]:
        pictures = zip(ids.tolist(), work.source.pictures(work.unit, ids), strict=True)
        seen = ((place, *looks.look(data)) for place, data in pictures)
        while some := list(islice(seen, GROUP_ROWS)):
            columns = zip(zip(*some, strict=True), LOOKS.types, strict=True)
            yield pa.table([pa.array(values, kind) for values, kind in columns], LOOKS)

    write_parquet(Path(work.target), LOOKS, tables())


def _copy(store: Store, source: Source, db: duckdb.DuckDBPyConnection, run: engine.Engine) -> None:
    """A shard for every unit that has chosen pictures, in the order of the source."""
    fields = pa.schema([("id", pa.int64()), *(field for field in PICTURES if field.name != "image")])
    jobs = []
    for unit_number, unit in enumerate(source.units):
        if db.execute(f"SELECT count(*) FROM chosen WHERE {_inside(unit)}").fetchall()[0][0]:
            listed, name = store.work / "chosen" / f"{unit_number:05d}.parquet", shard_name(len(jobs))
            jobs.append(Work(source, unit, listed, name))
            if not store.finished(name):
                write_parquet(
                    listed, fields, _tables(db, f"FROM chosen WHERE {_inside(unit)} ORDER BY id, user", fields)
                )
    todo = [job for job in jobs if not store.finished(job.target)]
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="shard", desc="copy", mininterval=1) as bar:
        for _ in run(partial(copy_unit, store), todo):
            bar.update()


def copy_unit(store: Store, work: Work) -> None:
    """Write one shard: the chosen pictures of a unit, with their bytes as published."""
    store.write(work.target, PICTURES, _with_images(work))


def _with_images(work: Work) -> Iterator[pa.Table]:
    chosen = pq.read_table(work.listed, partitioning=None)
    places, repeats = np.unique(chosen["id"].to_numpy(), return_counts=True)  # one picture may be of several users
    images, start = [], 0
    for data, times in zip(work.source.pictures(work.unit, places), repeats.tolist(), strict=True):
        images += [data] * times
        if len(images) >= ROW_GROUP:
            yield _pictures(chosen.slice(start, len(images)), images)
            start, images = start + len(images), []
    if images:
        yield _pictures(chosen.slice(start), images)


def _pictures(rows: pa.Table, images: list[bytes]) -> pa.Table:
    return pa.table([pa.array(images, pa.binary()), *(rows[name] for name in PICTURES.names[1:])], PICTURES)


def _write_shards(store: Store, db: duckdb.DuckDBPyConnection) -> None:
    """The shards of a set without pictures, in the order of users and items."""
    db.execute("CREATE TEMP TABLE numbered AS SELECT *, row_number() OVER (ORDER BY user, item) - 1 AS n FROM chosen")
    rows = db.execute("SELECT count(*) FROM numbered").fetchall()[0][0]
    for number in range(-(-rows // SHARD_ROWS)):
        start = number * SHARD_ROWS
        query = f"FROM numbered WHERE n BETWEEN {start} AND {start + SHARD_ROWS - 1} ORDER BY n"
        store.write(shard_name(number), PICTURES, _tables(db, query, PICTURES))


def _write_tables(store: Store, source: Source, db: duckdb.DuckDBPyConnection, limits: rules.Limits) -> None:
    store.write(
        "users.parquet",
        USERS,
        _tables(
            db,
            """SELECT user, any_value(users.split) AS split,
            count(*) FILTER (verdict = 'liked' AND NOT heldout) AS liked,
            count(*) FILTER (verdict = 'disliked' AND NOT heldout) AS disliked, count(*) FILTER (heldout) // 2 AS pairs
            FROM chosen JOIN users USING (user) GROUP BY user ORDER BY user""",
            USERS,
        ),
    )
    store.write(
        "pairs.parquet",
        PAIRS,
        _tables(
            db,
            """SELECT held.user, pair, l.prompt, l.picture AS liked, d.picture AS disliked, l.split FROM held
            JOIN chosen l ON l.user = held.user AND l.id = liked JOIN chosen d ON d.user = held.user AND d.id = disliked
            ORDER BY held.user, pair""",
            PAIRS,
        ),
    )
    store.write("dropped.parquet", DROPPED, _dropped(db, source))
    idle = set() if source.images else set(rules.IMAGE_RULES)
    idle |= set() if limits.nsfw_words else {rules.NSFW}
    totals = {"rows": sum(source.rows), "choices": db.execute("SELECT count(*) FROM live").fetchall()[0][0]}
    totals["pictures"] = db.execute("SELECT count(*) FROM chosen").fetchall()[0][0]
    for table in ("sides", "held"):
        totals["users" if table == "sides" else "pairs"] = db.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]
    applied = [name for name in rules.RULES if name not in idle]
    report = totals | {"rules": rules.counts(db, applied), "not_applied": [n for n in rules.RULES if n in idle]}
    store.write_bytes("report.json", (json.dumps(report, indent=1) + "\n").encode())


def _dropped(db: duckdb.DuckDBPyConnection, source: Source) -> Iterator[pa.Table]:
    """DROPPED in the order of the rules."""
    order = " ".join(f"WHEN '{name}' THEN {i}" for i, name in enumerate(rules.RULES))
    starts = np.concatenate([[0], np.cumsum(source.rows)])
    db.register("starts", pa.table({"file": list(source.files), "start": starts[:-1], "stop": starts[1:]}))
    yield from _tables(
        db,
        f"""SELECT rule, unit, file, number - start AS row, uid AS picture, user FROM gone
        LEFT JOIN pictures ON pictures.id = gone.picture
        LEFT JOIN starts ON number >= start AND number < stop
        ORDER BY CASE rule {order} END, number, user, gone.picture""",
        DROPPED,
    )
    db.unregister("starts")


def _inside(unit: Unit) -> str:
    return f"id >= {2 * unit.start} AND id < {2 * (unit.start + unit.rows)}"


def _tables(db: duckdb.DuckDBPyConnection, query: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """A query's rows as tables of a schema, streamed; columns that the query lacks are empty lists or null."""
    for batch in db.sql(query).to_arrow_reader(GROUP_ROWS):
        columns = []
        for field in schema:
            if field.name in batch.schema.names:
                columns.append(batch.column(field.name).cast(field.type))
            elif pa.types.is_list(field.type):
                columns.append(pa.array([[]] * len(batch), field.type))
            else:
                columns.append(pa.nulls(len(batch), field.type))
        yield pa.table(columns, schema)
