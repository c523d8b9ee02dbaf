"""The routes under /prefgen/ by which the browser rates pictures: docs/routes.md lists them.

Names are looked up in what is there, never joined to a path; what another site sends is refused; files are read and
written in threads. Every change tells all open pages by the websocket event "prefgen.taste".
"""

from __future__ import annotations

import contextlib
import heapq
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import folder_paths
from aiohttp import web
from comfy.cli_args import args as comfy_args

from ..files import is_hidden_name
from ..tastes.exchange import Imported, export_zip, import_zip
from ..tastes.names import TasteError, printable
from ..tastes.shelf import Shelf
from ..tastes.taste import MAX_BYTES, Change, Picture, Taste
from . import folders
from .auto import adapter_kinds
from .doors import file_of, guarded, in_thread, json_of, refused, text_of, texts_of
from .running import prompt_server

EVENT = "prefgen.taste"
MAX_UPLOAD = 4 << 30  # bytes of a zip
CHUNK = 1 << 20
RECENT = 200  # pictures of the output folder that the panel shows
# Pictures are shown as what they are or not at all: never as a page.
SHOWN_AS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}
NO_SNIFFING = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}


def shelf() -> Shelf:
    """The tastes in ComfyUI's input folder."""
    return Shelf(Path(folder_paths.get_input_directory()) / folders.HISTORY_FOLDER)


def register(server) -> None:
    """Add the routes to ComfyUI's PromptServer, unless they are there."""
    if any(getattr(route, "path", "") == "/prefgen/tastes" for route in server.routes):
        return
    for (method, path), handler in ROUTES.items():
        server.routes.route(method, path)(guarded(handler))


def tell(name: str) -> None:
    """Tell every open page that a taste has changed."""
    server = prompt_server()
    if server is not None:
        server.send_sync(EVENT, {"name": name})


# --- the routes ---


async def recent(_: web.Request) -> web.Response:
    return web.json_response({"pictures": await in_thread(newest_outputs)})


async def list_adapters(_: web.Request) -> web.Response:
    return web.json_response({"adapters": await in_thread(adapter_kinds)})


async def list_tastes(_: web.Request) -> web.Response:
    return web.json_response({"tastes": await in_thread(summaries), "multi_user": comfy_args.multi_user})


async def new_taste(request: web.Request) -> web.Response:
    taste = await in_thread(shelf().new, text_of(await json_of(request), "name"))
    tell(taste.name)
    return web.json_response({"name": taste.name})


async def copy_taste(request: web.Request) -> web.Response:
    new_name = text_of(await json_of(request), "name")
    taste = await in_thread(shelf().copy, request.match_info["name"], new_name)
    tell(taste.name)
    return web.json_response({"name": taste.name})


async def rename_taste(request: web.Request) -> web.Response:
    new_name = text_of(await json_of(request), "name")
    taste = await in_thread(shelf().rename, request.match_info["name"], new_name)
    tell(taste.name)
    return web.json_response({"name": taste.name})


async def forget_taste(request: web.Request) -> web.Response:
    await in_thread(shelf().forget, request.match_info["name"])
    tell(request.match_info["name"])
    return web.json_response({})


async def show_taste(request: web.Request) -> web.Response:
    return web.json_response(await in_thread(description, taste_of(request)))


async def thumbnail(request: web.Request) -> web.Response:
    taste = taste_of(request)
    sha256 = request.match_info["sha256"]
    data = await in_thread(taste.stored_thumbnail, sha256)
    if data is None:
        data = await in_thread(taste.thumbnail, await in_thread(picture_of, taste, sha256))
    # A checksum always names the same picture.
    headers = NO_SNIFFING | {"Cache-Control": "private, max-age=31536000, immutable"}
    return web.Response(body=data, content_type="image/webp", headers=headers)


async def whole_picture(request: web.Request) -> web.StreamResponse:
    picture = await in_thread(picture_of, taste_of(request), request.match_info["sha256"])
    kind = SHOWN_AS.get(picture.path.suffix.lower(), "application/octet-stream")
    return web.FileResponse(picture.path, headers=NO_SNIFFING | {"Content-Type": kind})


async def rate_file(request: web.Request) -> web.Response:
    content = await json_of(request)
    taste = taste_of(request)
    change = await in_thread(rate, taste, file_of(content), text_of(content, "verdict"))
    tell(taste.name)
    return web.json_response(answer(change))


async def upload(request: web.Request) -> web.Response:
    taste = taste_of(request)
    done = await receive(request, taste)
    tell(taste.name)
    return web.json_response(asdict(done))


async def place(request: web.Request) -> web.Response:
    content = await json_of(request)
    taste = taste_of(request)
    change = await in_thread(taste.place, texts_of(content, "pictures"), text_of(content, "verdict"))
    tell(taste.name)
    return web.json_response(answer(change))


async def undo_or_redo(request: web.Request) -> web.Response:
    await json_of(request)
    taste = taste_of(request)
    change = await in_thread(taste.undo if request.match_info["act"] == "undo" else taste.redo)
    tell(taste.name)
    return web.json_response(answer(change))


async def empty_trash(request: web.Request) -> web.Response:
    await json_of(request)
    taste = taste_of(request)
    return web.json_response({"deleted": await in_thread(taste.empty_trash)})


async def export(request: web.Request) -> web.StreamResponse:
    taste = taste_of(request)
    return await send_zip(request, taste, private=request.query.get("private") == "1")


async def import_file(request: web.Request) -> web.Response:
    taste = taste_of(request)
    done = await receive_zip(request, taste)
    tell(taste.name)
    return web.json_response(asdict(done))


