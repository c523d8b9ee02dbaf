"""The rules, out of core in DuckDB: published rows in, histories and held-out pairs out.

RULES lists them in the order in which `read`, `judge_pictures` and `decide` apply them. The tables, in the order in
which they are made:

    choices   (number, user, created, prompt, winner, loser)   rows that say something
    pictures  (id, uid, caption, prompt)                       id: 2 * row + side of the picture's first place
    captions  (number, text, prompt, nsfw), prompts (prompt, split), users (user, split)
    dropped   (rule, unit, number, picture, user)              what `read` dropped; in `gone` what all rules did
    live      as choices                                       the choices still standing
    scores    (user, id, score, created, first, last)          wins less losses of a picture of a user
    pairs     (user, pair, liked, disliked)                    held out
    chosen    (user, item, id, picture, verdict, prompt, split, heldout)

Every query whose order reaches a file names that order, so the bytes don't depend on threads or on interruptions.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from ..duck import parquet
from ..schema import DISLIKED, LIKED, MIXED, normal_prompt, prompt_split, user_split
from . import looks
from .graphs import clusters, on_cycles
from .source import BATCH, CHOICES, Source

UNREADABLE = "unreadable"
INCOMPLETE = "incomplete"
UNLABELLED = "unlabelled"
TIED = "tied"
SAME = "the same picture"
UNCLEAR = "unclear winner"
NSFW = "word list"
FAULTY = "choice with a faulty picture"
NEAR = "near-duplicate"
NEAR_CHOICE = "near-duplicate choice"
REPEATED = "repeated"
OPPOSITE = "A over B and B over A"
CYCLE = "cycle"
EVEN = "even"
FEW = "too few"
SURPLUS = "surplus"

# What a rule drops.
ROW = "row"
PICTURE = "picture"
MERGED = "picture of a user"
USER = "user"

# The paper (arXiv 2512.06020) cleans Pick-a-Pic in four steps: low-quality or inconsistent entries go, choices are
# grouped by user, merged into liked and disliked pictures, and users with too few are left out. Its rules are not
# known; these are ours, in the order in which they are applied: (unit, what it drops).
RULES = {
    UNREADABLE: (ROW, "a prompt or a picture's name that isn't UTF-8 text"),
    INCOMPLETE: (ROW, "no user, prompt or picture named"),
    UNLABELLED: (ROW, "no label"),
    TIED: (ROW, "both pictures equally good"),
    SAME: (ROW, "both pictures are the same: one uid, marked as not different, or the same bytes"),
    UNCLEAR: (ROW, "the labels and best_image_uid name different winners"),
    NSFW: (ROW, "the prompt has a word of the list"),
    looks.BROKEN: (PICTURE, "can't be decoded, is missing, or would unpack to a decompression bomb"),
    looks.TINY: (PICTURE, f"a side below {looks.MIN_SIDE} pixels"),
    looks.DARK: (PICTURE, f"no part brighter than {looks.DARK_BELOW} of 255"),
    looks.UNIFORM: (PICTURE, f"no two parts further apart than {looks.UNIFORM_BELOW} of 255"),
    FAULTY: (ROW, "a choice in which such a picture took part"),
    NEAR: (PICTURE, f"a perceptual hash within {looks.NEAR} of {looks.HASH_BITS} bits: counts as the earlier picture"),
    NEAR_CHOICE: (ROW, "both pictures are near-duplicates of each other"),
    REPEATED: (ROW, "the same user made the same choice before"),
    OPPOSITE: (ROW, "the same user also chose the other way round"),
    CYCLE: (ROW, "part of a ring of choices of one user on one prompt"),
    EVEN: (MERGED, "won as often as it lost"),
    FEW: (USER, "fewer than the minimum of liked or of disliked pictures"),
    SURPLUS: (MERGED, "the larger side of a history, past the allowed ratio to the smaller"),
}
IMAGE_RULES = (*looks.FAULTS, FAULTY, NEAR, NEAR_CHOICE)  # of a source with pictures alone

# The rules that the row itself decides: the first condition that holds drops it. The word list comes after them.
ROW_CONDITIONS = {
    UNREADABLE: "unreadable",
    INCOMPLETE: "user_id IS NULL OR coalesce(trim(caption), '') = '' OR coalesce(image_0_uid, '') = '' "
    "OR coalesce(image_1_uid, '') = ''",
    UNLABELLED: "has_label IS NOT TRUE OR label_0 IS NULL OR label_1 IS NULL OR isnan(label_0) OR isnan(label_1)",
    TIED: "label_0 = label_1",
    SAME: "image_0_uid = image_1_uid OR are_different IS FALSE",
    UNCLEAR: "best_image_uid = if(label_0 > label_1, image_1_uid, image_0_uid)",
}
BATCHES = 4  # of the source that go to DuckDB together, so that several threads take them


@dataclass(frozen=True)
class Limits:
    """What a person may set."""

    min_liked: int = 4
    min_disliked: int = 4
    heldout: int = 1  # pairs a user, as far as the minimum stays
    ratio: float = 1.8  # of a history's larger side to its smaller; 0 for no limit
    nsfw_words: tuple[str, ...] = ()

    def config(self) -> dict:
        """For the set's configuration; of the words only a digest, since a card that lists them would offend itself."""
        words = "\n".join(self.nsfw_words).encode()
        return asdict(self) | {"nsfw_words": hashlib.sha256(words).hexdigest() if words else None}


