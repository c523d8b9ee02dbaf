"""docs/performance.md, a section a benchmark, and the sections of the two benchmarks of the branch.

python benchmarks/performance_page.py      writes those two anew from their records
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
NAMES = {"sd15": "SD1.5, 512 px", "sdxl": "SDXL, 1024 px"}
PACKS = ("ours", "ours_both", "theirs")
# The bars: of the other pack's time, of a step, of memory.
THIRD = 1 / 3
SHARE = 0.03
MEGABYTES = 20


def write_section(title: str, lines: list[str]) -> None:
    """Put a section into docs/performance.md: in place of the one with this title, else at the end."""
    introduction, *sections = PAGE.read_text().split("\n## ")
    titles = [section.partition("\n")[0] for section in sections]
    text = "\n".join([title, "", *lines]).rstrip() + "\n"
    if title in titles:
        sections[titles.index(title)] = text
    else:
        sections.append(text)
    PAGE.write_text("\n## ".join([introduction, *sections]))


def write() -> None:
    """Both sections of the branch, from their records."""
    branch = read("performance-branch.json")
    if branch:
        write_section("A step with the user branch, beside ComfyUI_IPAdapter_plus", branch_part(branch))
    graphs = read("performance-full-size.json")
    if graphs:
        write_section("Graphs at full size", whole_part(graphs))


def read(name: str) -> list[dict]:
    path = DOCS / name
    return json.loads(path.read_text()) if path.exists() else []


def met(value: float, bar: float) -> str:
    return "yes" if value <= bar else "**no**"


def with_spread(entry: dict) -> str:
    return f"{entry['median']} ({entry['p10_p90'][0]} to {entry['p10_p90'][1]})"


def branch_part(rows: list[dict]) -> list[str]:
    lines = [
        "`PREFGEN_NEIGHBOURS=... python benchmarks/branch_cost.py sd15 sdxl`",
        "",
        *wrapped(
            "Milliseconds that a step takes longer in all cross-attention blocks that both packs "
            "reach, with the same files and tokens; median and the middle 80 % of 12 rounds, in which "
            "plain, ours and theirs take turns. IPAdapter_plus serves both halves and projects K and "
            "V at every step; PrefGen projects them once a run and by default serves the half with "
            "the prompt."
        ),
        "",
        "| | tokens | ours | ours, both halves | theirs | ours / theirs | at most 1/3 | both halves / theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for tokens, t in row["tokens"].items():
            ratio = t["ours_to_theirs"]
            cells = [
                NAMES[row["family"]],
                tokens,
                *(with_spread(t[f"{n}_ms"]) for n in ("ours", "ours_both", "theirs")),
            ]
            cells += [with_spread(ratio), met(ratio["median"], THIRD), with_spread(t["ours_both_to_theirs"])]
            lines.append(line(cells))
    lines += [
        "",
        "| | tokens | UNet step, s | ours, share of it | at most 3 % | K and V, MB | more memory, MB | at most 20 MB "
        "| both halves, MB |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        step = " and ".join(str(s) for s in row.get("step_seconds", [])) or "not measured"
        for tokens, t in row["tokens"].items():
            share = t.get("share_of_step")
            default = t["memory_mb"]["positive"]
            both = t["memory_mb"]["both"]
            shares = ["-", "-"] if share is None else [f"{100 * share:.1f} %", met(share, SHARE)]
            cells = [NAMES[row["family"]], tokens, step, *shares, default["held"], default["all"]]
            lines.append(line([*cells, met(default["all"], MEGABYTES), both["all"]]))
    lines += [
        "",
        *wrapped(
            "The share is of the default. More memory: K and V that the run keeps on the device, and the largest "
            "surplus of living storages in one block's attention, counted by a dispatch mode with torch's "
            "attention, at fp16. The adapter's own weights stay on the CPU in a run: "
            "`tests/prefgen/comfy/test_cost.py` "
            "counts that nothing touches them once K and V are projected, that in a whole run a model call reads "
            "sigma once at most and nothing else is read, and how often a compiled UNet breaks its graph."
        ),
        "",
    ]
    for row in rows:
        lines += [
            f"{NAMES[row['family']]}: {row['machine']}, {row['threads']} threads, load average before the start",
            f"{row['load_before']}, niceness {row['nice']}. {row['note']}".rstrip(),
            "",
        ]
    return lines


def whole_part(rows: list[dict]) -> list[str]:
    lines = [
        "`python benchmarks/full_size.py sd15 sdxl --folder DIR`",
        "",
        *wrapped(
            "Checkpoints in the published layout with random weights (fp16), loaded by "
            "CheckpointLoaderSimple on the real server; three graphs in a row, of which the first "
            "loads the checkpoint and the second CLIP vision and the adapter (an IP-Adapter of the "
            "published size with made-up weights), which the third still holds. Seconds are of whole "
            "graphs, with loading, each run once beside other work: no measure of the branch's time."
        ),
        "",
        "| | picture | steps | without, s | weight 0, s | with user, s | peak memory, GB | of it with user, GB "
        "| weight 0 is plain | change by the user |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        seconds = row["seconds"]
        peak = row["peak_memory_gb"]
        cells = [row["family"], f"{row['pixels']} px", row["steps"], *seconds.values(), peak["plain"], peak["user"]]
        cells += ["yes" if row["weight_0_is_plain"] else "**no**", f"{row['change']} of the latent's deviation"]
        lines.append(line(cells))
    lines.append("")
    for row in rows:
        lines += [
            f"{row['family']}: {row['machine']}, load average before {row['load_before']}. {row['note']}".rstrip(),
            "",
        ]
    return lines


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118)


def line(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    write()