ROUTES = {
    ("GET", "/prefgen/recent"): recent,
    ("GET", "/prefgen/adapters"): list_adapters,
    ("GET", "/prefgen/tastes"): list_tastes,
    ("POST", "/prefgen/tastes"): new_taste,
    ("POST", "/prefgen/tastes/{name}/copy"): copy_taste,
    ("POST", "/prefgen/tastes/{name}/rename"): rename_taste,
    ("DELETE", "/prefgen/tastes/{name}"): forget_taste,
    ("GET", "/prefgen/tastes/{name}"): show_taste,
    ("GET", "/prefgen/tastes/{name}/thumbnail/{sha256}"): thumbnail,
    ("GET", "/prefgen/tastes/{name}/picture/{sha256}"): whole_picture,
    ("POST", "/prefgen/tastes/{name}/rate"): rate_file,
    ("POST", "/prefgen/tastes/{name}/upload"): upload,
    ("POST", "/prefgen/tastes/{name}/place"): place,
    ("POST", "/prefgen/tastes/{name}/{act:undo|redo}"): undo_or_redo,
    ("POST", "/prefgen/tastes/{name}/empty_trash"): empty_trash,
    ("GET", "/prefgen/tastes/{name}/export"): export,
    ("POST", "/prefgen/tastes/{name}/import"): import_file,
}


# --- what they answer ---


def summaries() -> list[dict]:
    """Every taste's name and counts."""
    place = shelf()
    return [{"name": name} | place.taste(name).counts() for name in place.names()]


def newest_outputs() -> list[dict]:
    """The newest RECENT pictures below output, as core names pictures: {"filename", "subfolder", "type"}."""
    root = folder_paths.get_output_directory()
    pictures: list[tuple[float, str, str]] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not is_hidden_name(name)]
        for name in names:
            if os.path.splitext(name)[1].lower() in SHOWN_AS and not is_hidden_name(name):
                with contextlib.suppress(OSError):  # moved away meanwhile
                    pictures.append((os.stat(os.path.join(folder, name)).st_mtime, folder, name))
    newest = heapq.nlargest(RECENT, pictures)
    below = {folder: Path(folder).relative_to(root).as_posix() for _, folder, _ in newest}
    return [
        {"filename": name, "subfolder": "" if below[folder] == "." else below[folder], "type": "output"}
        for _, folder, name in newest
    ]


def description(taste: Taste) -> dict:
    """A taste as the panel shows it, its newest pictures last."""
    pictures = taste.pictures()
    done, undone = taste.acts()
    return {
        "name": taste.name,
        "revision": taste.revision(pictures),
        "can_undo": bool(done),
        "can_redo": bool(undone),
        "pictures": [shown(picture) for picture in pictures],
    }


def shown(picture: Picture) -> dict:
    """A picture as the panel shows it."""
    return {
        "sha256": picture.sha256,
        "file": picture.name,
        "verdict": picture.verdict,
        "time": picture.time,
        "source": picture.source,
        "prompt": picture.origin.prompt,
        # As text: a seed of 64 bits is more than a number in JavaScript holds.
        "seed": None if picture.origin.seed is None else str(picture.origin.seed),
        "model": picture.origin.model,
    }


def answer(change: Change) -> dict:
    """What an act did: {"moved": [{"sha256", "before", "after"}], "refused": [[file, why]]}."""
    moved = [{"sha256": event.sha256, "before": event.before, "after": event.after} for event in change.events]
    return {"moved": moved, "refused": [list(each) for each in change.refused]}


def taste_of(request: web.Request) -> Taste:
    """The taste that a route's path names."""
    return shelf().taste(request.match_info["name"])


def picture_of(taste: Taste, sha256: str) -> Picture:
    """A picture of a taste by its checksum."""
    picture = next((each for each in taste.pictures() if each.sha256 == sha256), None)
    if picture is None:
        raise TasteError(f"That picture isn't in {printable(taste.name)} any more: reload the panel.")
    return picture


def rate(taste: Taste, path: Path, verdict: str) -> Change:
    """Rate a picture that lies in one of ComfyUI's folders."""
    if path.stat().st_size > MAX_BYTES:
        raise TasteError(f"The picture {printable(path.name)} has more than {MAX_BYTES >> 20} MB: shrink it first.")
    return taste.rate(path.read_bytes(), verdict, path.name, "output")


# --- uploads and downloads ---


async def receive(request: web.Request, taste: Taste) -> Imported:
    """Rate the files of a multipart form: a field `verdict`, then the files, in their order."""
    if request.content_type != "multipart/form-data":
        raise TasteError("The pictures aren't sent as a form: use the panel, or multipart/form-data.")
    done = Imported()
    verdict = ""
    async for part in await request.multipart():
        if part.name == "verdict":
            verdict = (await part.read_chunk(64)).decode(errors="replace")
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


async def bounded(part, limit: int) -> bytes | None:
    """A part's bytes, or None where it has more than `limit`; its rest is then read and thrown away."""
    chunks = []
    size = 0
    while chunk := await part.read_chunk(CHUNK):
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
    return b"".join(chunks) if size <= limit else None


async def receive_zip(request: web.Request, taste: Taste) -> Imported:
    """Import the zip that is a multipart form's first file."""
    if request.content_type != "multipart/form-data":
        raise TasteError("The zip isn't sent as a form: use the panel, or multipart/form-data.")
    async for part in await request.multipart():
        if part.filename:
            with tempfile.TemporaryFile(dir=temp_folder()) as file:
                while chunk := await part.read_chunk(CHUNK):
                    file.write(chunk)
                    if file.tell() > MAX_UPLOAD:
                        raise TasteError(f"The zip has more than {MAX_UPLOAD >> 30} GB: import it in parts.")
                file.seek(0)
                return await in_thread(import_zip, taste, file)
    raise TasteError("The form holds no file: choose a zip.")


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
