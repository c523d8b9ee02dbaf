"""A way to add the user that was tried and not taken: scores, softmax, and a product that is summed into the output.

    python benchmarks/branch_sums.py sd15 sdxl

The residual is never written then, only scores of a few keys. Beside today's way (torch's attention and a sum), at the
shapes of SD1.5 at 512 and SDXL at 1024 pixels, one row: CPU time of one thread, and the largest error beside float64 as
a share of the largest value. Adds to docs/performance-sums.json, from which docs/performance.md is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from records import machine, parser_of, publish, wrapped

from training.evaluation.tables import table

# (queries, width, heads) of the levels that have cross-attention.
SHAPES = {
    "sd15": [(4096, 320, 8), (1024, 640, 8), (256, 1280, 8), (64, 1280, 8)],
    "sdxl": [(4096, 640, 10), (1024, 1280, 20)],
}
NAMES = {"sd15": "SD1.5, 512 px", "sdxl": "SDXL, 1024 px"}
TITLE = "Summing into the output, tried and not taken"


def main() -> None:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("families", nargs="+", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for family in args.families:
        row = {"family": family, "machine": machine(), "note": args.note, "precisions": {}}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            row["precisions"][str(dtype).removeprefix("torch.")] = {
                tokens: measured(SHAPES[family], tokens, dtype, args.rounds) for tokens in (4, 16)
            }
        publish(args.out, "performance-sums.json", row, ("family",), TITLE, page)


def measured(shapes: list, tokens: int, dtype, rounds: int) -> dict:
    """{"ratio": time of the way tried to today's, over all levels; "error", "error_today": the largest of them}."""
    import torch

    spent = {today: 0.0, tried: 0.0}
    errors = {today: 0.0, tried: 0.0}
    with torch.inference_mode():
        for count, width, heads in shapes:
            torch.manual_seed(0)
            q = (2 * torch.randn(1, count, width)).to(dtype)
            k, v = ((scale * torch.randn(1, tokens, width)).to(dtype) for scale in (2, 1))
            exact = torch.zeros(1, count, width, dtype=torch.float64)
            today(exact, q.double(), k.double(), v.double(), heads)
            for way in spent:
                out = torch.zeros_like(q)
                way(out, q, k, v, heads)
                errors[way] = max(errors[way], float((out.double() - exact).abs().max() / exact.abs().max()))
            times = {way: [seconds(way, q, k, v, heads) for _ in range(rounds)] for way in spent}
            for way, each in times.items():
                spent[way] += float(np.percentile(each, 25))
    return {"ratio": round(spent[tried] / spent[today], 2), "error": errors[tried], "error_today": errors[today]}


def today(out, q, k, v, heads: int) -> None:
    from prefgen.branch import user_residual

    out.add_(user_residual(q, k, v, heads))


def tried(out, q, k, v, heads: int) -> None:
    import torch

    sums, q, k, v = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1) for x in (out, q, k, v))
    sums.baddbmm_(torch.bmm(q, k.mT * k.shape[-1] ** -0.5).softmax(-1), v)


def seconds(way: Callable, q, k, v, heads: int) -> float:
    """CPU time of one call of a way, into an output that other work has just written."""
    import torch

    out = torch.randn(q.shape).to(q.dtype)
    start = time.thread_time()
    way(out, q, k, v, heads)
    return time.thread_time() - start


def page(rows: list[dict]) -> str:
    """The section of docs/performance.md."""
    words = (
        "Scores, softmax and a product that is summed into the output's own view write 6 MiB in SD1.5's first block in "
        "place of 10.1. In half precision, which cards compute in, the scores are rounded, so that the error is "
        "several times today's. It is right in fp32 alone, mostly quicker there, and waits for all threads at every "
        "head. A second way beside torch's attention, for fp32, was not worth having."
    )
    head = ["", "precision", "tokens", "CPU time / today's", "error", "today's"]
    cells = [
        [NAMES[row["family"]], dtype, tokens, each["ratio"], f"{each['error']:.1e}", f"{each['error_today']:.1e}"]
        for row in rows
        for dtype, by_tokens in row["precisions"].items()
        for tokens, each in by_tokens.items()
    ]
    command = "`python benchmarks/branch_sums.py sd15 sdxl`, record: `performance-sums.json`."
    machines = [f"{NAMES[row['family']]}: {row['machine']}. {row['note']}".rstrip() for row in rows]
    return "\n\n".join([command, wrapped(words), table(head, cells), *machines])


if __name__ == "__main__":
    main()
