"""From rows to a set: what can't stand in the common layout is dropped by a rule and counted.

Tables, in the order in which they are made (n and choice count through all files):

    judged   (n, user, choice, asked, verdict, prompt, picture)   every row that was read
    places   (picture, source, unit, place, file)                 where a picture lies first
    looked   (picture, prompt, split)                             its prompt is that of its first row
    people   (user, number, split)
    held     (user, pair, liked, disliked, prompt)
    history  (user, picture, verdict, n)
    chosen   (user, item, picture, verdict, prompt, split, heldout, source, unit, place, file)

Every query whose order reaches a file names that order, so the bytes don't depend on threads or on interruptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from ..data.schema import DISLIKED, LIKED, MIXED, prompt_split, user_split
from .layouts import AGENTS, BAD_PAIR, BAD_REFERENCE, FRAMES, MISSING, NO_USER, UNMATCHED

AGAIN, BOTH, ASKED = "the same picture again", "liked and disliked", "asked about"
REPEATED, CONTRADICTING, SPLITS, ONE_SIDED = (
    "repeated pair",
    "contradicting pair",
    "prompts of both splits",
    "one-sided",
)
PAIR, REFERENCE, MERGED, USER = "pair", "reference", "picture of a user", "user"
RULES = {  # in the order in which they are applied: (layouts, unit, what it drops)
    NO_USER: ((FRAMES,), "row", "no user named"),
    BAD_REFERENCE: ((FRAMES,), REFERENCE, "no bytes or no prompt"),
    BAD_PAIR: ((AGENTS, FRAMES), PAIR, "a picture or the prompt missing, one picture twice, or a label not 0 or 1"),
    MISSING: ((AGENTS,), PAIR, "a picture's file is not in --images"),
    UNMATCHED: ((AGENTS,), "row", "of a user's CSV: none of the user's pairs has that caption and positive picture"),
    SPLITS: ((AGENTS, FRAMES), PAIR, "held out, and a picture comes first with a prompt of another split"),
    REPEATED: ((AGENTS, FRAMES), PAIR, "held out, and the user made this choice before"),
    CONTRADICTING: ((AGENTS, FRAMES), PAIR, "held out, and an earlier held-out pair of the user says otherwise"),
    AGAIN: ((AGENTS, FRAMES), REFERENCE, "merged: the user has this picture with this verdict already"),
    BOTH: ((AGENTS, FRAMES), MERGED, "in a history as liked and as disliked"),
    ASKED: ((AGENTS, FRAMES), MERGED, "taken out of a history because the user is asked about it"),
    ONE_SIDED: (
        (AGENTS, FRAMES),
        USER,
        "no liked or no disliked picture left; off where no history of the set has disliked ones",
    ),
}
ROWS = pa.schema(
    [
        ("n", pa.int64()),
        ("user", pa.string()),
        ("choice", pa.int64()),
        ("asked", pa.bool_()),
        *((name, pa.string()) for name in ("verdict", "prompt", "picture")),
    ]
)
PLACES = pa.schema(
    [
        ("picture", pa.string()),
        ("source", pa.int32()),
        ("unit", pa.int32()),
        ("place", pa.int64()),
        ("file", pa.string()),  # null where the bytes were in the pickle
    ]
)


def connect(spill: Path, memory: str, threads: int) -> duckdb.DuckDBPyConnection:
    """A database in memory; what does not fit into `memory` spills to a folder."""
    options = {"memory_limit": memory, "temp_directory": str(spill), "threads": threads}
    return duckdb.connect(config=options | {"preserve_insertion_order": False})


def decide(db: duckdb.DuckDBPyConnection, rows: list[str], places: list[str], users: list[str]) -> Counter:
    """Fill the tables. rows, places: Parquet files of ROWS and PLACES. users: all names in their order.

    Returns {rule: how many it dropped}.
    """
    dropped: Counter = Counter()
    for table, files, schema in (("judged", rows, ROWS), ("all_places", places, PLACES)):
        db.register("files", ds.dataset(files, schema=schema, format="parquet"))
        db.execute(f"CREATE TEMP TABLE {table} AS FROM files")
        db.unregister("files")
    db.execute(
        """CREATE TEMP TABLE places AS
            FROM all_places QUALIFY row_number() OVER (PARTITION BY picture ORDER BY source) = 1;
        DROP TABLE all_places"""
    )
    _splits(db, users)
    _hold_out(db, dropped)
    _histories(db, dropped)
    _chosen(db)
    return dropped


def _splits(db: duckdb.DuckDBPyConnection, users: list[str]) -> None:
    numbers = user_numbers(users)
    people = pa.table({"user": users, "number": numbers, "split": [user_split(n) for n in numbers]}, PEOPLE)
    prompts = [prompt for (prompt,) in _rows(db, "SELECT DISTINCT prompt FROM judged")]
    known = pa.table(
        {"prompt": pa.array(prompts, pa.string()), "split": pa.array(map(prompt_split, prompts), pa.string())}
    )
    db.register("people_", people)
    db.register("known_", known)
    db.execute(
        """CREATE TEMP TABLE people AS FROM people_;
        CREATE TEMP TABLE prompts AS FROM known_;
        CREATE TEMP TABLE looked AS
            SELECT picture, prompt, split
            FROM (SELECT picture, arg_min(prompt, n) AS prompt FROM judged GROUP BY picture)
            JOIN prompts USING (prompt)"""
    )
    db.unregister("people_")
    db.unregister("known_")


PEOPLE = pa.schema([("user", pa.string()), ("number", pa.int64()), ("split", pa.string())])


def user_numbers(names: list[str]) -> list[int]:
    """The users' own numbers; by their order from 0, for all of them, when a name is no whole number."""
    if all(name.isascii() and name.isdecimal() and str(int(name)) == name and int(name) < 2**63 for name in names):
        return [int(name) for name in names]
    return list(range(len(names)))


