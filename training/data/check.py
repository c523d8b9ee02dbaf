"""Whether a set is what it says: checksums, schema, index, leakage, balance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prefgen.files import file_sha256, read_text, visible_files
from prefgen.pictures import PUBLISHED, PictureError, read_picture

from . import card
from .errors import DataError
from .schema import DISLIKED, FORMAT_VERSION, INDEX, LIKED, MIXED, PAIRS, PICTURES, TEST, TRAIN, USERS, normal_prompt
from .store import MANIFEST, shards_of

BALANCE = (0.35, 0.65)  # share of liked pictures, over all histories


def check(folder: Path, pictures: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield (what was checked, its faults, a sentence each) in turn; the contents of damaged files are left alone.

    pictures: also decode every image. DataError when the folder is no finished set.
    """
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder} has no {MANIFEST}: it is no data set, or its making was not finished.")
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        version, files = manifest["format"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}): make the set again.") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{folder} has format {version}; this version reads format {FORMAT_VERSION}.")
    damaged = False
    for name, test in (("files and checksums", _files), ("schema", _schemas)):
        faults = list(test(folder, files))
        damaged |= bool(faults)
        yield name, faults
    if damaged:
        return
    with card.database(folder) as db:
        relational: dict[str, Callable] = {
            "index": _index,
            "leakage": _leakage,
            "held-out pairs": _pairs,
            "users": _users,
            "balance": _balance,
        }
        for name, test in relational.items():
            yield name, list(test(db, folder))
    if pictures:
        yield "pictures", list(_pictures(folder))


def _files(folder: Path, files: dict) -> Iterator[str]:
    for name, entry in files.items():
        path = folder / name
        if not path.exists():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        elif file_sha256(path) != entry["sha256"]:
            yield f"{name} has another checksum"
    present = {p.relative_to(folder) for p in visible_files(folder, "**/*")}
    present = {p.as_posix() for p in present} - {MANIFEST}
    yield from (f"{name} is not in the manifest" for name in sorted(present - set(files)))


def _schemas(folder: Path, files: dict) -> Iterator[str]:
    tables = {"users.parquet": USERS, "pairs.parquet": PAIRS, "index.parquet": INDEX}
    for name in files:
        wanted = PICTURES if name.startswith("pictures/") else tables.get(name)
        if wanted is None or not (folder / name).exists():
            continue
        try:
            found = pq.read_schema(folder / name)
        except (pa.ArrowException, OSError):
            yield f"{name} is no whole Parquet file: it was cut short or overwritten"
            continue
        for field in wanted:
            place = found.get_field_index(field.name)
            if place < 0:
                yield f"{name} lacks the column {field.name!r}"
            elif found.field(place).type != field.type:
                yield f"{name} has the column {field.name!r} as {found.field(place).type} instead of {field.type}"
        yield from (f"{name} has an unknown column {c!r}" for c in found.names if c not in wanted.names)
    yield from (f"the manifest knows no {name}" for name in tables if name not in files)


def _index(db, folder: Path) -> Iterator[str]:
    shards = shards_of(folder)
    known = PICTURES.names[1:]
    for number, shard in enumerate(shards):
        there = pq.read_table(shard, columns=known, partitioning=None)
        mine = [("shard", "=", number)]
        listed = pq.read_table(folder / "index.parquet", filters=mine, partitioning=None).sort_by("row")
        if listed["row"].to_pylist() != list(range(len(there))):
            yield f"{shard.name} holds {len(there)} pictures, the index lists {len(listed)} or not each once"
        elif not listed.select(known).equals(there):
            yield f"the index says other things about the pictures of {shard.name} than the shard"
    lost = db.execute("SELECT count(*) FROM pictures WHERE shard NOT BETWEEN 0 AND ?", [len(shards) - 1]).fetchone()[0]
    if lost:
        yield f"{lost} pictures of the index are in no shard"
    twice = db.execute(
        "SELECT count(*) FROM (SELECT 1 FROM pictures GROUP BY user, picture HAVING count(*) > 1)"
    ).fetchone()[0]
    if twice:
        yield f"{twice} pictures come twice for one user"
    other = db.execute(f"SELECT count(*) FROM pictures WHERE verdict NOT IN ('{LIKED}', '{DISLIKED}')").fetchone()[0]
    if other:
        yield f"{other} pictures have a verdict that is neither {LIKED} nor {DISLIKED}"