def connect(file: Path, memory: str, threads: int) -> duckdb.DuckDBPyConnection:
    """The work database; what does not fit into `memory` spills beside it."""
    spill = file.with_suffix(".spill")
    options = {"memory_limit": memory, "temp_directory": str(spill), "threads": threads}
    return duckdb.connect(str(file), config=options | {"preserve_insertion_order": False})


# Rules about the row itself


def read(db: duckdb.DuckDBPyConnection, source: Source, limits: Limits) -> None:
    """Unreadable to word list: fills choices, pictures, captions, prompts, users, dropped."""
    _read_rows(db, source)
    _read_captions(db, limits.nsfw_words)
    # Pictures are numbered by their first place among the sound rows, so that an id says where the bytes lie.
    db.execute(
        f"""CREATE OR REPLACE TABLE dropped AS
            SELECT rule, '{ROW}' AS unit, number, NULL::BIGINT AS picture, NULL::BIGINT AS user
            FROM rows WHERE rule IS NOT NULL
            UNION ALL SELECT '{NSFW}', '{ROW}', rows.number, NULL, NULL
            FROM rows JOIN captions ON captions.text = rows.caption WHERE rule IS NULL AND nsfw;
        CREATE TEMP TABLE sound AS
            SELECT rows.number, user, created, captions.number AS caption, prompt, image_0_uid, image_1_uid, first
            FROM rows JOIN captions ON captions.text = rows.caption WHERE rule IS NULL AND NOT nsfw;
        DROP TABLE rows;
        CREATE TEMP TABLE names AS
            SELECT min(place) AS id, uid FROM (
                SELECT 2 * number AS place, image_0_uid AS uid FROM sound
                UNION ALL SELECT 2 * number + 1, image_1_uid FROM sound) GROUP BY uid;
        CREATE OR REPLACE TABLE choices AS
            SELECT number, user, created, prompt, if(first, a.id, b.id) AS winner, if(first, b.id, a.id) AS loser
            FROM sound JOIN names a ON a.uid = image_0_uid JOIN names b ON b.uid = image_1_uid;
        CREATE OR REPLACE TABLE pictures AS
            SELECT names.id, uid, caption, prompt FROM names JOIN sound ON number = names.id // 2;
        DROP TABLE sound; DROP TABLE names"""
    )
    users = [user for (user,) in db.execute("SELECT DISTINCT user FROM choices").fetchall()]
    splits = pa.table({"user": pa.array(users, pa.int64()), "split": pa.array(map(user_split, users), pa.string())})
    _create(db, "OR REPLACE TABLE users", splits)


def _read_rows(db: duckdb.DuckDBPyConnection, source: Source) -> None:
    """Fills rows with everything that is published, and the rule that drops it or null. Streamed."""
    cases = " ".join(f"WHEN {condition} THEN '{rule}'" for rule, condition in ROW_CONDITIONS.items())
    judged = f"""SELECT number, user_id AS user, coalesce(created_at, 0) AS created, caption, image_0_uid, image_1_uid,
        label_0 > label_1 AS first, CASE {cases} END AS rule FROM batch_"""
    db.register("batch_", CHOICES.empty_table())
    db.execute(f"CREATE TEMP TABLE rows AS {judged}")
    tables = source.choices()
    while batches := list(islice(tables, BATCHES)):
        db.register("batch_", pa.concat_tables(batches))
        db.execute(f"INSERT INTO rows {judged}")
    db.unregister("batch_")


