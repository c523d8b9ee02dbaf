"""Tables like Pick-a-Pic's, of any length, with faults of every kind planted where we know them.

    python tests/training/pickapic_tables.py FOLDER --rows 959040

Users follow a long tail. Sound rows are sessions of one user on one prompt, in which the better picture stays and meets
a new one, so they never contradict each other. Faults take pictures of their own, so each breaks one rule only.
"""

from __future__ import annotations

import argparse
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PUBLISHED_ROWS = 959_040  # of v2's train split; 6,394 users, 66,798 prompts in the paper
WORD = "forbidden"
TEXT = pa.string()
SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", TEXT),
        ("caption", TEXT),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", TEXT),
        ("image_0_url", TEXT),
        ("image_1_uid", TEXT),
        ("image_1_url", TEXT),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", TEXT),
        ("model_1", TEXT),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
SINGLE = ("incomplete", "unlabelled", "tied", "unclear winner", "the same picture", "word list")  # one row each
SHARES = dict(zip(SINGLE, (0.002, 0.03, 0.08, 0.003, 0.005, 0.005), strict=True))
SHARES |= {"repeated": 0.005, "A over B and B over A": 0.006, "cycle": 0.006}
IMAGE_SHARES = {"broken": 0.016, "tiny": 0.008, "near-black": 0.008, "near-uniform": 0.008, "near-duplicate": 0.016}
BROKEN_WAYS, DUPLICATE_WAYS = 5, 3
SIDE = 96  # pixels; published pictures have 512 to 1024


@dataclass
class Tables:
    """Columns of the rows (arrays of one length) and the truth about them. Pictures are numbers."""

    user: np.ndarray
    prompt: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    kind: np.ndarray  # of fault, "" for none
    time: np.ndarray  # seconds
    first: np.ndarray  # whether the winner is picture 0
    uids: np.ndarray
    fault: dict[int, str] = field(default_factory=dict)  # of a picture
    copies: dict[int, int] = field(default_factory=dict)  # near-duplicate: its original
    twins: dict[int, int] = field(default_factory=dict)  # loser of "the same picture": the winner with the same bytes

    def rows_of(self, kind: str) -> set[int]:
        return set(np.flatnonzero(self.kind == kind).tolist())


