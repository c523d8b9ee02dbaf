"""What cleaning Pick-a-Pic costs, beside the same rules in straightforward pandas.

    python benchmarks/pickapic_scale.py                 rows without pictures, at the published 959,040
    python benchmarks/pickapic_scale.py --pictures 8000  rows with pictures of 512 pixels, and a quarter of them

Makes tables with planted faults, runs the real command on them, without pictures a pandas version of the rules as well,
and compares what came out. Adds to docs/performance-pickapic.json, from which a section of
docs/performance.md is written. Needs Linux (/proc) and pandas, which nothing else here needs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from processes import watched
from records import machine, parser_of, reached, write_section

from tests.training import pickapic_tables as planted
from training.data.pickapic import rules, source
from training.data.pickapic.graphs import on_cycles
from training.data.schema import MIXED, normal_prompt, prompt_split, user_split
from training.evaluation.tables import table

BARS = {"seconds": 60, "peak_memory_mb": 1536, "times_faster": 5}
ROUNDS = 3  # of each side in turn; the quickest counts, since others may use the machine
COMPARED = ["user", "item", "picture", "verdict", "prompt", "split", "heldout"]


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--rows", type=int, default=planted.PUBLISHED_ROWS)
    parser.add_argument("--pictures", type=int, metavar="ROWS", help="measure rows with pictures instead")
    for part in ("--pandas", "--duckdb"):  # one side alone, in a process of its own
        parser.add_argument(part, type=Path, nargs=2, metavar=("SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pandas:
        return with_pandas(*args.pandas, rules.Limits())
    if args.duckdb:
        return with_duckdb(*args.duckdb, rules.Limits())
    base = Path(tempfile.mkdtemp(prefix="pickapic-scale-"))
    try:
        if args.pictures:
            sizes = (args.pictures // 4, args.pictures)
            new = {"pictures": [with_pictures(rows, base) | {"note": args.note} for rows in sizes]}
        else:
            new = {"rows": measure(args.rows, base) | {"note": args.note}}
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(json.dumps(new, indent=1))
    path = args.out / "performance-pickapic.json"
    record = (json.loads(path.read_text()) if path.exists() else {}) | new
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_section(args.out / "performance.md", "Cleaning Pick-a-Pic", page(record))


def measure(rows: int, base: Path) -> dict:
    planted.write(planted.generate(rows), base / "source", files=4)
    load = os.getloadavg()[0]
    ours = watched([sys.executable, "-m", "training.data.pickapic", str(base / "source"), str(base / "set")])
    rounds = {"pandas": [], "duckdb": []}
    for _ in range(ROUNDS):
        for side, runs in rounds.items():
            out = base / side
            shutil.rmtree(out, ignore_errors=True)
            run = watched([sys.executable, __file__, f"--{side}", str(base / "source"), str(out)])
            runs.append(json.loads((out / "seconds.json").read_text()) | {"peak": run["peak"]})
    alone, theirs = (min(rounds[side], key=lambda run: run["seconds"]) for side in ("duckdb", "pandas"))
    checked = watched([sys.executable, "-m", "training.data", "check", str(base / "set")])
    compare(base / "set", base / "pandas")
    report = json.loads((base / "set" / "report.json").read_text())
    return {
        "rows": rows,
        "users": report["users"],
        "pictures": report["pictures"],
        "pairs": report["pairs"],
        "seconds": round(ours["seconds"], 1),
        "cpu_seconds": round(ours["cpu_seconds"], 1),
        "peak_memory_mb": round(ours["peak"] / 2**20),
        "rules_seconds": round(alone["seconds"], 1),
        "rules_cpu_seconds": round(alone["cpu_seconds"], 1),
        "rules_peak_memory_mb": round(alone["peak"] / 2**20),
        "pandas_seconds": round(theirs["seconds"], 1),
        "pandas_cpu_seconds": round(theirs["cpu_seconds"], 1),
        "pandas_peak_memory_mb": round(theirs["peak"] / 2**20),
        "times_faster": round(theirs["seconds"] / alone["seconds"], 1),
        "rounds_seconds": {side: [round(run["seconds"], 1) for run in runs] for side, runs in rounds.items()},
        "check_seconds": round(checked["seconds"], 1),
        "source_mb": round(sum(p.stat().st_size for p in (base / "source").rglob("*.parquet")) / 2**20, 1),
        "output_mb": round(sum(p.stat().st_size for p in (base / "set").rglob("*") if p.is_file()) / 2**20, 1),
        "load_before": round(load, 2),
        "nice": os.nice(0),
        "machine": machine(),
        "rules": {rule["name"]: rule["dropped"] for rule in report["rules"]},
    }


def with_pictures(rows: int, base: Path) -> dict:
    """The command on rows with JPEG of 512 pixels: looked at once, then copied."""
    folder = planted.write(planted.generate(rows, images=True), base / f"source-{rows}", True, 4, 64, side=512)
    load = os.getloadavg()[0]
    options = ["--unit-mb", "64"]
    cleaning = watched(
        [sys.executable, "-m", "training.data.pickapic", str(folder), str(base / f"set-{rows}"), *options]
    )
    looked = len({uid for file in folder.rglob("*.parquet") for side in (0, 1)
                  for uid in pq.read_table(file, columns=[f"image_{side}_uid"]).column(0).to_pylist()})  # fmt: skip
    return {
        "rows": rows,
        "looked_at": looked,
        "seconds": round(cleaning["seconds"], 1),
        "cpu_seconds": round(cleaning["cpu_seconds"], 1),
        "pictures_per_second": round(looked / cleaning["seconds"], 1),
        "peak_memory_mb": round(cleaning["peak"] / 2**20),
        "source_mb": round(sum(p.stat().st_size for p in folder.rglob("*.parquet")) / 2**20, 1),
        "load_before": round(load, 2),
        "nice": os.nice(0),
        "machine": machine(),
    }


def page(record: dict) -> str:
    """The section of docs/performance.md."""
    parts = ["`python benchmarks/pickapic_scale.py`, record: `performance-pickapic.json`."]
    if "rows" in record:
        parts.append(rows_section(record["rows"]))
    if "pictures" in record:
        parts.append(pictures_section(record["pictures"]))
    return "\n\n".join(parts)


def rows_section(row: dict) -> str:
    bars = [
        ["seconds", str(row["seconds"]), f"at most {BARS['seconds']}", reached(row["seconds"] <= BARS["seconds"])],
        ["peak memory, MB", row["peak_memory_mb"], f"at most {BARS['peak_memory_mb']}"]
        + [reached(row["peak_memory_mb"] <= BARS["peak_memory_mb"])],
        ["the rules: times faster than pandas", str(row["times_faster"]), f"at least {BARS['times_faster']}"]
        + [reached(row["times_faster"] >= BARS["times_faster"])],
    ]
    sides = {
        "`python -m training.data.pickapic SOURCE DIR`": "",
        "its rules alone": "rules_",
        "the same rules in pandas": "pandas_",
    }
    costs = [
        [name, *(str(row[f"{prefix}{figure}"]) for figure in ("seconds", "cpu_seconds", "peak_memory_mb"))]
        for name, prefix in sides.items()
    ]
    return f"""### Without pictures