def _leakage(db, folder: Path) -> Iterator[str]:
    for column in ("user", "picture"):
        both = db.execute(
            f"SELECT count(*) FROM (SELECT {column} FROM pictures WHERE split IN (?, ?) "
            "GROUP BY 1 HAVING count(DISTINCT split) > 1)",
            [TRAIN, TEST],
        ).fetchone()[0]
        if both:
            yield f"{both} {column}s are in {TRAIN} and in {TEST}"
    sides = {
        part: {
            normal_prompt(p)
            for (p,) in db.execute("SELECT DISTINCT prompt FROM pictures WHERE split = ?", [part]).fetchall()
        }
        for part in (TRAIN, TEST)
    }
    both = sides[TRAIN] & sides[TEST]
    if both:
        yield f"{len(both)} prompts are in {TRAIN} and in {TEST}, such as {min(both)!r}"
    moved = db.execute(
        "SELECT count(*) FROM pictures LEFT JOIN users USING (user) "
        f"WHERE pictures.split IS DISTINCT FROM users.split AND pictures.split IS DISTINCT FROM '{MIXED}'"
    ).fetchone()[0]
    if moved:
        yield f"{moved} pictures are in another split than their user in users.parquet"


def _pairs(db, folder: Path) -> Iterator[str]:
    for verdict in (LIKED, DISLIKED):
        wrong = db.execute(
            "SELECT count(*) FROM pairs LEFT JOIN pictures "
            f"ON pictures.user = pairs.user AND picture = pairs.{verdict} "
            "WHERE verdict IS DISTINCT FROM ? OR NOT heldout OR pictures.split != pairs.split",
            [verdict],
        ).fetchone()[0]
        if wrong:
            yield f"{wrong} pairs name a {verdict} picture that is missing, not held out, of another split or verdict"
    idle = db.execute(
        "SELECT count(*) FROM pictures WHERE heldout AND NOT EXISTS (SELECT 1 FROM pairs "
        "WHERE pairs.user = pictures.user AND picture IN (pairs.liked, pairs.disliked))"
    ).fetchone()[0]
    if idle:
        yield f"{idle} pictures are held out and in no pair"


def _users(db, folder: Path) -> Iterator[str]:
    wrong = db.execute(
        f"""SELECT count(*) FROM users FULL JOIN (
            SELECT user, count(*) FILTER (verdict = '{LIKED}' AND NOT heldout) a,
                   count(*) FILTER (verdict = '{DISLIKED}' AND NOT heldout) b FROM pictures GROUP BY user
        ) counted USING (user) WHERE liked IS DISTINCT FROM a OR disliked IS DISTINCT FROM b"""
    ).fetchone()[0]
    if wrong:
        yield f"{wrong} users have other numbers of pictures than users.parquet says"


def _balance(db, folder: Path) -> Iterator[str]:
    share = db.execute(f"SELECT avg((verdict = '{LIKED}')::INT) FROM pictures WHERE NOT heldout").fetchone()[0]
    if share is not None and not BALANCE[0] <= share <= BALANCE[1]:
        yield f"{share:.0%} of the histories' pictures are liked: outside {BALANCE[0]:.0%} to {BALANCE[1]:.0%}"
    lone = db.execute("SELECT count(*) FROM users WHERE liked = 0 OR disliked = 0").fetchone()[0]
    if lone:
        yield f"{lone} users like everything or nothing"


def _pictures(folder: Path) -> Iterator[str]:
    for shard in shards_of(folder):
        row = 0
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(256, columns=["image"]):
                for data in batch.column(0):
                    if data.is_valid:
                        try:
                            read_picture(data.as_py(), formats=PUBLISHED)
                        except PictureError as error:
                            yield f"{shard.name}: the picture of row {row} can't be decoded ({error.reason})"
                    row += 1
