"""What a slider of Fuse User Vector costs: the adapter's file is read once and then kept.

    python benchmarks/fuse_slider.py --folder DIR

Writes a plus IP-Adapter of SDXL's size (fp16, random weights, 0.85 GB) to DIR, reads it by the node's own functions
with a history of 8 liked and 8 disliked pictures, then moves `push` twenty times. Adds the times to
docs/performance-fuse.json, from which docs/performance.md is written.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from records import machine, parser_of, publish, reached, spread, with_spread, wrapped

from prefgen.adapter_checks import check_encoded
from prefgen.adapter_file import load_adapter_once
from prefgen.encoded import EncodedPreference
from prefgen.fusion import fuse_user
from training.evaluation.tables import table

NAME = "ip-adapter-plus_sdxl_vit-h"
MOVES = 20
EXAMPLES = 8  # of each side
LIMIT = 100  # ms that a move may cost


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the adapter is kept")
    parser.add_argument("--times", type=int, default=10, help="a tenth of the branch's width, 10 is SDXL's own")
    args = parser.parse_args()
    from tests.prefgen import ip_adapter_files

    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"{NAME}.safetensors"
    if not path.exists():
        ip_adapter_files.write(args.folder, NAME, times=args.times, dtype=torch.float16)
    encoded = history()
    milliseconds = []
    for move in range(MOVES + 1):
        start = time.perf_counter()
        adapter = load_adapter_once(path)
        check_encoded(adapter.header, encoded)
        fuse_user(adapter, encoded, push=move / MOVES)
        milliseconds.append(1000 * (time.perf_counter() - start))
    first, *moved = milliseconds
    row = {
        "adapter": NAME,
        "file_gb": round(path.stat().st_size / 1e9, 2),
        "first_milliseconds": round(first, 1),
        "moved_milliseconds": spread(np.array(moved)),
        "limit_milliseconds": LIMIT,
        "machine": machine(),
        "note": args.note,
    }
    publish(args.out, "performance-fuse.json", row, ("adapter",), "A slider of Fuse User Vector", page)


def history() -> EncodedPreference:
    """What CLIP ViT-H would say of some pictures, at random."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2 * EXAMPLES, 1024, generator=generator)
    states = torch.randn(2 * EXAMPLES + 1, 257, 1280, generator=generator)
    return EncodedPreference(
        hidden=None,
        image_embed_liked=embeds[:EXAMPLES],
        image_embed_disliked=embeds[EXAMPLES:],
        clip_vision={"width": 1024, "states_width": 1280},
        image_states_liked=states[:EXAMPLES],
        image_states_disliked=states[EXAMPLES : 2 * EXAMPLES],
        image_states_none=states[-1],
    )


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "An IP-Adapter of the published layout with random weights (fp16), and a history of 8 liked and 8 disliked "
        "pictures as CLIP ViT-H reads them. The first is the node with the file still to be read; the moves are the "
        "same node with another `push`, median and the middle 80 % of 20."
    )
    cells = [
        [
            r["adapter"],
            f"{r['file_gb']} GB",
            f"{r['first_milliseconds']} ms",
            f"{with_spread(r['moved_milliseconds'])} ms",
            reached(r["moved_milliseconds"]["median"] < r["limit_milliseconds"]),
        ]
        for r in rows
    ]
    head = ["adapter", "file", "first", "a move", f"below {LIMIT} ms"]
    runs = [f"{r['machine']}. {r['note']}".rstrip() for r in rows]
    return "\n\n".join(["`python benchmarks/fuse_slider.py --folder DIR`", wrapped(words), table(head, cells), *runs])


if __name__ == "__main__":
    main()
