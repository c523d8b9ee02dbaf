"""PAMELA (arXiv 2604.07427): 69,904 scores from 1 to 5 by 199 people, CC BY 4.0, as its zip unpacks.

`annotations/pamela_*.json` have a row a rating: participant_id, image_id, original_score, image_metadata. A picture is
known by its image_id, wherever below the folder a file of that name lies.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from prefgen.files import TextError, file_sha256, is_hidden, read_text, visible_files
from prefgen.pictures import picture_suffixes

from ..errors import DataError
from .rating import SCORES, UNREADABLE, Dropped, Key, Source, text_of

ANNOTATIONS = "annotations/pamela_*.json"


def annotations(folder: Path) -> list[Path]:
    """The annotation files of PAMELA's folder, all splits; [] for any other folder."""
    return visible_files(folder, ANNOTATIONS)


def read_pamela(folder: Path) -> Source:
    """All its ratings: the common schema splits users and prompts by its own rule. DataError for what can't be read."""
    source = Source(folder, "pamela", SCORES)
    places = _pictures(folder)
    digest = hashlib.sha256()
    for file in annotations(folder):
        try:
            rows = json.loads(read_text(file))
        except (TextError, ValueError, OSError, RecursionError) as error:
            raise DataError(f"{file} is damaged ({error}): unpack PAMELA's zip again.") from error
        if not isinstance(rows, list):
            raise DataError(f"{file} holds no list of ratings: unpack PAMELA's zip again.")
        for number, row in enumerate(rows):
            place = f"{file.name}, row {number}"
            if not isinstance(row, dict):
                source.rows += 1
                source.dropped.append(Dropped(UNREADABLE, place))
                continue
            image = text_of(row.get("image_id"))
            about = row.get("image_metadata")
            prompt = about.get("prompt") if isinstance(about, dict) else None
            cells = {"user": row.get("participant_id"), "score": row.get("original_score"), "prompt": prompt}
            # A picture that isn't there keeps its name, and is counted as missing when it is looked at.
            source.add(place, cells, Key(places.get(image, f"{image} (missing)")) if image else None)
        digest.update(file_sha256(file).encode())
    source.digest = digest.hexdigest()
    return source


def _pictures(folder: Path) -> dict[str, str]:
    """{file name with and without its suffix: path below the folder}."""
    suffixes = picture_suffixes()
    places: dict[str, str] = {}
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(Path(root, name)))
        for name in sorted(files):
            path = Path(root, name)
            if path.suffix.lower() in suffixes and not is_hidden(path):
                below = path.relative_to(folder).as_posix()
                places.setdefault(name, below)
                places.setdefault(path.stem, below)
    return places