Rows without pictures, {row["rows"]:,} of them in the published schema ({row["source_mb"]} MB), with planted faults:
{row["users"]:,} users, {row["pictures"]:,} pictures and {row["pairs"]:,} held-out pairs come out
({row["output_mb"]} MB).

{table(["", "measured", "bar", "met"], bars)}

{table(["", "seconds", "CPU s", "peak memory, MB"], costs)}

The command is measured whole, with its imports: rules, shards, index, list of what was dropped, data card, checksums.
The rules alone, ours and in pandas, go from Parquet to the chosen pictures and the held-out pairs in memory, without
imports: the quickest of {ROUNDS} runs each, in turn (ours {row["rounds_seconds"]["duckdb"]} s, pandas
{row["rounds_seconds"]["pandas"]} s). Every picture, pair and count of the command and of pandas is asserted to be the
same. `python -m training.data check DIR` takes {row["check_seconds"]} s.

{machine_of(row)} Peak memory is the sum over all processes, shared pages counted once.

{table(["rule", "dropped"], [[name, f"{count:,}"] for name, count in row["rules"].items()])}"""


def pictures_section(rows: list[dict]) -> str:
    names = ("rows", "looked_at", "source_mb", "seconds", "cpu_seconds", "pictures_per_second", "peak_memory_mb")
    head = ["rows", "pictures", "source, MB", "seconds", "CPU s", "pictures/s", "peak memory, MB"]
    kilobytes = 1024 * rows[-1]["source_mb"] / 2 / rows[-1]["rows"]
    return f"""### With pictures

`python benchmarks/pickapic_scale.py --pictures {rows[-1]["rows"]}`: the command whole, on soft JPEG of 512 pixels,
about {kilobytes:.0f} KB each. Those of v2 have about 170 KB and decode more slowly.

{table(head, [[f"{row[name]:,}" for name in names] for row in rows])}

