"""What listing a large taste costs: its pictures from the journal, as the sidebar and Load Preference History ask.

    python benchmarks/taste_listing.py

Rates small pictures into a new taste, one act for every hundred, then lists it twenty times. Adds the times to
docs/performance-tastes.json, from which docs/performance.md is written.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from records import machine, parser_of, publish, reached, spread, with_spread, wrapped

from prefgen.tastes.taste import Taste
from training.evaluation.tables import table

LISTINGS = 20
LIMIT = 100  # ms that a listing may cost
AN_ACT = 100  # pictures


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--pictures", type=int, default=5000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        taste = filled(Path(folder, "large"), args.pictures)
        milliseconds = []
        for _ in range(LISTINGS + 1):
            start = time.perf_counter()
            listed = taste.pictures()
            milliseconds.append(1000 * (time.perf_counter() - start))
    first, *again = milliseconds
    row = {
        "pictures": len(listed),
        "first_milliseconds": round(first, 1),
        "again_milliseconds": spread(np.array(again)),
        "limit_milliseconds": LIMIT,
        "machine": machine(),
        "note": args.note,
    }
    publish(args.out, "performance-tastes.json", row, ("pictures",), "A taste of thousands of pictures", page)


def filled(folder: Path, count: int) -> Taste:
    """A new taste of so many pictures, every other one liked."""
    folder.mkdir()
    taste = Taste(folder)
    for number in range(count):
        pixels = np.full((8, 8, 3), (number % 256, number // 256 % 256, 7), np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        verdict = "disliked" if number % 2 else "liked"
        taste.rate(data.getvalue(), verdict, f"{number}.png", "rate", None, f"act {number // AN_ACT}")
    return taste


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "Pictures of 8 px, rated one after the other; what a listing costs depends on how many there are, not on how "
        "large. The first listing is right after the last verdict; the others are the median and the middle 80 % of 20."
    )
    cells = [
        [
            f"{r['pictures']:,}",
            f"{r['first_milliseconds']} ms",
            f"{with_spread(r['again_milliseconds'])} ms",
            reached(r["again_milliseconds"]["median"] < r["limit_milliseconds"]),
        ]
        for r in rows
    ]
    head = ["pictures", "first", "a listing", f"below {LIMIT} ms"]
    runs = [f"{r['machine']}. {r['note']}".rstrip() for r in rows]
    return "\n\n".join(["`python benchmarks/taste_listing.py`", wrapped(words), table(head, cells), *runs])


if __name__ == "__main__":
    main()
