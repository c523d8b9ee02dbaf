"""The routes under /prefgen/ by which the browser rates pictures: docs/routes.md lists them.

Names are looked up in what is there, never joined to a path; what another site sends is refused; files are read and
written in threads. Every change tells all open pages by the websocket event "prefgen.taste".
"""

from __future__ import annotations

import contextlib
import heapq
import os
from dataclasses import asdict
from pathlib import Path

import folder_paths
from aiohttp import web
from comfy.cli_args import args as comfy_args

from ..files import is_hidden_name
from ..tastes.journal import Event
from ..tastes.names import TasteError, printable
from ..tastes.stored import MAX_BYTES
from ..tastes.taste import Change, Picture, Taste
from ..tastes.words import understood
from . import downloads, tastes
from .auto import adapter_kinds
from .doors import NO_SNIFFING, file_of, files_of, guarded, in_thread, json_of, text_of, texts_of
from .tastes import shelf, tell
from .uploads import receive, receive_import, send_zip

RECENT = 200  # pictures of the output folder that the panel shows
# Pictures are shown as what they are or not at all: never as a page.
SHOWN_AS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
}


def register(server) -> None:
    """Add the routes to ComfyUI's PromptServer, unless they are there."""
    if any(getattr(route, "path", "") == "/prefgen/tastes" for route in server.routes):
        return
    for (method, path), handler in (ROUTES | downloads.ROUTES).items():
        server.routes.route(method, path)(guarded(handler))


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


async def say(request: web.Request) -> web.Response:
    content = await json_of(request)
    taste = taste_of(request)
    await in_thread(taste.say, *(text_of(content, key) for key in ("word", "side", "state")))
    tell(taste.name)
    return web.json_response({"words": taste.words().shown()})


async def looked_at(request: web.Request) -> web.Response:
    content = await json_of(request)
    return web.json_response({"pictures": await in_thread(tastes.looked_at, taste_of(request), files_of(content))})


async def empty_trash(request: web.Request) -> web.Response:
    await json_of(request)
    taste = taste_of(request)
    return web.json_response({"deleted": await in_thread(taste.empty_trash)})


async def export(request: web.Request) -> web.StreamResponse:
    taste = taste_of(request)
    return await send_zip(request, taste, private=request.query.get("private") == "1")


async def import_file(request: web.Request) -> web.Response:
    taste = taste_of(request)
    done = await receive_import(request, taste)
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
    ("POST", "/prefgen/tastes/{name}/words"): say,
    ("POST", "/prefgen/tastes/{name}/looked_at"): looked_at,
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
    words = taste.words()
    return {
        "name": taste.name,
        "revision": taste.revision(pictures),
        "can_undo": bool(done),
        "can_redo": bool(undone),
        "settled": tastes.settled(taste, {picture.sha256: picture.verdict for picture in pictures}),
        "words": words.shown() | {"understood": understood(taste.folder), "revision": words.digest()},
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
    moved = [
        {"sha256": event.sha256, "before": event.before, "after": event.after}
        for event in change.events
        if isinstance(event, Event)
    ]
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