{machine_of(rows[-1])}"""


def machine_of(row: dict) -> str:
    also = f" {row['note']}" if row["note"] else ""
    return f"{row['machine']}; load average before the start {row['load_before']}, niceness {row['nice']}.{also}"


def compare(ours: Path, theirs: Path) -> None:
    """Every picture, every held-out pair and every count are the same."""
    for name, columns, keys in (
        ("pictures", COMPARED, ["user", "item"]),
        ("pairs.parquet", ["user", "pair", "prompt", "liked", "disliked", "split"], ["user", "pair"]),
    ):
        tables = [pq.read_table(folder / name, columns=columns) for folder in (ours, theirs)]
        tables = [t.cast(tables[0].schema).sort_by([(key, "ascending") for key in keys]) for t in tables]
        assert tables[0].equals(tables[1]), f"{name} differs"
    counts = {r["name"]: r["dropped"] for r in json.loads((ours / "report.json").read_text())["rules"]}
    assert counts == json.loads((theirs / "counts.json").read_text())


def with_pandas(folder: Path, out: Path, limits: rules.Limits) -> None:
    """The rules that need no pictures, as one would write them in a notebook; `rules.py` has the words."""
    import pandas as pd

    clock = Clock()
    files = sorted(folder.rglob("*.parquet"))
    frame = pd.concat([pd.read_parquet(f, columns=list(source.COLUMNS)) for f in files], ignore_index=True)
    frame["number"] = np.arange(len(frame))
    # Text that is no UTF-8 ends pandas itself; the planted tables hold none.
    counts = {rules.UNREADABLE: 0}
    frame, pictures, everyone = decided(pd, frame, counts)
    scores, heldout = scored(pd, frame, pictures, everyone, limits, counts)

    chosen = scores.merge(pictures, on="id").sort_values(["user", "created", "first", "id"])
    of_user = chosen.user.map(user_split)
    of_prompt = chosen.prompt.map(prompt_split)
    chosen = chosen.assign(
        item=chosen.groupby("user").cumcount().astype("int32"),
        verdict=np.where(chosen.score > 0, "liked", "disliked"),
        split=np.where(of_user == of_prompt, of_user, MIXED),
        prompt=chosen.caption,
    )
    names = chosen.set_index(["user", "id"])[["picture", "prompt", "split"]]
    liked = names.loc[list(zip(heldout.user, heldout.liked, strict=True))].reset_index(drop=True)
    disliked = names.loc[list(zip(heldout.user, heldout.disliked, strict=True))].reset_index(drop=True)
    pairs = heldout[["user", "pair"]].assign(
        prompt=liked.prompt, liked=liked.picture, disliked=disliked.picture, split=liked.split
    )
    out.mkdir(parents=True)
    clock.write(out)
    chosen[COMPARED].to_parquet(out / "pictures", index=False)
    pairs.to_parquet(out / "pairs.parquet", index=False)
    (out / "counts.json").write_text(json.dumps(counts))


def decided(pd, frame, counts: dict[str, int]) -> tuple:
    """(choices that stand, pictures, how many users there were); what each rule drops goes to `counts`."""

    def drop(rule, mask):
        counts[rule] = int(mask.sum())
        return frame[~mask]

    uids = ["image_0_uid", "image_1_uid"]
    blank = (frame[["caption", *uids]].fillna("").apply(lambda column: column.str.strip()) == "").any(axis=1)
    frame = drop(rules.INCOMPLETE, frame.user_id.isna() | blank)
    frame = drop(rules.UNLABELLED, ~frame.has_label | frame.label_0.isna() | frame.label_1.isna())
    frame = drop(rules.TIED, frame.label_0 == frame.label_1)
    frame = drop(rules.SAME, (frame.image_0_uid == frame.image_1_uid) | ~frame.are_different)
    first = frame.label_0 > frame.label_1
    frame = frame.assign(
        user=frame.user_id.astype("int64"),
        winner_uid=np.where(first, frame.image_0_uid, frame.image_1_uid),
        loser_uid=np.where(first, frame.image_1_uid, frame.image_0_uid),
        prompt=frame.caption.map(normal_prompt),
        created=frame.created_at.astype("int64"),
    )
    frame = drop(rules.UNCLEAR, frame.best_image_uid == frame.loser_uid)
    everyone = frame.user.nunique()
    places = pd.concat([frame.set_index(uid)["number"] * 2 + side for side, uid in enumerate(uids)])
    ids = places.groupby(level=0).min()
    frame = frame.assign(winner=frame.winner_uid.map(ids), loser=frame.loser_uid.map(ids))
    pictures = pd.DataFrame({"picture": ids.index, "id": ids.to_numpy(), "number": ids.to_numpy() // 2})
    pictures = pictures.merge(frame[["number", "caption", "prompt"]], on="number").drop(columns="number")

    frame = drop(rules.REPEATED, frame.duplicated(["user", "winner", "loser"]))
    keys = frame[["user", "winner", "loser"]]
    swapped = keys.rename(columns={"winner": "loser", "loser": "winner"}).assign(opposite=True)
    frame = drop(rules.OPPOSITE, keys.merge(swapped, how="left").opposite.notna().set_axis(frame.index))
    sides = [frame[["user", "prompt", side]].set_axis(["user", "prompt", "id"], axis=1) for side in ("winner", "loser")]
    nodes = pd.concat(sides).groupby(["user", "prompt", "id"]).ngroup().to_numpy().reshape(2, -1)
    return drop(rules.CYCLE, pd.Series(on_cycles(*nodes), index=frame.index)), pictures, everyone


def scored(pd, frame, pictures, everyone: int, limits: rules.Limits, counts: dict[str, int]) -> tuple:
    """(every picture that stays in a history or is held out, the held-out pairs)."""
    wins = frame[["user", "winner", "created", "number"]].rename(columns={"winner": "id"}).assign(point=1)
    losses = frame[["user", "loser", "created", "number"]].rename(columns={"loser": "id"}).assign(point=-1)
    scores = pd.concat([wins, losses]).groupby(["user", "id"]).agg(
        score=("point", "sum"), created=("created", "min"), first=("number", "min"), last=("number", "max")
    )  # fmt: skip
    counts[rules.EVEN] = int((scores.score == 0).sum())
    scores = scores[scores.score != 0].reset_index()
    sides = scores.assign(liked=scores.score > 0).groupby(["user", "liked"]).id.count().unstack(fill_value=0)
    enough = sides[(sides[True] >= limits.min_liked) & (sides[False] >= limits.min_disliked)]
    counts[rules.FEW] = everyone - len(enough)
    scores = scores[scores.user.isin(enough.index)]
    scores, heldout = hold_out(pd, frame, scores, pictures, enough, limits)

    history = scores[~scores.heldout].assign(liked=lambda t: t.score > 0, size=lambda t: t.score.abs())
    smaller = history.groupby(["user", "liked"]).id.count().groupby(level=0).min()
    history = history.sort_values(["size", "last", "id"], ascending=[False, False, True])
    nth = history.groupby(["user", "liked"]).cumcount() + 1
    surplus = history[nth > np.floor(history.user.map(smaller) * limits.ratio)]
    counts[rules.SURPLUS] = len(surplus)
    return scores.drop(index=surplus.index), heldout


def with_duckdb(folder: Path, out: Path, limits: rules.Limits) -> None:
    """The tool's rules alone, from Parquet to the same two tables in memory."""
    import pandas  # noqa: F401  pyarrow imports it where it is installed: before the clock, as on the other side

    out.mkdir(parents=True)
    clock = Clock()
    # As the command's --unit-mb has it.
    files = source.find(str(folder), "**/*.parquet", 512 << 20)
    with rules.connect(out / "choices.duckdb", "700MB", len(os.sched_getaffinity(0))) as db:
        rules.read(db, files, limits)
        rules.start(db)
        rules.decide(db, limits)
        for query in ("FROM chosen ORDER BY user, item", "FROM pairs ORDER BY user, pair"):
            db.sql(query).to_arrow_table()
    clock.write(out)


