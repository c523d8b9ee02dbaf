"""What a request has to be before a route looks at it: from this site, of a known kind, bounded, below our folders."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import folder_paths
from aiohttp import web

from ..errors import MendableError
from ..files import disk_full
from ..tastes.names import DEVICES, TasteError, printable

SAFE_METHODS = ("GET", "HEAD")
MAX_JSON = 4 << 20  # bytes: names and checksums of some thousand pictures
MOST_FILES = 1000  # in one request
PLACES = ("input", "output", "temp")

# Pictures are shown as what they are or not at all: never as a page.
NO_SNIFFING = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guarded(handler: Handler) -> Handler:
    """A route behind the door: what another site sends is refused, and every fault becomes one sentence in JSON."""

    @functools.wraps(handler)
    async def route(request: web.Request) -> web.StreamResponse:
        if request.method not in SAFE_METHODS and not same_site(request):
            return refused("Another site sent this request: use ComfyUI's own page.", 403)
        try:
            return await handler(request)
        except MendableError as error:
            return refused(str(error), 400)
        except web.HTTPException:
            raise
        except Exception as error:
            if reason := disk_full(error):
                return refused(f"ComfyUI can't write what was sent ({reason}): make room there and try again.", 507)
            logging.exception("PrefGen's route %s failed.", request.path)
            return refused("PrefGen failed inside: the log of ComfyUI says where. Please report it.", 500)

    return route


def same_site(request: web.Request) -> bool:
    """Whether a request that changes something comes from a page of this server, or from no browser at all.

    Core looks at Origin only where it runs on a loopback address and never with --enable-cors-header; a taste is an
    artist's own, so here it always counts.
    """
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    return urlsplit(origin).netloc.lower() == request.headers.get("Host", "").lower() != ""


def refused(sentence: str, status: int) -> web.Response:
    """A sentence for the person, as JSON."""
    return web.json_response({"error": sentence}, status=status)


async def json_of(request: web.Request) -> dict:
    """The object that a request holds. A page of another site can't send this content type without asking first."""
    if request.content_type != "application/json":
        raise TasteError("The request isn't JSON: send it as application/json.")
    text = bytearray()
    # `read(n)` of a stream gives what has arrived so far, which of a large request is only its beginning.
    async for chunk in request.content.iter_any():
        text += chunk
        if max(len(text), request.content_length or 0) > MAX_JSON:
            raise TasteError(f"The request has more than {MAX_JSON >> 20} MB: send it in parts.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TasteError("The request isn't JSON that can be read: reload the page and try again.") from error
    if not isinstance(content, dict):
        raise TasteError("The request isn't a JSON object: reload the page and try again.")
    return content


def text_of(content: dict, key: str, default: str | None = None) -> str:
    """A text in a request."""
    value = content.get(key, default)
    if not isinstance(value, str):
        raise TasteError(f"The request lacks the text {key}: reload the page and try again.")
    return value


def texts_of(content: dict, key: str) -> list[str]:
    """A list of texts in a request."""
    value = content.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise TasteError(f"The request lacks the list {key}: reload the page and try again.")
    return value


def files_of(content: dict) -> list[dict]:
    """The list `pictures` of a request, each as core names pictures; `file_of` gives the file of one."""
    value = content.get("pictures")
    if not isinstance(value, list) or len(value) > MOST_FILES or not all(isinstance(each, dict) for each in value):
        raise TasteError(f"The request lacks a list of at most {MOST_FILES} pictures: reload the page and try again.")
    return value


def file_of(content: dict) -> Path:
    """The file that {"filename", "subfolder", "type"} names, as core's own messages name pictures.

    Only what lies below input, output or temp, once all links are followed; TasteError for everything else.
    """
    name = text_of(content, "filename")
    subfolder = text_of(content, "subfolder", "")
    place = text_of(content, "type", "output")
    directory = folder_paths.get_directory_by_type(place) if place in PLACES else None
    parts = [part for part in Path(subfolder.replace("\\", "/")).parts] + [name]
    harmless = name and not any(_reaches_out(part) for part in parts)
    if not directory or not harmless or Path(subfolder).is_absolute():
        raise TasteError(f"{printable(name)} lies in none of ComfyUI's folders input, output and temp.")
    root = os.path.realpath(directory)
    path = os.path.realpath(os.path.join(root, *parts))
    if os.path.commonpath((root, path)) != root or not os.path.isfile(path):
        raise TasteError(f"The picture {printable(name)} isn't there any more: it was moved or deleted.")
    return Path(path)


def _reaches_out(part: str) -> bool:
    """Whether one part of a path is more than a name: a way up, a drive, a stream, a device, a control sign."""
    odd = part in ("", ".", "..") or any(letter in part for letter in "/\\:\0") or not part.isprintable()
    return odd or part.split(".")[0].strip().casefold() in DEVICES


async def in_thread(function: Callable, *args):
    """Run what reads or writes files without holding up the server."""
    return await asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args))