def generate(rows: int, seed: int = 0, images: bool = False) -> Tables:
    """Exactly `rows` rows in the order of their time."""
    rng = np.random.default_rng(seed)
    shares = SHARES | (IMAGE_SHARES if images else {})
    counts = {kind: max(6, round(rows * share)) for kind, share in shares.items()}
    for kind in ("A over B and B over A", "near-duplicate"):
        counts[kind] = counts.get(kind, 0) // 2 * 2
    users, prompts = max(4, rows // 150), max(8, rows // 14)
    crowd = 1 / np.arange(1, users + 1) ** 0.9
    blocks: list[tuple] = []  # (user, prompt, winner, loser, kind, time) arrays
    fresh = 0
    fault: dict[int, str] = {}
    copies: dict[int, int] = {}
    twins: dict[int, int] = {}

    def who(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Users, prompts and starting times of n sessions."""
        return (
            1 + rng.choice(users, n, p=crowd / crowd.sum()),
            (prompts * rng.random(n) ** 1.5).astype(np.int64),
            rng.integers(0, 10_000_000, n) * 60,
        )

    def take(n: int) -> np.ndarray:
        nonlocal fresh
        fresh += n
        return np.arange(fresh - n, fresh)

    def add(user, prompt, winner, loser, kind, time) -> None:
        blocks.append((user, prompt, winner, loser, np.full(len(user), kind, "U32"), time))

    for kind in SINGLE:
        user, prompt, time = who(counts[kind])
        a, b = take(len(user)), take(len(user))
        add(user, prompt, a, b, kind, time)
        if images and kind == "the same picture":
            twins = dict(zip(b[::3].tolist(), a[::3].tolist(), strict=True))
    user, prompt, time = who(counts["A over B and B over A"] // 2)
    a, b = take(len(user)), take(len(user))
    add(user, prompt, a, b, "A over B and B over A", time)
    add(user, prompt, b, a, "A over B and B over A", time + 30)
    left = counts["cycle"]
    while left >= 3:  # rings of 3 to 6, and a sound choice that hangs on each
        size = left if left < 9 else int(rng.integers(3, 7))
        left -= size
        user, prompt, time = who(1)
        ring = take(size)
        same = [np.repeat(column, size) for column in (user, prompt, time)]
        add(same[0], same[1], ring, np.roll(ring, -1), "cycle", same[2] + 30 * np.arange(size))
        add(user, prompt, ring[:1], take(1), "", time + 1000)
    if images:
        for kind in ("broken", "tiny", "near-black", "near-uniform"):
            user, prompt, time = who(counts[kind])
            bad, good = take(len(user)), take(len(user))
            turn = rng.random(len(user)) < 0.5
            add(
                user, prompt, np.where(turn, bad, good), np.where(turn, good, bad), "choice with a faulty picture", time
            )
            fault |= dict.fromkeys(bad.tolist(), kind)
        user, prompt, time = who(counts["near-duplicate"] // 2)
        original, copy = take(len(user)), take(len(user))
        add(user, prompt, original, take(len(user)), "", time)
        merged = np.arange(len(user)) % 2 == 0  # the others meet their original
        add(user[merged], prompt[merged], copy[merged], take(merged.sum()), "", time[merged] + 30)
        lone = ~merged
        add(user[lone], prompt[lone], original[lone], copy[lone], "near-duplicate choice", time[lone] + 30)
        copies = dict(zip(copy.tolist(), original.tolist(), strict=True))

    sound = rows - sum(len(block[0]) for block in blocks) - counts["repeated"]
    lengths = np.minimum(rng.geometric(0.25, sound), 30)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), sound) + 1]
    lengths[-1] -= lengths.sum() - sound
    user, prompt, time = who(len(lengths))
    best, quality = take(len(lengths)), rng.random(len(lengths))
    places = []
    for step in range(lengths.max()):
        on = np.flatnonzero(lengths > step)
        new, its = take(len(on)), rng.random(len(on))
        wins = its > quality[on]
        winner, loser = np.where(wins, new, best[on]), np.where(wins, best[on], new)
        add(user[on], prompt[on], winner, loser, "", time[on] + 30 * step)
        places.append(blocks[-1])
        best[on], quality[on] = winner, np.maximum(quality[on], its)
    columns_so_far = [np.concatenate(column) for column in zip(*places, strict=True)]
    again = rng.integers(0, sound, counts["repeated"])
    add(*(column[again] for column in columns_so_far[:4]), "repeated", columns_so_far[5][again] + 3601)

    columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    order = np.argsort(columns[5], kind="stable")
    columns = [column[order] for column in columns]
    raw = rng.bytes(16 * fresh).hex()
    uids = [raw[i : i + 32] for i in range(0, len(raw), 32)]
    uids = np.array([f"{u[:8]}-{u[8:12]}-{u[12:16]}-{u[16:20]}-{u[20:]}" for u in uids], object)
    return Tables(*columns, rng.random(rows) < 0.5, uids, fault, copies, twins)


def caption(prompt: int, row: int, kind: str) -> str:
    """One prompt's words; case and spacing differ from row to row, as people type."""
    words = f"a {('fox', 'castle', 'robot', 'forbiddenly cute cat')[prompt % 4]} number {prompt}"
    words = words.title() if row % 5 == 0 else words
    return f"{words},  {WORD.title()} love" if kind == "word list" else words + " " * (row % 2)


def rows_table(tables: Tables, start: int, stop: int, picture: Callable[[int], bytes | None] | None) -> pa.Table:
    """Rows as published. picture: the bytes of a picture; None for the no-images variant."""
    part = slice(start, stop)
    numbers = np.arange(start, stop)
    first, kind = tables.first[part], tables.kind[part]
    ends = tables.uids[tables.winner[part]], tables.uids[tables.loser[part]]
    pictures = [np.where(first, tables.winner[part], tables.loser[part])]
    pictures.append(np.where(first, tables.loser[part], tables.winner[part]))
    uid = [np.where(first, *ends), np.where(first, *ends[::-1])]
    same = (kind == "the same picture") & ~np.isin(tables.loser[part], list(tables.twins))
    uid[1] = np.where(same & (numbers % 2 == 0), uid[0], uid[1])
    label = [np.where(first, 1.0, 0.0), np.where(first, 0.0, 1.0)]
    tied, unlabelled, holed = (kind == name for name in ("tied", "unlabelled", "incomplete"))
    for values in label:
        values[tied] = 0.5
        values[unlabelled & (numbers % 3 == 1)] = np.nan
    best = np.where(kind == "unclear winner", ends[1], ends[0])
    best[tied] = "tie"
    captions = np.array([caption(*a) for a in zip(tables.prompt[part].tolist(), numbers, kind, strict=True)], object)
    captions[holed & (numbers % 3 == 0)] = "  "
    captions[holed & (numbers % 3 == 1)] = None
    model = np.array(["stabilityai/stable-diffusion-2-1", "dreamlike-art/dreamlike-photoreal-2.0"], object)
    columns = {
        "are_different": ~same | (numbers % 2 == 0),
        "best_image_uid": best,
        "caption": captions,
        "created_at": pa.array(tables.time[part] * 1_000_000_000, pa.timestamp("ns")),
        "has_label": ~(unlabelled & (numbers % 3 != 1)),
        "user_id": pa.array(tables.user[part], mask=holed & (numbers % 3 == 2)),
        "ranking_id": numbers,
        "num_example_per_prompt": np.ones(len(numbers), np.int64),
        "__index_level_0__": numbers,
    }
    for side in (0, 1):
        columns[f"image_{side}_uid"] = uid[side]
        columns[f"image_{side}_url"] = [f"https://example.invalid/{name}.png" for name in uid[side]]
        columns[f"label_{side}"] = pa.array(label[side], mask=unlabelled & (numbers % 3 == 2))
        columns[f"model_{side}"] = model[pictures[side] % 2]
        if picture:
            columns[f"jpg_{side}"] = pa.array([picture(p) for p in pictures[side].tolist()], pa.binary())
    schema = SCHEMA if picture else pa.schema([f for f in SCHEMA if not f.name.startswith("jpg")])
    return pa.table({name: columns[name] for name in schema.names}, schema)


def write(
    tables: Tables, folder: Path, images: bool = False, files: int = 2, row_group: int = 32_768, side: int = SIDE
) -> Path:
    """The published layout: data/train-00000-of-00002.parquet and so on. Returns the folder. side: pixels."""
    picture = lru_cache(256)(lambda number: encoded(tables, number, side)) if images else None
    (folder / "data").mkdir(parents=True)
    bounds = np.linspace(0, len(tables.user), files + 1).astype(int)
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        name = folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        schema = SCHEMA if images else pa.schema([f for f in SCHEMA if not f.name.startswith("jpg")])
        with pq.ParquetWriter(name, schema) as writer:
            for at in range(start, stop, row_group):
                writer.write_table(rows_table(tables, at, min(at + row_group, stop), picture))
    return folder


def encoded(tables: Tables, number: int, side: int = SIDE) -> bytes | None:
    """A picture's bytes: soft shapes, or what its fault asks for."""
    number = tables.twins.get(number, number)
    fault = tables.fault.get(number)
    if fault == "broken":
        return broken(number % BROKEN_WAYS, jpeg(shapes(number, side)))
    if fault == "tiny":
        return jpeg(shapes(number, 40))
    if fault == "near-black":
        return jpeg(shapes(number, side).point(lambda v: v // 32))
    if fault == "near-uniform":
        return jpeg(Image.new("RGB", (side, side), tuple(shapes(number).getpixel((5, 5)))))
    if number in tables.copies:
        original = shapes(tables.copies[number], side)
        if number % DUPLICATE_WAYS == 0:
            return jpeg(original, 60)
        if number % DUPLICATE_WAYS == 1:
            return jpeg(original.resize((side * 5 // 6, side * 5 // 6)), 85)
        return jpeg(original.point(lambda v: min(255, v + 6)), 90)
    return jpeg(shapes(number, side))


def shapes(number: int, side: int = SIDE) -> Image.Image:
    coarse = np.random.default_rng(number).integers(30, 226, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def broken(way: int, sound: bytes) -> bytes | None:
    """Null, cut short, garbage, and two decompression bombs: past Pillow's limit, and below it."""
    if way < 3:
        return (None, sound[: len(sound) // 2], sound[::-1])[way]
    return bomb(30_000 if way == 3 else 9_000)


@lru_cache
def bomb(side: int) -> bytes:
    """A small PNG that says it has side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(side + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def main() -> None:
    parser = argparse.ArgumentParser(prog="pickapic_tables.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=PUBLISHED_ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", action="store_true")
    args = parser.parse_args()
    tables = generate(args.rows, args.seed, args.images)
    write(tables, args.folder, args.images, row_group=512 if args.images else 32_768)


if __name__ == "__main__":
    main()