def _read_captions(db: duckdb.DuckDBPyConnection, words: tuple[str, ...]) -> None:
    """Fills captions and prompts: normalised prompts, their split and the word list, once a distinct caption."""
    # Not \b, which finds no border beside a word's own sign, such as that of "c++".
    listed = "|".join(re.escape(normal_prompt(word)) for word in words)
    banned = re.compile(rf"(?<!\w)(?:{listed})(?!\w)") if words else None
    numbers: dict[str, int] = {}  # of each prompt
    db.execute("CREATE OR REPLACE TABLE captions (number BIGINT, text VARCHAR, prompt BIGINT, nsfw BOOLEAN)")
    db.execute("CREATE TEMP TABLE texts AS SELECT DISTINCT caption FROM rows WHERE rule IS NULL")
    total = 0
    while batch := db.execute("SELECT caption FROM texts ORDER BY caption LIMIT ? OFFSET ?", [BATCH, total]).fetchall():
        captions = [caption for (caption,) in batch]
        prompts = [normal_prompt(caption) for caption in captions]
        columns = {
            "number": range(total, total + len(captions)),
            "text": captions,
            "prompt": [numbers.setdefault(prompt, len(numbers)) for prompt in prompts],
            "nsfw": [bool(banned and banned.search(prompt)) for prompt in prompts],
        }
        db.register("batch_", pa.table({name: pa.array(values) for name, values in columns.items()}))
        db.execute("INSERT INTO captions FROM batch_")
        total += len(captions)
    db.unregister("batch_")
    splits = pa.array(map(prompt_split, numbers), pa.string())
    _create(db, "OR REPLACE TABLE prompts", pa.table({"prompt": np.arange(len(numbers)), "split": splits}))


def start(db: duckdb.DuckDBPyConnection) -> None:
    """Working copies of what `read` left: live, the choices still standing, and gone, what was dropped. Temporary, so a
    run that was killed in the middle of the rules begins them again."""
    db.execute("CREATE TEMP TABLE live AS FROM choices; CREATE TEMP TABLE gone AS FROM dropped")


# Rules about the pictures


def judge_pictures(db: duckdb.DuckDBPyConnection, looked: list[str]) -> None:
    """Broken to near-duplicate choice, and the same bytes. looked: Parquet files of (id, fault, hash, digest)."""
    db.execute(f"CREATE TEMP TABLE looks AS SELECT * FROM {parquet(looked)}")
    db.execute(f"INSERT INTO gone SELECT fault, '{PICTURE}', NULL, id, NULL FROM looks WHERE fault IS NOT NULL")
    both = "SELECT number FROM live JOIN looks w ON w.id = winner JOIN looks l ON l.id = loser WHERE"
    _drop(db, FAULTY, f"{both} w.fault IS NOT NULL OR l.fault IS NOT NULL")
    _drop(db, SAME, f"{both} w.digest = l.digest")
    _merge_near_duplicates(db)
    _drop(db, NEAR_CHOICE, "SELECT number FROM live WHERE winner = loser")


def _merge_near_duplicates(db: duckdb.DuckDBPyConnection) -> None:
    """In live the earliest picture of a cluster stands for all of it."""
    # Equal hashes first: after that each hash is compared once, however often it comes.
    db.execute(
        """CREATE TEMP TABLE standing AS
            SELECT id, hash FROM looks WHERE id IN (SELECT winner FROM live UNION ALL SELECT loser FROM live);
        CREATE TEMP TABLE hashes AS SELECT hash, min(id) AS id FROM standing GROUP BY hash;
        CREATE TEMP TABLE near AS SELECT hashes.id AS a, standing.id AS b FROM standing JOIN hashes USING (hash)
            WHERE standing.id != hashes.id"""
    )
    for shift in range(0, looks.HASH_BITS, looks.BAND_BITS):
        banded = f"SELECT *, (hash >> {shift}) & {(1 << looks.BAND_BITS) - 1} AS band FROM hashes"
        db.execute(
            f"""INSERT INTO near SELECT a.id, b.id FROM ({banded}) a JOIN ({banded}) b USING (band)
            WHERE a.id < b.id AND bit_count(xor(a.hash, b.hash)) <= {looks.NEAR}"""
        )
    pairs = db.execute("SELECT a, b FROM near").fetchnumpy()
    first_of = clusters(np.stack([pairs["a"], pairs["b"]], axis=1))
    ids = pa.array(list(first_of), pa.int64())
    firsts = pa.array(list(first_of.values()), pa.int64())
    _create(db, "TEMP TABLE merged", pa.table({"id": ids, "first": firsts}))
    db.execute(
        f"""INSERT INTO gone SELECT '{NEAR}', '{PICTURE}', NULL, id, NULL FROM merged;
        CREATE OR REPLACE TEMP TABLE live AS
            SELECT number, user, created, prompt, coalesce(w.first, winner) AS winner, coalesce(l.first, loser) AS loser
            FROM live LEFT JOIN merged w ON w.id = winner LEFT JOIN merged l ON l.id = loser"""
    )


