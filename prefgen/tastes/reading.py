"""What of a taste the MLLM reads: its pictures in the order of their verdicts, each once, or those of a revision."""

from __future__ import annotations

from pathlib import Path

from ..history_folder import JOURNAL, VERDICTS, HistoryFolder
from .taste import Taste


def history_folder(path: str | Path, revision: str = "") -> HistoryFolder:
    """The folder of a history, to be read. revision: 8 hexadecimal digits, or "" for what is there now.

    A folder that nobody rated in by the browser has no journal and is read as it is: nothing is written there. Raises
    FileNotFoundError, ValueError or TasteError with one sentence.
    """
    folder = HistoryFolder(path)
    if not revision and not (folder.path / JOURNAL).is_file():
        return folder
    taste = Taste(path)
    pictures = taste.frozen(revision) if revision else taste.pictures()
    rows = taste.rows(pictures)
    # What is read now can be asked for by its name later.
    folder.revision = revision or taste.keep_revision(rows)
    files = {verdict: [picture.path for picture in pictures if picture.verdict == verdict] for verdict in VERDICTS}
    folder.use(files, {picture.path: prompt for picture, (_, _, prompt) in zip(pictures, rows, strict=True)})
    return folder
