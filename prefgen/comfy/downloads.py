"""Fetching sets of model files from the browser: only on the artist's click, by the code of the command.

The network is used by prefgen/download/fetch.py alone. One set at a time, in a thread; what came stays when it is
cancelled, and the next click goes on from there.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import folder_paths
from aiohttp import web

from ..download.fetch import DownloadError, FileSet, PinnedFile, fetch, load_sets, staged
from ..errors import MendableError
from .doors import in_thread, json_of
from .running import prompt_server

EVENT = "prefgen.download"
ANNOUNCED_EVERY = 0.25  # seconds


class Refused(MendableError):
    """What can't be fetched, in one sentence."""


class Cancelled(Exception):
    """The artist has stopped the download."""


class Download:
    """One set on its way. state: "running", "done", "cancelled" or "failed"; done: bytes of `total` that are there."""

    def __init__(self, name: str, file_set: FileSet, models: Path):
        self.name = name
        self.file_set = file_set
        self.models = models
        self.total = file_set.bytes
        self.done = 0
        self.state = "running"
        self.error = ""
        self.cancel = threading.Event()
        self._finished = 0
        self._announced_at = 0.0

    def run(self) -> None:
        """Fetch; in a thread of its own."""
        try:
            sizes = {self.models / file.to: file.bytes for file in self.file_set.files}
            for path in fetch(self.file_set, self.models, self._progress):
                self._finished += sizes[path]
                self.done = self._finished
                self._check()
            self.state = "done"
        except Cancelled:
            self.state = "cancelled"
        except DownloadError as error:
            self.state = "failed"
            self.error = str(error)
        except OSError as error:
            self.state = "failed"
            self.error = f"{Path(error.filename or self.models).name} can't be used: {(error.strerror or '').lower()}."
        except Exception:
            # Whatever it is: a download that nobody ends keeps every other one waiting.
            logging.exception("PrefGen's download of %s failed.", self.name)
            self.state = "failed"
            self.error = "PrefGen failed inside: the log of ComfyUI says where. Please report it."
        tell(self)

    def _progress(self, file: PinnedFile, done: int) -> None:
        self.done = self._finished + min(done, file.bytes)
        self._check()
        if time.monotonic() - self._announced_at > ANNOUNCED_EVERY:
            self._announced_at = time.monotonic()
            tell(self)

    def _check(self) -> None:
        if self.cancel.is_set():
            raise Cancelled

    def shown(self) -> dict:
        """As the panel shows it."""
        return {"name": self.name, "state": self.state, "done": self.done, "total": self.total, "error": self.error}


_current: Download | None = None
_lock = threading.Lock()


def tell(download: Download) -> None:
    """Tell every open page how far a download is."""
    server = prompt_server()
    if server is not None:
        server.send_sync(EVENT, download.shown())


async def list_sets(_: web.Request) -> web.Response:
    return web.json_response({"sets": await in_thread(described), "current": _current.shown() if _current else None})


async def start(request: web.Request) -> web.Response:
    await json_of(request)
    download = await in_thread(begin, request.match_info["set"])
    return web.json_response(download.shown())


async def cancel(request: web.Request) -> web.Response:
    if _current is not None and _current.name == request.match_info["set"]:
        _current.cancel.set()
    return web.json_response({})


ROUTES = {
    ("GET", "/prefgen/downloads"): list_sets,
    ("POST", "/prefgen/downloads/{set}"): start,
    ("DELETE", "/prefgen/downloads/{set}"): cancel,
}


def begin(name: str) -> Download:
    """Start fetching a set. Refused where there is no such set, or another one is on its way."""
    global _current
    file_set = sets_listed().get(name)
    if file_set is None:
        raise Refused("There is no set of that name: reload the page and choose one from the list.")
    with _lock:
        if _current is not None and _current.state == "running":
            if _current.name == name and not _current.cancel.is_set():
                return _current
            raise Refused(f"The set {_current.name} is on its way: wait for it, or cancel it first.")
        _current = Download(name, file_set, Path(folder_paths.models_dir))
    threading.Thread(target=_current.run, name="PrefGen download", daemon=True).start()
    return _current


def sets_listed() -> dict[str, FileSet]:
    """The sets that can be fetched. Refused for a list of the administrator's that can't be read."""
    try:
        return load_sets()
    except DownloadError as error:
        logging.warning("%s", error)
        raise Refused(
            "The list of sets that PREFGEN_SETS names can't be read: the log of ComfyUI says why. Unset it, or mend it."
        ) from error


def described() -> list[dict]:
    """Every set as the panel shows it: {"name", "what", "licence", "bytes", "missing", "begun", "files"}, sizes in
    bytes. missing: of the files that would be fetched, none where each is in some model folder; begun: what of these an
    earlier download fetched."""
    models = Path(folder_paths.models_dir)
    sets = []
    for name, file_set in sets_listed().items():
        missing = [file for file in file_set.files if not (models / file.to).is_file()]
        # The files of an MLLM lie in one folder: a set that is scattered over several roots is fetched into one.
        if all(present(models, file) for file in file_set.files):
            missing = []
        sets.append(
            {
                "name": name,
                "what": file_set.what,
                "licence": file_set.licence,
                "bytes": file_set.bytes,
                "missing": sum(file.bytes for file in missing),
                "begun": sum(staged(models, file) for file in missing),
                "files": [file.to for file in missing],
            }
        )
    return sets


def present(models: Path, file: PinnedFile) -> bool:
    """Whether a file of a set is there: in its place, or by its name and size in another folder of its kind."""
    kind, _, name = file.to.partition("/")
    roots = [models / kind]
    if kind in folder_paths.folder_names_and_paths:
        roots += [Path(root) for root in folder_paths.get_folder_paths(kind)]
    places = [root / name for root in roots]
    return any(place.is_file() and place.stat().st_size == file.bytes for place in places)
