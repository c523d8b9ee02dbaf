"""Whether a set is what it says: checksums, schema, index, leakage, held-out pairs, counts, balance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from prefgen.files import file_sha256, read_text, visible_files
from prefgen.pictures import PUBLISHED, PictureError, read_picture

from .duck import open_set, scalar
from .errors import DataError
from .schema import DISLIKED, FORMAT_VERSION, INDEX, LIKED, MIXED, PAIRS, PICTURES, TEST, TRAIN, USERS, normal_prompt
from .store import MANIFEST, TRAITS, shards_of

# Share of liked pictures over all histories. Agents have one half; Pick-a-Pic's --ratio 1.8 leaves 36 % to 64 %.
BALANCE = (0.35, 0.65)


def check(folder: Path, pictures: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield (what was checked, its faults, a sentence each) in turn; the contents of damaged files are left alone.

    pictures: also decode every image. DataError when the folder is no finished set.
    """
    files = _manifest_files(folder)
    file_faults = list(_files(folder, files))
    yield "files and checksums", file_faults
    schema_faults = list(_schemas(folder, files))
    yield "schema", schema_faults
    if file_faults or schema_faults:
        return
    with open_set(folder) as db:
        more = {"index": _index_and_shards(db, folder), "leakage": _leaked_prompts(db), "balance": _balance(db)}
        for name in COUNTS:
            yield name, [*more.get(name, ()), *_counted(db, name)]
    if pictures:
        yield "pictures", list(_pictures(folder))


def _manifest_files(folder: Path) -> dict[str, dict]:
    """{file: its rows, bytes and SHA-256}, as the manifest lists them."""
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder} has no {MANIFEST}: it is no data set, or its making was not finished.")
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        version = manifest["format"]
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}): make the set again.") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{folder} has format {version}; this version reads format {FORMAT_VERSION}.")
    return files


def _files(folder: Path, files: dict) -> Iterator[str]:
    for name, entry in files.items():
        path = folder / name
        if not path.exists():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        elif file_sha256(path) != entry["sha256"]:
            yield f"{name} has another checksum"
    present = {path.relative_to(folder).as_posix() for path in visible_files(folder, "**/*")} - {MANIFEST}
    added = {name for name in present if name.startswith(f"{TRAITS}/")}
    yield from (f"{name} is not in the manifest" for name in sorted(present - added - set(files)))
    if added:
        yield from _traits(folder)


def _traits(folder: Path) -> Iterator[str]:
    """What `training.data.traits` added to the set, by its own report."""
    try:
        report = json.loads(read_text(folder / TRAITS / "report.json"))
        if report["config"]["source_sha256"] != file_sha256(folder / MANIFEST):
            yield f"{TRAITS}/ was made of another set: delete it"
        elif file_sha256(folder / TRAITS / "traits.parquet") != report["sha256"]:
            yield f"{TRAITS}/traits.parquet has another checksum"
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{TRAITS}/ is not finished: run training.data.traits again, or delete it"


def _schemas(folder: Path, files: dict) -> Iterator[str]:
    tables = {"users.parquet": USERS, "pairs.parquet": PAIRS, "index.parquet": INDEX}
    for name in files:
        schema = PICTURES if name.startswith("pictures/") else tables.get(name)
        if schema is not None and (folder / name).exists():
            yield from _columns(folder, name, schema)
    yield from (f"the manifest knows no {name}" for name in tables if name not in files)


def _columns(folder: Path, name: str, schema: pa.Schema) -> Iterator[str]:
    try:
        columns = pq.read_schema(folder / name)
    except (pa.ArrowException, OSError):
        yield f"{name} is no whole Parquet file: it was cut short or overwritten"
        return
    for field in schema:
        place = columns.get_field_index(field.name)
        if place < 0:
            yield f"{name} lacks the column {field.name!r}"
        elif columns.field(place).type != field.type:
            yield f"{name} has the column {field.name!r} as {columns.field(place).type} instead of {field.type}"
    yield from (f"{name} has an unknown column {column!r}" for column in columns.names if column not in schema.names)


def _index_and_shards(db: duckdb.DuckDBPyConnection, folder: Path) -> Iterator[str]:
    """The index against each shard; one shard's rows, without images, in memory at a time."""
    columns = PICTURES.names[1:]
    shards = shards_of(folder)
    for number, path in enumerate(shards):
        shard = pq.read_table(path, columns=columns, partitioning=None)
        of_shard = [("shard", "=", number)]
        listed = pq.read_table(folder / "index.parquet", filters=of_shard, partitioning=None).sort_by("row")
        if listed["row"].to_pylist() != list(range(len(shard))):
            yield f"{path.name} holds {len(shard)} pictures, the index lists {len(listed)} or not each once"
        elif not listed.select(columns).equals(shard):
            yield f"the index says other things about the pictures of {path.name} than the shard"
    lost = scalar(db, "SELECT count(*) FROM pictures WHERE shard NOT BETWEEN 0 AND ?", [len(shards) - 1])
    if lost:
        yield f"{lost} pictures of the index are in no shard"


