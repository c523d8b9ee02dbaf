"""A whole set out of published pickles: rows, rules, shards, tables, card and manifest.

One pickle at a time is unfolded in memory and leaves Parquet in the set's work folder: its rows, and each of its
pictures once, in stretches. All else reads those, so memory does not grow with the number of files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..data import card, duck, engine
from ..data.errors import DataError
from ..data.schema import PAIRS, PICTURES, USERS
from ..data.store import ROW_GROUP, Store, shard_name, write_parquet
from ..pickapic.make import _tables
from . import rules
from .layouts import AGENTS, FRAMES, Options, Source, detect
from .unpickler import load

SUFFIXES = (".pkl", ".pickle")
BATCH = 16_384  # rows of a table
SHIFT = 40  # a row's number is its file's << SHIFT plus its place in there
NAMED = pa.schema([("name", pa.string()), ("metadata", pa.string())])
NOTE = pa.schema([("layout", pa.string()), ("dropped", pa.string())])
IMAGES = pa.schema([("image", pa.binary())])
LISTED = pa.schema(
    [("place", pa.int64()), ("file", pa.string()), *(field for field in PICTURES if field.name != "image")]
)
SOURCE_USERS = pa.schema([("user", pa.int64()), ("name", pa.string()), ("metadata", pa.string())])


@dataclass(frozen=True)
class Stretch:
    """Consecutive pictures of one file, for a worker: the chosen ones, where their bytes are, the shard they become."""

    listed: Path  # Parquet of LISTED, sorted by place
    images: Path  # Parquet of IMAGES, or the folder of the pictures' files
    name: str


def find(path: Path) -> list[Path]:
    """One file, or the pickles of a folder by their names."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise DataError(
                f"{path} has no file {' or '.join('*' + s for s in SUFFIXES)}: name the folder of the data."
            )
        return found
    if not path.is_file():
        raise DataError(f"There is no {path}: name a pickle or a folder of them.")
    return [path]


def make(source: Path, folder: Path, options: Options, unit_mb: int, processes: int = 0, memory: str = "700MB") -> None:
    """Write the set, or what is missing of it. memory: DuckDB's."""
    files = find(source)
    listed = json.dumps([(p.name, p.stat().st_size) for p in files]).encode()
    config = {"kind": "import", "source_sha256": hashlib.sha256(listed).hexdigest(), "unit_mb": unit_mb}
    store = Store(folder, config | options.config())
    if store.done:
        print(f"{folder} is finished already.")
        return
    with store.lock(), duck.explained(store.work):
        if store.done:
            return
        with tqdm(files, unit="file", desc="read", mininterval=1) as bar:
            read = [_read(store, number, path, options, unit_mb << 20) for number, path in enumerate(bar)]
        layout = _one_layout(files, read)
        users = _users(store, len(files))
        with closing(rules.connect(store.work / "spill", memory, processes or engine.cores())) as db:
            paths = [[str(_part(store, kind, number)) for number in range(len(files))] for kind in ("rows", "places")]
            dropped = rules.decide(db, *paths, list(users))
            for facts in read:
                dropped.update(facts["dropped"])
            if not rules.count(db, "chosen"):
                raise DataError(f"{source} has no picture that stays ({_most(dropped)}): nothing was made of it.")
            _copy(store, options, layout, db, processes)
            _write_tables(store, db, users, layout, dropped)
        store.write_index()
        card.write(store)
        store.seal(card.versions())


def _part(store: Store, kind: str, number: int) -> Path:
    return store.work / kind / f"{number:05d}.parquet"