def _hold_out(db: duckdb.DuckDBPyConnection, dropped: Counter) -> None:
    db.execute(
        f"""CREATE TEMP TABLE asked AS
            SELECT user, choice, any_value(prompt) AS prompt, any_value(picture) FILTER (verdict = '{LIKED}') AS liked,
                   any_value(picture) FILTER (verdict = '{DISLIKED}') AS disliked
            FROM judged WHERE asked GROUP BY user, choice;
        CREATE TEMP TABLE sound AS
            SELECT asked.* FROM asked JOIN prompts ON prompts.prompt = asked.prompt
            JOIN looked l ON l.picture = liked JOIN looked d ON d.picture = disliked
            WHERE l.split = prompts.split AND d.split = prompts.split"""
    )
    dropped[SPLITS] = count(db, "asked") - count(db, "sound")
    kept = list(
        _consistent(_rows(db, "SELECT user, choice, liked, disliked FROM sound ORDER BY user, choice"), dropped)
    )
    db.register("kept", pa.table({"choice": pa.array(kept, pa.int64())}))
    db.execute(
        """CREATE TEMP TABLE held AS
            SELECT user, (row_number() OVER (PARTITION BY user ORDER BY choice) - 1)::INTEGER AS pair, liked, disliked,
                   prompt, choice FROM sound SEMI JOIN kept USING (choice)"""
    )
    db.unregister("kept")


def _consistent(pairs: Iterator[tuple[str, int, str, str]], dropped: Counter) -> Iterator[int]:
    """Choices that neither repeat nor contradict an earlier one. pairs: (user, choice, liked, disliked), by user."""
    for _, mine in groupby(pairs, key=lambda pair: pair[0]):
        seen: set[tuple[str, str]] = set()
        verdicts: dict[str, str] = {}
        for _, choice, liked, disliked in mine:
            if (liked, disliked) in seen:
                dropped[REPEATED] += 1
            elif verdicts.get(liked, LIKED) != LIKED or verdicts.get(disliked, DISLIKED) != DISLIKED:
                dropped[CONTRADICTING] += 1
            else:
                seen.add((liked, disliked))
                verdicts[liked], verdicts[disliked] = LIKED, DISLIKED
                yield choice


def _histories(db: duckdb.DuckDBPyConnection, dropped: Counter) -> None:
    db.execute(
        """CREATE TEMP TABLE held_pictures AS
            SELECT DISTINCT user, liked AS picture FROM held UNION SELECT DISTINCT user, disliked FROM held;
        CREATE TEMP TABLE verdicts AS
            SELECT user, picture, verdict, min(n) AS n FROM judged WHERE NOT asked GROUP BY user, picture, verdict;
        CREATE TEMP TABLE clear AS
            SELECT user, picture, any_value(verdict) AS verdict, min(n) AS n FROM verdicts
            GROUP BY user, picture HAVING count(*) = 1;
        CREATE TEMP TABLE history AS FROM clear ANTI JOIN held_pictures USING (user, picture)"""
    )
    dropped[AGAIN] = count(db, "judged WHERE NOT asked") - count(db, "verdicts")
    dropped[BOTH] = count(db, "(SELECT DISTINCT user, picture FROM verdicts)") - count(db, "clear")
    dropped[ASKED] = count(db, "clear") - count(db, "history")
    if count(db, f"judged WHERE NOT asked AND verdict = '{DISLIKED}'"):
        db.execute(
            f"""CREATE TEMP TABLE lone AS
                SELECT user FROM (SELECT user, verdict FROM history UNION ALL SELECT user, NULL FROM held)
                GROUP BY user HAVING count(*) FILTER (verdict = '{LIKED}') = 0
                                  OR count(*) FILTER (verdict = '{DISLIKED}') = 0;
            DELETE FROM history WHERE user IN (FROM lone);
            DELETE FROM held WHERE user IN (FROM lone);
            DELETE FROM held_pictures WHERE user IN (FROM lone)"""
        )
        dropped[ONE_SIDED] = count(db, "lone")


def _chosen(db: duckdb.DuckDBPyConnection) -> None:
    db.execute(
        f"""CREATE TEMP TABLE stays AS
            SELECT user, picture, verdict, n, false AS heldout FROM history
            UNION ALL SELECT user, picture, any_value(verdict), min(n), true FROM judged
            SEMI JOIN (SELECT user, choice FROM held) USING (user, choice) WHERE asked GROUP BY user, picture;
        CREATE TEMP TABLE chosen AS
            SELECT number AS user, (row_number() OVER (PARTITION BY number ORDER BY n) - 1)::INTEGER AS item, picture,
                   verdict, looked.prompt, if(people.split = looked.split, people.split, '{MIXED}') AS split, heldout,
                   source, unit, place, file
            FROM stays JOIN people USING (user) JOIN looked USING (picture) JOIN places USING (picture)"""
    )


def _rows(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[tuple]:
    """A query's rows, streamed; nothing else may run on the connection meanwhile."""
    for batch in db.sql(query).to_arrow_reader(65_536):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def count(db: duckdb.DuckDBPyConnection, what: str) -> int:
    """How many rows a table has, or one with a condition."""
    return db.execute(f"SELECT count(*) FROM {what}").fetchall()[0][0]


def counts(dropped: Counter, layout: str) -> list[dict]:
    """[{name, rule, unit, dropped}] of a layout's rules in the order in which they are applied."""
    return [
        {"name": name, "rule": f"{name}: {what}", "unit": unit, "dropped": dropped[name]}
        for name, (layouts, unit, what) in RULES.items()
        if layout in layouts
    ]
