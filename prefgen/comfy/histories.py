"""Histories as lists of IMAGE tensors: from an artist's folder, or drawn for a bundled example user."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch
from comfy_execution.utils import get_executing_context

from ..atelier import users
from ..history import PreferenceHistory
from ..lru import LeastRecentlyUsed
from . import folders
from .running import prompt_server

EXAMPLE_PICTURES = 8  # of each side
EXAMPLE_SEED = 1
NAMED = 128  # two of each taste
# Digest of pictures and verdicts -> the names of the tastes that they were read from, the last one last: IMAGE sockets
# carry no names.
_names: LeastRecentlyUsed = LeastRecentlyUsed(NAMED)


class LoadedHistory(NamedTuple):
    """Pictures [1, H, W, 3] in 0..1, each in its own size up to what a history keeps, and a prompt for each or ""."""

    liked: list[torch.Tensor]
    disliked: list[torch.Tensor]
    liked_prompts: list[str]
    disliked_prompts: list[str]


def load(history: Path | folders.Revision | int) -> LoadedHistory:
    """The pictures of a history, oldest first.

    history: a folder (see `PreferenceHistory.from_folder` for what is refused), a revision of one, or the number of an
    example user. Shows ComfyUI's progress bar, stops at its interrupt, and tells on the node which pictures can't be
    read.
    """
    if isinstance(history, int):
        drawn = _draw(history)
        names = {number: folders.EXAMPLE + name for name, number in users.EXAMPLE_USERS.items()}
        name = names.get(history, f"example {history}")
        name_pictures(PreferenceHistory.from_images(drawn.liked, drawn.disliked), name)
        return drawn
    path, revision = history if isinstance(history, folders.Revision) else (history, "")
    bar = comfy.utils.ProgressBar(1)
    read = PreferenceHistory.from_folder(
        path,
        progress=lambda done, total: bar.update_absolute(done, total),
        interrupt=comfy.model_management.throw_exception_if_processing_interrupted,
        revision=revision,
    )
    _tell(read.left_out)
    name_pictures(read, f"{path.name}@{read.revision}" if read.revision else path.name)
    return LoadedHistory(
        [item.image[None] for item in read.liked],
        [item.image[None] for item in read.disliked],
        [item.prompt for item in read.liked],
        [item.prompt for item in read.disliked],
    )


def name_pictures(history: PreferenceHistory, name: str) -> None:
    """Remember what the taste is called that these pictures were read from."""
    for key in (history.pictures_digest, _of_liked(history)):
        _names[key] = (*(other for other in _names_by(key) if other != name), name)


def name_of(history: PreferenceHistory) -> str:
    """The name of the taste that these very pictures were read from last, such as sea@1a2b3c4d; "" for others."""
    names = _names_by(history.pictures_digest)
    return names[-1] if names else ""


def names_of(history: PreferenceHistory) -> tuple[str, ...]:
    """The names of all tastes that these pictures were read from, the last one last; where nobody connected the
    disliked ones, by the liked pictures alone."""
    return _names_by(history.pictures_digest) or _names_by(_of_liked(history))


def _names_by(key: str) -> tuple[str, ...]:
    return _names[key] if key in _names else ()


def _of_liked(history: PreferenceHistory) -> str:
    return f"liked {PreferenceHistory(history.liked).pictures_digest}"


def _tell(message: str) -> None:
    """Show a message on the node that is being executed, as ComfyUI's own API nodes do; "" shows nothing."""
    context = get_executing_context()
    server = prompt_server()
    if message and context is not None and server is not None:
        server.send_progress_text(message, context.node_id)


def _draw(number: int) -> LoadedHistory:
    from ..atelier.renderer import render

    examples = users.history(users.user(number), EXAMPLE_PICTURES, EXAMPLE_PICTURES, EXAMPLE_SEED)
    pictures: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    prompts: dict[bool, list[str]] = {True: [], False: []}
    for example in examples:
        pictures[example.liked].append(torch.from_numpy(render(example.scene)).float()[None] / 255)
        prompts[example.liked].append(example.prompt)
    return LoadedHistory(pictures[True], pictures[False], prompts[True], prompts[False])