class Clock:
    """Seconds and CPU seconds since it was made, without the imports."""

    def __init__(self):
        self.start = time.perf_counter()
        self.cpu_start = time.process_time()

    def write(self, out: Path) -> None:
        seconds = time.perf_counter() - self.start
        cpu_seconds = time.process_time() - self.cpu_start
        (out / "seconds.json").write_text(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


def hold_out(pd, frame, scores, pictures, enough, limits):
    """A user's last clear choices. Returns scores with a column heldout, and a frame of the pairs."""
    verdicts = scores[["user", "id", "score"]]
    clear = frame.merge(verdicts, left_on=["user", "winner"], right_on=["user", "id"])
    clear = clear.merge(verdicts, left_on=["user", "loser"], right_on=["user", "id"], suffixes=("", "_loser"))
    clear = clear[(clear.score > 0) & (clear.score_loser < 0)]
    prompts = pictures.set_index("id").prompt
    clear = clear[clear.winner.map(prompts) == clear.loser.map(prompts)]
    room = np.minimum(enough[True] - limits.min_liked, enough[False] - limits.min_disliked).clip(upper=limits.heldout)
    pairs = []
    taken = set()
    for user, group in clear.sort_values(["created", "number"], ascending=False).groupby("user", sort=True):
        pair = 0
        for winner, loser in zip(group.winner, group.loser, strict=True):
            if pair == room[user]:
                break
            if not {(user, winner), (user, loser)} & taken:
                taken |= {(user, winner), (user, loser)}
                pairs.append((user, pair, winner, loser))
                pair += 1
    keys = pd.MultiIndex.from_frame(scores[["user", "id"]])
    pairs = pd.DataFrame(pairs, columns=["user", "pair", "liked", "disliked"])
    return scores.assign(heldout=keys.isin(taken)), pairs


if __name__ == "__main__":
    main()