def _read(store: Store, number: int, path: Path, options: Options, unit_bytes: int) -> dict:
    """Leave one pickle's rows, users, pictures and their places in the work folder. Returns what is noted of it."""
    note = _part(store, "read", number)
    if not note.exists():
        content = load(path)
        layout = detect(path, content)
        source = Source(path, options)
        if layout == FRAMES and (options != Options()):
            raise DataError(f"{path} has its pictures and users in itself: leave the options of the other layout out.")
        start = number << SHIFT
        write_parquet(_part(store, "rows", number), rules.ROWS, _numbered(source.rows(layout, content), start))
        content = None
        write_parquet(_part(store, "users", number), NAMED, _chunks(source.users.items(), NAMED))
        units = _units(source.sizes, unit_bytes)
        write_parquet(
            _part(store, "places", number), rules.PLACES, _chunks(_places(source, number, units), rules.PLACES)
        )
        if layout == FRAMES:
            pictures = zip(units, source.pictures.values(), strict=True)
            for unit, some in groupby(pictures, key=lambda picture: picture[0]):
                some = ((data,) for _, data in some)
                write_parquet(_images(store, number, unit), IMAGES, _chunks(some, IMAGES, ROW_GROUP))
        write_parquet(note, NOTE, _chunks([(layout, json.dumps(source.dropped))], NOTE))
    layout, dropped = pq.read_table(note).to_pylist()[0].values()
    return {"layout": layout, "dropped": json.loads(dropped)}


def _images(store: Store, number: int, unit: int) -> Path:
    return store.work / "images" / f"{number:05d}-{unit:05d}.parquet"


def _numbered(rows: Iterable[tuple], start: int) -> Iterator[pa.Table]:
    numbered = (
        (start + n, row.user, start + row.number, row.asked, row.verdict, row.prompt, row.picture)
        for n, row in enumerate(rows)
    )
    return _chunks(numbered, rules.ROWS)


def _chunks(rows: Iterable[tuple], schema: pa.Schema, size: int = BATCH) -> Iterator[pa.Table]:
    rows = iter(rows)
    while some := list(islice(rows, size)):
        columns = zip(zip(*some, strict=True), schema.types, strict=True)
        yield pa.table([pa.array(values, kind) for values, kind in columns], schema)


def _units(sizes: dict[str, int], unit_bytes: int) -> list[int]:
    """The stretch of each picture: consecutive ones of about so many bytes."""
    units, unit, held = [], 0, 0
    for size in sizes.values():
        if held and held + size > unit_bytes:
            unit, held = unit + 1, 0
        held += size
        units.append(unit)
    return units


def _places(source: Source, number: int, units: list[int]) -> Iterator[tuple]:
    starts: dict[int, int] = {}
    for place, (unit, (name, content)) in enumerate(zip(units, source.pictures.items(), strict=True)):
        start = starts.setdefault(unit, place)
        yield name, number, unit, place - start, content if isinstance(content, str) else None


def _one_layout(files: list[Path], read: list[dict]) -> str:
    layout = read[0]["layout"]
    for path, facts in zip(files, read, strict=True):
        if facts["layout"] != layout:
            raise DataError(f"{path} has the layout {facts['layout']!r}, unlike {files[0]}: read them apart.")
    if layout == AGENTS and len(files) > 1:
        raise DataError(f"{files[0]} and {files[1]} have users of their own: read them into a set each.")
    return layout


def _users(store: Store, files: int) -> dict[str, str | None]:
    """{name: metadata} of all users in the order of the files."""
    users: dict[str, str | None] = {}
    for number in range(files):
        table = pq.read_table(_part(store, "users", number)).to_pydict()
        for name, metadata in zip(table["name"], table["metadata"], strict=True):
            users.setdefault(name, metadata)
    return users


def _most(dropped: Counter) -> str:
    most = [f"{rule}: {n:,}" for rule, n in dropped.most_common(3) if n]
    return ", ".join(most) or "there is none in it"