# (query, what is said of the number that it counts, unless that is 0), in the order of the checks.
COUNTS = {
    "index": [
        (
            "SELECT count(*) FROM (SELECT 1 FROM pictures GROUP BY user, picture HAVING count(*) > 1)",
            "pictures come twice for one user",
        ),
        (
            f"SELECT count(*) FROM pictures WHERE verdict NOT IN ('{LIKED}', '{DISLIKED}')",
            f"pictures have a verdict that is neither {LIKED} nor {DISLIKED}",
        ),
    ],
    "leakage": [
        *(
            (
                f"SELECT count(*) FROM (SELECT {column} FROM pictures WHERE split IN ('{TRAIN}', '{TEST}') "
                "GROUP BY 1 HAVING count(DISTINCT split) > 1)",
                f"{column}s are in {TRAIN} and in {TEST}",
            )
            for column in ("user", "picture")
        ),
        (
            "SELECT count(*) FROM pictures LEFT JOIN users USING (user) "
            f"WHERE pictures.split IS DISTINCT FROM users.split AND pictures.split IS DISTINCT FROM '{MIXED}'",
            "pictures are in another split than their user in users.parquet",
        ),
    ],
    "held-out pairs": [
        *(
            (
                "SELECT count(*) FROM pairs LEFT JOIN pictures "
                f"ON pictures.user = pairs.user AND picture = pairs.{verdict} "
                f"WHERE verdict IS DISTINCT FROM '{verdict}' OR NOT heldout OR pictures.split != pairs.split",
                f"pairs name a {verdict} picture that is missing, not held out, of another split or verdict",
            )
            for verdict in (LIKED, DISLIKED)
        ),
        (
            "SELECT count(*) FROM pictures WHERE heldout AND NOT EXISTS (SELECT 1 FROM pairs "
            "WHERE pairs.user = pictures.user AND picture IN (pairs.liked, pairs.disliked))",
            "pictures are held out and in no pair",
        ),
    ],
    "users": [
        (
            f"""SELECT count(*) FROM users FULL JOIN (
                SELECT user, count(*) FILTER (verdict = '{LIKED}' AND NOT heldout) AS n_liked,
                       count(*) FILTER (verdict = '{DISLIKED}' AND NOT heldout) AS n_disliked
                FROM pictures GROUP BY user
            ) USING (user) WHERE liked IS DISTINCT FROM n_liked OR disliked IS DISTINCT FROM n_disliked""",
            "users have other numbers of pictures than users.parquet says",
        ),
    ],
    "balance": [("SELECT count(*) FROM users WHERE liked = 0 OR disliked = 0", "users like everything or nothing")],
}


def _counted(db: duckdb.DuckDBPyConnection, name: str) -> Iterator[str]:
    """The faults of one part of COUNTS."""
    for query, fault in COUNTS[name]:
        if number := scalar(db, query):
            yield f"{number} {fault}"


def _leaked_prompts(db: duckdb.DuckDBPyConnection) -> Iterator[str]:
    # As the split sees them, since a leak may differ in case or spacing.
    prompts = "SELECT DISTINCT prompt FROM pictures WHERE split = ?"
    train, test = (
        {normal_prompt(prompt) for (prompt,) in db.execute(prompts, [split]).fetchall()} for split in (TRAIN, TEST)
    )
    # Pictures whose prompt nobody knows have none in common.
    train.discard("")
    if train & test:
        yield f"{len(train & test)} prompts are in {TRAIN} and in {TEST}, such as {min(train & test)!r}"


def _balance(db: duckdb.DuckDBPyConnection) -> Iterator[str]:
    share = scalar(db, "SELECT avg((verdict = ?)::INT) FROM pictures WHERE NOT heldout", [LIKED])
    if share is not None and not BALANCE[0] <= share <= BALANCE[1]:
        yield f"{share:.0%} of the histories' pictures are liked: outside {BALANCE[0]:.0%} to {BALANCE[1]:.0%}"


def _pictures(folder: Path) -> Iterator[str]:
    for shard in shards_of(folder):
        row = 0
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(256, columns=["image"]):
                for image in batch.column(0).to_pylist():
                    try:
                        if image is not None:
                            read_picture(image, formats=PUBLISHED)
                    except PictureError as error:
                        yield f"{shard.name}: the picture of row {row} can't be decoded ({error.reason})"
                    row += 1
