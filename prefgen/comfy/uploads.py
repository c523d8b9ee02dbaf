"""Files that the browser sends, and zips that it gets: bounded, decoded and re-checked before anything counts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
from aiohttp import web

from ..files import is_hidden_name
from ..history_folder import VERDICTS
from ..pictures import picture_suffixes
from ..tastes.exchange import MAX_FILES, Imported, export_zip, import_folder, import_zip
from ..tastes.names import TasteError, file_name, printable
from ..tastes.stored import MAX_BYTES
from ..tastes.taste import Taste
from .doors import NO_SNIFFING, in_thread, refused

MAX_UPLOAD = 4 << 30  # bytes of a zip, or of a folder's files
CHUNK = 1 << 20


async def receive(request: web.Request, taste: Taste) -> Imported:
    """Rate the files of a multipart form: a field `verdict`, then the files, in their order."""
    if request.content_type != "multipart/form-data":
        raise TasteError("The pictures aren't sent as a form: use the panel, or multipart/form-data.")
    done = Imported()
    verdict = ""
    async for part in parts_of(request):
        if part.name == "verdict":
            verdict = (await bounded(part, 64) or b"").decode(errors="replace")
            continue
        if not part.filename:
            continue
        data = await bounded(part, MAX_BYTES)
        if data is None:
            done.refused.append((printable(part.filename), f"more than {MAX_BYTES >> 20} MB"))
            continue
        try:
            change = await in_thread(taste.rate, data, verdict, part.filename, "drop")
            done.added += bool(change.events)
            done.there += not change.events
        except TasteError as error:
            done.refused.append((printable(part.filename), str(error)))
    return done


async def parts_of(request: web.Request) -> AsyncIterator:
    """The parts of a multipart form. TasteError for one that can't be read, or that has a form inside."""
    with readable_form():
        reader = await request.multipart()
    while True:
        with readable_form():
            part = await reader.next()
        if part is None:
            return
        if not hasattr(part, "read_chunk"):
            raise TasteError("The form has another form inside: send its files one beside the other.")
        yield part


async def chunks_of(part) -> AsyncIterator[bytes]:
    """A part's bytes, in pieces of at most CHUNK. TasteError where the form ends within it."""
    while True:
        with readable_form():
            chunk = await part.read_chunk(CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def readable_form() -> Iterator[None]:
    """What aiohttp raises for a form without a boundary, with headers that are none, or that was cut short."""
    try:
        yield
    except web.HTTPException:
        raise
    except Exception as error:  # noqa: BLE001  half a dozen kinds, by what is broken and by version
        raise TasteError("The form can't be read to its end: send it again.") from error


async def bounded(part, limit: int) -> bytes | None:
    """A part's bytes, or None where it has more than `limit`; its rest is then read and thrown away."""
    chunks = []
    size = 0
    async for chunk in chunks_of(part):
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
    return b"".join(chunks) if size <= limit else None


async def receive_import(request: web.Request, taste: Taste) -> Imported:
    """Import what a multipart form holds: one zip, or the files of a folder, named by their paths in it."""
    if request.content_type != "multipart/form-data":
        raise TasteError("The zip isn't sent as a form: use the panel, or multipart/form-data.")
    with tempfile.TemporaryDirectory(dir=temp_folder()) as folder:
        files = Received(Path(folder))
        async for part in parts_of(request):
            if part.filename:
                await files.take(part)
        if not files.paths:
            raise TasteError("The form holds no file: choose a zip or a folder.")
        if len(files.paths) == 1 and not has_picture_suffix(files.paths[0]):
            with open(files.paths[0], "rb") as file:
                return await in_thread(import_zip, taste, file)
        return await in_thread(import_folder, taste, Path(folder))


class Received:
    """Files of a form, in a temporary folder: the folders that they come from are numbered, and only a verdict's name
    is taken over, so that no name leads anywhere. Sidecars stay beside their pictures."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: list[Path] = []
        self.size = 0
        self._folders: dict[str, Path] = {}

    async def take(self, part) -> None:
        """Write a part of the form, unless it is hidden. TasteError where all of them are too many or too much."""
        *parents, name = part.filename.replace("\\", "/").split("/")
        if any(is_hidden_name(each) for each in (*parents, name)):
            return
        folder = self._folder_of("/".join(parents))
        path = folder / file_name(*_stem_and_suffix(name))
        if path.exists():
            path = folder / file_name(*_stem_and_suffix(name), os.listdir(folder))
        with open(path, "wb") as file:
            async for chunk in chunks_of(part):
                file.write(chunk)
                self.size += len(chunk)
                if self.size > MAX_UPLOAD:
                    raise TasteError(f"These are more than {MAX_UPLOAD >> 30} GB: import them in parts.")
        self.paths.append(path)
        if len(self.paths) > MAX_FILES:
            raise TasteError(f"These are more than {MAX_FILES} files: import them in parts.")

    def _folder_of(self, parent: str) -> Path:
        if parent not in self._folders:
            verdict = next((each for each in reversed(parent.lower().split("/")) if each in VERDICTS), "unsorted")
            self._folders[parent] = self.folder / str(len(self._folders)) / verdict
            self._folders[parent].mkdir(parents=True)
        return self._folders[parent]


def _stem_and_suffix(name: str) -> tuple[str, str]:
    """As `file_name` takes them: what it cuts off is a suffix that isn't there."""
    suffix = Path(name).suffix.lower()
    return f"{Path(name).stem}.x", suffix if suffix.isascii() and suffix.isprintable() else ""


def has_picture_suffix(path: Path) -> bool:
    """Whether a file's name says that it is a picture."""
    return path.suffix.lower() in picture_suffixes()


def temp_folder() -> str:
    """ComfyUI's folder for what is gone after a restart."""
    temp = folder_paths.get_temp_directory()
    os.makedirs(temp, exist_ok=True)
    return temp


async def send_zip(request: web.Request, taste: Taste, private: bool) -> web.StreamResponse:
    """Send a taste as a zip, made in ComfyUI's temp folder and deleted when it is sent."""
    with tempfile.TemporaryFile(dir=temp_folder()) as file:
        left_out = await in_thread(export_zip, taste, file, private)
        if left_out and not taste.pictures():
            return refused(f"Nothing of {printable(taste.name)} can be read: {left_out[0][1]}.", 400)
        size = file.tell()
        file.seek(0)
        name = f"{taste.name}.zip".encode("ascii", "replace").decode().replace('"', "'")
        headers = NO_SNIFFING | {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(size)}
        headers["X-PrefGen-Left-Out"] = str(len(left_out))
        response = web.StreamResponse(headers=headers | {"Content-Type": "application/zip"})
        await response.prepare(request)
        while chunk := await in_thread(file.read, CHUNK):
            await response.write(chunk)
        await response.write_eof()
        return response
