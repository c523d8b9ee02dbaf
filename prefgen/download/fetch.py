"""One set of files: checked against its pins before anything is put in its place.

The one file of PrefGen that uses the network, by the standard library alone: the command and the sidebar's buttons call
`fetch`, and nothing else does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

SETS = Path(__file__).with_name("sets.json")
# In the models folder, so that a finished file is renamed and not copied; gone when nothing is half there.
STAGING = ".prefgen-download"
SPARE = 256 << 20  # bytes that a disk keeps free
CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds
HUB = "https://huggingface.co"  # HF_ENDPOINT names another one
YES = {"1", "on", "yes", "true"}  # what the hub's own client takes for yes in HF_HUB_OFFLINE

# progress(file, bytes of it that are there); called often, and may raise to stop: what came stays for the next run.
Progress = Callable[["PinnedFile", int], None]


class DownloadError(Exception):
    """What a person can mend, in one sentence."""


@dataclass(frozen=True)
class PinnedFile:
    """path: in the repository; to: below the models folder."""

    path: str
    to: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileSet:
    """Files of one revision of a repository. what: which models, for people."""

    what: str
    licence: str
    repository: str
    revision: str
    files: tuple[PinnedFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def load_sets(path: Path | None = None) -> dict[str, FileSet]:
    """The sets of a list; by default of the one that PREFGEN_SETS names, else ours. DownloadError for a list that can't
    be read or leaves the models folder."""
    path = path or Path(os.environ.get("PREFGEN_SETS") or SETS)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: _file_set(**entry) for name, entry in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DownloadError(f"{path} isn't a list of sets ({error}).") from error


def _file_set(files: list[dict], revision: str, **entry: str) -> FileSet:
    pinned = tuple(PinnedFile(**file) for file in files)
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"revision {revision!r} isn't a commit")
    for file in pinned:
        inside = [PurePosixPath(name) for name in (file.path, file.to)]
        if any(p.is_absolute() or ".." in p.parts or "\\" in str(p) or ":" in str(p) for p in inside):
            raise ValueError(f"{file.path} would leave the folder")
        if not file.to.endswith((".safetensors", ".json", ".txt")):
            raise ValueError(f"{file.to} is neither weights in safetensors nor a text file")
        if file.bytes <= 0 or not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise ValueError(f"{file.path} lacks its size or its SHA-256")
    return FileSet(files=pinned, revision=revision, **entry)


def fetch(file_set: FileSet, models: Path, progress: Progress = lambda file, done: None) -> Iterator[Path]:
    """Yield each file's path as soon as it is there and right. DownloadError names what is wrong and what to do.

    OSError with its file's name where a folder or file can't be used.
    """
    missing = []
    for file in file_set.files:
        target = models / file.to
        if not target.exists():
            missing.append(file)
        elif _is_pinned(target, file):
            yield target
        else:
            # By its place below the models folder: the browser needn't know where that lies.
            raise DownloadError(f"{file.to} is another file than the pinned one: move it away, then run this again.")
    staging = models / STAGING
    if missing:
        _check_space(models, missing)
    for file in missing:
        downloaded = _download(file_set, file, staging, progress)
        if not _is_pinned(downloaded, file):
            downloaded.unlink()
            raise DownloadError(
                f"What came for {file.path} is not the pinned file: it was thrown away. Run this again, and tell us if "
                "it happens twice."
            )
        target = models / file.to
        target.parent.mkdir(parents=True, exist_ok=True)
        _move(downloaded, target)
        yield target
    # Not empty while it holds what another set has begun: then it stays.
    with suppress(OSError):
        staging.rmdir()


def _is_pinned(path: Path, file: PinnedFile) -> bool:
    """Whether a file has the size and the SHA-256 that are pinned."""
    return path.stat().st_size == file.bytes and sha256(path) == file.sha256


def _check_space(models: Path, missing: list[PinnedFile]) -> None:
    """DownloadError if the disk has no room for what is missing and hasn't come yet."""
    present = sum(staged(models, file) for file in missing)
    needed = sum(file.bytes for file in missing) - present + SPARE
    free = shutil.disk_usage(models).free
    if free < needed:
        raise DownloadError(
            f"The disk of the models folder has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: make room."
        )