# Rules about a user's choices as a whole


def decide(db: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    """Repeated to surplus: fills pairs and chosen."""
    again = "row_number() OVER (PARTITION BY user, winner, loser ORDER BY number) > 1"
    _drop(db, REPEATED, f"SELECT number FROM live QUALIFY {again}")
    opposite = "b.user = a.user AND b.winner = a.loser AND b.loser = a.winner"
    _drop(db, OPPOSITE, f"SELECT a.number FROM live a JOIN live b ON {opposite}")
    _drop_cycles(db)
    _score(db)
    _drop_users(db, limits)
    _hold_out(db, limits)
    if limits.ratio:
        _cut_surplus(db, limits.ratio)
    _choose(db)


def _drop_cycles(db: duckdb.DuckDBPyConnection) -> None:
    """Only pictures that won and lost can lie on a cycle of a user's choices on one prompt: few enough for memory."""
    db.execute(
        """CREATE TEMP TABLE nodes AS SELECT row_number() OVER () - 1 AS node, * FROM (
            SELECT user, prompt, winner AS id FROM live INTERSECT SELECT user, prompt, loser FROM live)"""
    )
    choices = db.execute(
        """SELECT number, w.node AS winner, l.node AS loser FROM live
        JOIN nodes w ON w.user = live.user AND w.prompt = live.prompt AND w.id = winner
        JOIN nodes l ON l.user = live.user AND l.prompt = live.prompt AND l.id = loser"""
    ).fetchnumpy()
    numbers = choices["number"][on_cycles(choices["winner"], choices["loser"])]
    _create(db, "TEMP TABLE cycles", pa.table({"number": numbers}))
    _drop(db, CYCLE, "SELECT number FROM cycles")


def _score(db: duckdb.DuckDBPyConnection) -> None:
    """A user's choices into net scores of pictures; even ones go."""
    db.execute(
        f"""CREATE TEMP TABLE scores AS
            SELECT user, id, sum(point)::INTEGER AS score, min(created) AS created, min(number) AS first,
                   max(number) AS last
            FROM (SELECT user, winner AS id, 1 AS point, created, number FROM live
                  UNION ALL SELECT user, loser, -1, created, number FROM live) GROUP BY user, id;
        INSERT INTO gone SELECT '{EVEN}', '{MERGED}', NULL, id, user FROM scores WHERE score = 0;
        DELETE FROM scores WHERE score = 0"""
    )


def _drop_users(db: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    """Fills sides (user, liked, disliked) with the users who have enough of both."""
    few = f"liked < {limits.min_liked} OR disliked < {limits.min_disliked}"
    db.execute(
        f"""CREATE TEMP TABLE sides AS
            SELECT user, coalesce(count(*) FILTER (score > 0), 0) AS liked, coalesce(count(*) FILTER (score < 0), 0)
                   AS disliked FROM users LEFT JOIN scores USING (user) GROUP BY user;
        INSERT INTO gone SELECT '{FEW}', '{USER}', NULL, NULL, user FROM sides WHERE {few};
        DELETE FROM sides WHERE {few};
        DELETE FROM scores WHERE user NOT IN (SELECT user FROM sides)"""
    )


def _hold_out(db: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    """Fills pairs: a user's last choices between a liked and a disliked picture of one prompt, no picture twice."""
    # room: how many pairs a user can spare above the minimum of both sides.
    db.execute(
        f"""CREATE TEMP TABLE pairs (user BIGINT, pair INTEGER, liked BIGINT, disliked BIGINT);
        CREATE TEMP TABLE candidates AS
            SELECT live.user, live.number, live.created, winner, loser,
                   least(sides.liked - {limits.min_liked}, sides.disliked - {limits.min_disliked}) AS room
            FROM live JOIN sides USING (user)
            JOIN scores w ON w.user = live.user AND w.id = winner AND w.score > 0
            JOIN scores l ON l.user = live.user AND l.id = loser AND l.score < 0
            JOIN pictures a ON a.id = winner JOIN pictures b ON b.id = loser AND b.prompt = a.prompt WHERE room > 0"""
    )
    # One pair a round, the latest first: which pictures are taken decides what the next round may take.
    for pair in range(limits.heldout):
        db.execute(
            f"""INSERT INTO pairs SELECT user, {pair}, winner, loser FROM candidates c
            WHERE room > {pair} AND NOT EXISTS (FROM pairs WHERE pairs.user = c.user AND liked = winner)
                  AND NOT EXISTS (FROM pairs WHERE pairs.user = c.user AND disliked = loser)
            QUALIFY row_number() OVER (PARTITION BY user ORDER BY created DESC, number DESC) = 1"""
        )
    db.execute(
        """CREATE TEMP TABLE heldout_pictures AS
        SELECT user, liked AS id FROM pairs UNION ALL SELECT user, disliked FROM pairs"""
    )


def _cut_surplus(db: duckdb.DuckDBPyConnection, ratio: float) -> None:
    """Of a history's larger side the clearest stay (largest net score, then latest), up to ratio times the smaller."""
    db.execute(
        f"""CREATE TEMP TABLE surplus AS
            WITH history AS (FROM scores ANTI JOIN heldout_pictures USING (user, id)), smaller AS (
                SELECT user, floor({ratio}::DOUBLE * least(
                       count(*) FILTER (score > 0), count(*) FILTER (score < 0))) AS most
                FROM history GROUP BY user), ranked AS (
                SELECT user, id, row_number() OVER (PARTITION BY user, score > 0
                       ORDER BY abs(score) DESC, last DESC, id) AS rank FROM history)
            SELECT user, id FROM ranked JOIN smaller USING (user) WHERE rank > most;
        INSERT INTO gone SELECT '{SURPLUS}', '{MERGED}', NULL, id, user FROM surplus;
        CREATE OR REPLACE TEMP TABLE scores AS FROM scores ANTI JOIN surplus USING (user, id)"""
    )


def _choose(db: duckdb.DuckDBPyConnection) -> None:
    """Fills chosen from what is left; a user's items stand in the order in which they were first judged."""
    place = "row_number() OVER (PARTITION BY scores.user ORDER BY created, first, scores.id) - 1"
    db.execute(
        f"""CREATE TEMP TABLE chosen AS
        SELECT scores.user, ({place})::INTEGER AS item, scores.id, uid AS picture,
               if(score > 0, '{LIKED}', '{DISLIKED}') AS verdict, captions.text AS prompt,
               if(users.split = prompts.split, users.split, '{MIXED}') AS split,
               heldout_pictures.id IS NOT NULL AS heldout
        FROM scores JOIN pictures ON pictures.id = scores.id JOIN prompts ON prompts.prompt = pictures.prompt
        JOIN users ON users.user = scores.user JOIN captions ON captions.number = pictures.caption
        LEFT JOIN heldout_pictures ON heldout_pictures.user = scores.user AND heldout_pictures.id = scores.id"""
    )


# What was dropped


def counts(db: duckdb.DuckDBPyConnection, rules: list[str]) -> list[dict]:
    """[{name, rule, unit, dropped}] of these rules, in their order."""
    dropped = dict(db.execute("SELECT rule, count(*) FROM gone GROUP BY rule").fetchall())
    return [
        {"name": name, "rule": f"{name}: {RULES[name][1]}", "unit": RULES[name][0], "dropped": dropped.get(name, 0)}
        for name in rules
    ]


def _drop(db: duckdb.DuckDBPyConnection, rule: str, numbers: str) -> None:
    """Move the choices whose numbers a query yields from live to gone."""
    db.execute(
        f"""INSERT INTO gone SELECT DISTINCT '{rule}', '{ROW}', number, NULL::BIGINT, NULL::BIGINT FROM ({numbers});
        DELETE FROM live WHERE number IN (SELECT number FROM gone WHERE rule = '{rule}')"""
    )


def _create(db: duckdb.DuckDBPyConnection, table: str, content: pa.Table) -> None:
    """CREATE `table` with these rows."""
    db.register("content", content)
    db.execute(f"CREATE {table} AS SELECT * FROM content")
    db.unregister("content")
