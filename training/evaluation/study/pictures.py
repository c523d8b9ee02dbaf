"""The pictures a study is made of, from a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prefgen.files import TextError, read_text

from ...data.errors import DataError

VERDICTS = ("liked", "disliked")
TABLES = ("pictures.jsonl", "pictures.parquet")
TEXTS = ("user", "prompt", "method", "verdict", "image")


@dataclass
class Pictures:
    """Image files. histories: {user: {"liked" or "disliked": [file]}}; painted: {(user, prompt): {method: file}}."""

    histories: dict[str, dict[str, list[Path]]] = field(default_factory=dict)
    painted: dict[tuple[str, str], dict[str, Path]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for files in self.painted.values() for method in files))


def read(source: Path) -> Pictures:
    """What `source` names: a table, or a folder with one, such as `make demo` leaves. DataError when there is nothing
    to compare."""
    if source.is_dir():
        tables = [source / name for name in TABLES if (source / name).is_file()]
        if not tables:
            raise DataError(f"{source} holds neither {' nor '.join(TABLES)}, as the output of make demo does.")
        source = tables[0]
    pictures = read_table(source)
    if not pictures.painted:
        raise DataError(f"{source} has no row with a prompt and a method: there is nothing to compare.")
    for user, _ in pictures.painted:
        if not pictures.histories.get(user, {}).get("liked"):
            raise DataError(f"{source}: user {user!r} has no liked picture, so nobody can know their taste: add rows.")
    return pictures


def rows_of(file: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of a .jsonl or .parquet file."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(file, partitioning=None).to_pylist()
            yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))
        elif file.suffix == ".jsonl":
            for number, line in enumerate(read_text(file).split("\n"), 1):
                if line.strip():
                    yield f"{file}, line {number}", json.loads(line)
        else:
            raise DataError(f"{file} is no table: PICTURES is a .jsonl or .parquet file, or a folder.")
    except TextError as error:
        raise DataError(str(error)) from error
    except (OSError, ValueError) as error:  # what pyarrow raises is one of these as well
        raise DataError(f"Can't read {file}: {str(error).splitlines()[0]}.") from error


def read_table(file: Path) -> Pictures:
    """A row with a verdict is of a history, any other has a prompt and a method. DataError names the row."""
    pictures = Pictures()
    for where, row in rows_of(file):
        if not isinstance(row, dict):
            raise DataError(f"{where} is no object with user, image and so on.")
        row = {name: str(row[name]) for name in TEXTS if row.get(name) not in (None, "")}
        missing = {"user", "image", *(() if "verdict" in row else ("prompt", "method"))} - row.keys()
        if missing:
            raise DataError(f"{where} has no {' and no '.join(sorted(missing))}.")
        image = file.parent / row["image"]
        if not image.is_file():
            raise DataError(f"{where}: there is no picture {image}.")
        if "verdict" in row:
            if row["verdict"] not in VERDICTS:
                raise DataError(f"{where}: verdict {row['verdict']!r} is neither liked nor disliked.")
            history = pictures.histories.setdefault(row["user"], {verdict: [] for verdict in VERDICTS})
            history[row["verdict"]].append(image)
        else:
            methods = pictures.painted.setdefault((row["user"], row["prompt"]), {})
            if row["method"] in methods:
                raise DataError(f"{where}: a second picture of the same user, prompt and method; keep one of them.")
            methods[row["method"]] = image
    return pictures