def _move(file: Path, target: Path) -> None:
    """Rename; where the target's folder is a link to another disk, copy beside the target first and rename that."""
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(file, beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        file.unlink()


def staged(models: Path, file: PinnedFile) -> int:
    """Bytes of a file that an earlier run has fetched."""
    part = models / STAGING / _part(file)
    return part.stat().st_size if part.is_file() else 0


def _part(file: PinnedFile) -> str:
    return f"{file.sha256}.part"


def address(file_set: FileSet, file: PinnedFile) -> str:
    """Where a file lies at its pinned revision. DownloadError for an HF_ENDPOINT that is no address."""
    hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if urlsplit(hub).scheme not in ("http", "https"):
        raise DownloadError(f"HF_ENDPOINT is {hub}, which is no address: let it begin with https:// or unset it.")
    return f"{hub}/{quote(file_set.repository)}/resolve/{file_set.revision}/{quote(file.path)}"


def _download(file_set: FileSet, file: PinnedFile, staging: Path, progress: Progress) -> Path:
    """The file in the staging folder, from where an earlier run broke off: the hub's own client begins anew."""
    name = f"{file.path} of {file_set.repository}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in YES:
        raise DownloadError("HF_HUB_OFFLINE is set: unset it to download.")
    staging.mkdir(exist_ok=True)
    part = staging / _part(file)
    present = part.stat().st_size if part.exists() else 0
    try:
        if present < file.bytes:
            request = Request(address(file_set, file), headers={"Range": f"bytes={present}-", "User-Agent": "prefgen"})
            with urlopen(request, timeout=TIMEOUT) as answer:
                start = present if answer.status == 206 else 0
                _check_answer(answer, start, file, name)
                _write(answer, part, start, file, progress)
    except HTTPError as error:
        if error.code in (401, 403):
            raise DownloadError(f"{name} asks for an agreement: accept it in a browser, fetch it by hand.") from error
        raise DownloadError(f"{name} can't be reached (HTTP {error.code}): is it still there?") from error
    except URLError as error:
        raise DownloadError(f"{name} can't be reached ({error.reason}): is there a network?") from error
    except (OSError, HTTPException) as error:
        # The part itself, not the network.
        if getattr(error, "filename", None):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"{staging} is full: make room and" if full else f"the connection broke off ({error}):"
        raise DownloadError(f"{name} is incomplete, {reason} run the same command again.") from error
    if part.stat().st_size < file.bytes:
        raise DownloadError(f"{name} is incomplete, the connection broke off: run the same command again.")
    return part


def _check_answer(answer, start: int, file: PinnedFile, name: str) -> None:
    """DownloadError for an answer that isn't the rest of the pinned file, before it is added to what has come."""
    if start:
        unit, _, span = answer.headers.get("Content-Range", "").partition(" ")
        right = unit == "bytes" and re.fullmatch(rf"{start}-\d+/({file.bytes}|\*)", span.strip())
    else:
        right = answer.headers.get("Content-Length", str(file.bytes)) == str(file.bytes)
    if not right:
        raise DownloadError(
            f"{name} was answered with something else (a page to log in to the network, perhaps): open the hub in a "
            "browser, then run this again."
        )


def _write(answer, part: Path, start: int, file: PinnedFile, progress: Progress) -> None:
    """Append what comes to the first `start` bytes of a part, a little more than pinned at most."""
    with open(part, "r+b" if start else "wb") as target:
        target.seek(start)
        while target.tell() <= file.bytes and (chunk := answer.read(CHUNK)):
            target.write(chunk)
            progress(file, target.tell())


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
