"""The tastes in ComfyUI's input folder, for nodes and routes alike, and telling the browser of their changes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import folder_paths

from ..mllm.traits import Traits
from ..tastes import looks
from ..tastes.names import TasteError, printable
from ..tastes.shelf import AUTO, NO_TASTE, RESERVED, Shelf
from ..tastes.taste import Taste
from ..tastes.words import keep_understood
from . import folders
from .doors import file_of
from .hashes import sha256_of
from .running import prompt_server

EVENT = "prefgen.taste"


def shelf() -> Shelf:
    """The tastes in ComfyUI's input folder."""
    return Shelf(Path(folder_paths.get_input_directory()) / folders.HISTORY_FOLDER)


def tell(name: str) -> None:
    """Tell every open page that a taste has changed."""
    server = prompt_server()
    if server is not None:
        server.send_sync(EVENT, {"name": name})


def choices() -> list[str]:
    """Combo entries: auto, none, then every taste that isn't called so."""
    return [*RESERVED, *(name for name in shelf().names() if name not in RESERVED)]


def chosen(name: str | None, *sources: str) -> Taste | None:
    """The taste of a combo entry; of NAME@1a2b3c4d the one that goes on. TasteError where there is none.

    sources: the histories that pictures were read from (`histories.names_of`), which auto stands for; None where none
    of them is a taste. TasteError for several whose words differ: the same pictures don't say whose they are.
    """
    if name and name != AUTO:
        return None if name == NO_TASTE else shelf().taste(_base(name))
    there = shelf().names()
    names = list(dict.fromkeys(base for base in map(_base, sources) if base in there))
    tastes = [shelf().taste(each) for each in names]
    if len({taste.words().digest() for taste in tastes}) > 1:
        raise TasteError(
            f"These pictures were read from the tastes {' and '.join(map(printable, names))}, whose words differ: "
            "choose one of them in place of auto."
        )
    return tastes[-1] if tastes else None


def _base(name: str) -> str:
    """A taste's name without a revision."""
    base, _, revision = name.rpartition("@")
    return base if base and folders.REVISION.fullmatch(revision) else name


def in_its_words(traits: Traits, taste: Taste | None) -> Traits:
    """Traits as the artist mended them in the browser: without what was struck out, with what was added."""
    if taste is None:
        return traits
    words = taste.words()
    return Traits(words.applied("liked", traits.liked), words.applied("disliked", traits.disliked), traits.sure)


def understood(traits: Traits, taste: Taste | None) -> None:
    """Keep beside a taste what the MLLM said of it, for the browser to show."""
    if taste is None:
        return
    rows = [
        {"word": word, "side": side, "sure": traits.sure.get(word)}
        for side, words in (("liked", traits.liked), ("disliked", traits.disliked))
        for word in words
    ]
    keep_understood(taste.folder, taste.revision(), rows)
    tell(taste.name)


def looked_at(taste: Taste, pictures: Iterable[dict | None]) -> list[dict | None]:
    """{"sha256", "difference"} of pictures that are named as core names them, None for one that isn't there; difference
    is None where nobody has looked at it, or at the taste (see `looks.differences`)."""
    checksums = [_checksum(each) for each in pictures]
    loaded = looks.load(taste.folder)
    verdicts = {picture.sha256: picture.verdict for picture in taste.pictures()}
    differences = looks.differences(loaded, verdicts, filter(None, checksums))
    return [{"sha256": name, "difference": differences.get(name)} if name else None for name in checksums]


def settled(taste: Taste, verdicts: dict[str, str]) -> dict | None:
    """{"agreement", "pictures"}: how settled a taste is and by how many pictures; None where too few were looked at."""
    loaded = looks.load(taste.folder)
    share = looks.agreement(loaded, verdicts)
    seen = sum(name in loaded for name in verdicts)
    return None if share is None else {"agreement": share, "pictures": seen}


def _checksum(picture: dict | None) -> str | None:
    try:
        return sha256_of(file_of(picture or {}))
    except (TasteError, OSError):
        return None
