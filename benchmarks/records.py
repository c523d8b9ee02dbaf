"""What every benchmark leaves: rows in a record, docs/performance-*.json, and its section of docs/performance.md.

Importing this puts the repository's root on the path, so that `python benchmarks/NAME.py` finds its packages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))


def parser_of(file: str, description: str) -> argparse.ArgumentParser:
    """A benchmark's parser, with the options that all of them have; description: its docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/{Path(file).name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the record and performance.md are")
    return parser


def update_rows(path: Path, row: dict, same: Sequence[str], key: str = "") -> list[dict]:
    """Put a row into a record, in place of the one that has the same values of `same`, and return all of them.

    key: where the record holds its rows, "" if it is a list of them.
    """
    rows = []
    if path.exists():
        content = json.loads(path.read_text())
        rows = content[key] if key else content
    rows = [other for other in rows if any(other[name] != row[name] for name in same)] + [row]
    rows.sort(key=lambda other: [other[name] for name in same])
    path.write_text(json.dumps({key: rows} if key else rows, indent=1) + "\n")
    return rows


def write_section(page: Path, title: str, text: str) -> None:
    """Put a section into a page: in place of the one with this title, else at the end."""
    written = page.read_text() if page.exists() else "# What it costs\n"
    introduction, *sections = written.split("\n## ")
    titles = [section.partition("\n")[0] for section in sections]
    section = f"{title}\n\n{text.rstrip()}\n"
    if title in titles:
        sections[titles.index(title)] = section
    else:
        sections.append(section)
    page.write_text("\n## ".join([introduction, *sections]))


def publish(
    out: Path, record: str, row: dict, same: Sequence[str], title: str, page: Callable[[list[dict]], str], key: str = ""
) -> None:
    """Put a row into `out`/record, write its section of `out`/performance.md anew, and print the row."""
    write_section(out / "performance.md", title, page(update_rows(out / record, row, same, key)))
    print(json.dumps(row, indent=1), flush=True)


def machine() -> str:
    """Cores, processor and Python."""
    model = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    name = model[0] if model else platform.machine()
    return f"{os.cpu_count()} cores, {name}; Python {platform.python_version()}"


def spread(values: np.ndarray, digits: int = 2) -> dict:
    """Median and the middle 80 % of repeated measurements."""
    low, high = np.percentile(values, [10, 90])
    return {
        "median": round(float(np.median(values)), digits),
        "p10_p90": [round(float(bound), digits) for bound in (low, high)],
    }


def with_spread(entry: dict) -> str:
    """A `spread` in words."""
    return f"{entry['median']} ({entry['p10_p90'][0]} to {entry['p10_p90'][1]})"


def reached(value: bool) -> str:
    """Whether a bar is reached, as a cell."""
    return "yes" if value else "**no**"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118)