def _copy(store: Store, options: Options, layout: str, db: duckdb.DuckDBPyConnection, processes: int) -> None:
    """A shard for every stretch that has chosen pictures, in the order of the files."""
    jobs = []
    stretches = db.execute("SELECT DISTINCT source, unit FROM chosen ORDER BY source, unit").fetchall()
    for source, unit in stretches:
        listed, name = store.work / "chosen" / f"{len(jobs):05d}.parquet", shard_name(len(jobs))
        images = _images(store, source, unit) if layout == FRAMES else options.images
        jobs.append(Stretch(listed, images, name))
        if not store.finished(name):
            query = f"FROM chosen WHERE source = {source} AND unit = {unit} ORDER BY place, user"
            write_parquet(listed, LISTED, _tables(db, query, LISTED))
    todo = [job for job in jobs if not store.finished(job.name)]
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="shard", desc="copy", mininterval=1) as bar:
        for _ in engine.run(partial(copy_stretch, store), todo, processes):
            bar.update()


def copy_stretch(store: Store, stretch: Stretch) -> None:
    """Write one shard: the chosen pictures of a stretch, with their bytes as published."""
    store.write(stretch.name, PICTURES, _with_images(stretch))


def _with_images(stretch: Stretch) -> Iterator[pa.Table]:
    rows = pq.read_table(stretch.listed)
    places = zip(rows["place"].to_pylist(), rows["file"].to_pylist(), strict=True)
    contents = _contents(stretch, places)
    for start in range(0, len(rows), ROW_GROUP):
        some = rows.slice(start, ROW_GROUP)
        images = pa.array(list(islice(contents, ROW_GROUP)), pa.binary())
        yield pa.table([images, *(some[name] for name in PICTURES.names[1:])], PICTURES)


def _contents(stretch: Stretch, places: Iterable[tuple[int, str | None]]) -> Iterator[bytes]:
    """The bytes of each place, read once however often it comes in a row."""
    stream = enumerate(_streamed(stretch.images)) if stretch.images.is_file() else None
    at, data = -1, b""
    for place, file in places:
        if place != at and stream is None:
            data = _picture(stretch.images / str(file))
            at = place
        while place != at:
            at, data = next(stream)
        yield data


def _streamed(path: Path) -> Iterator[bytes]:
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        for batch in file.iter_batches(32):
            yield from (data.as_py() for data in batch.column(0))


def _picture(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} was there when the pictures were counted and can't be read now ({error.strerror}): put it back "
            "and run the same command again."
        ) from error


def _write_tables(
    store: Store, db: duckdb.DuckDBPyConnection, users: dict[str, str | None], layout: str, dropped: Counter
) -> None:
    query = """SELECT user, any_value(people.split) AS split,
        count(*) FILTER (verdict = 'liked' AND NOT heldout) AS liked,
        count(*) FILTER (verdict = 'disliked' AND NOT heldout) AS disliked, any_value(coalesce(pairs, 0)) AS pairs
        FROM chosen JOIN (SELECT number AS user, split FROM people) people USING (user)
        LEFT JOIN (SELECT number AS user, count(*) AS pairs FROM held JOIN people USING (user) GROUP BY number)
        USING (user)
        GROUP BY user ORDER BY user"""
    store.write("users.parquet", USERS, _tables(db, query, USERS))
    query = """SELECT chosen.user, pair, held.prompt, liked, disliked, chosen.split FROM held
        JOIN people USING (user) JOIN chosen ON chosen.user = number AND chosen.picture = liked
        ORDER BY chosen.user, pair"""
    store.write("pairs.parquet", PAIRS, _tables(db, query, PAIRS))
    named = zip(rules.user_numbers(list(users)), users, users.values(), strict=True)
    store.write("source_users.parquet", SOURCE_USERS, _chunks(sorted(named), SOURCE_USERS))
    totals = {
        "layout": layout,
        "source_users": len(users),
        "users": rules.count(db, "(SELECT DISTINCT user FROM chosen)"),
    }
    totals |= {"pictures": rules.count(db, "chosen"), "pairs": rules.count(db, "held")}
    report = totals | {"rules": rules.counts(dropped, layout)}
    store.write_bytes("report.json", (json.dumps(report, indent=1) + "\n").encode())
