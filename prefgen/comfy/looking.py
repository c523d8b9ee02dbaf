"""Looking at pictures with CLIP vision for the Rate view: embeddings of a taste's pictures and of what was painted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import comfy.utils
import torch

from ..files import reason_of
from ..image_encoder import encoder_in_words
from ..pictures import PictureError, read_picture
from ..tastes import looks
from ..tastes.names import TasteError, printable
from ..tastes.taste import Taste
from .doors import file_of
from .encoding import check_read, embedding_in, encoder_of, gives_embeddings, interrupt, read_fixed_picture
from .hashes import sha256_of

NEWEST = 200  # of each verdict
MOST_PICTURES = 400  # in one request
LONG_SIDE = 512  # pixels that are read of a picture: CLIP sees 224 to 448


def look(clip_vision, taste: Taste, pictures: str) -> int:
    """Write the embeddings that a taste lacks: of its newest pictures and of those that a JSON list names as core's
    messages do. Returns how many were read. Shows progress and stops at the interrupt; what was read by then stays.

    Raises ValueError with one sentence for an encoder without embeddings, and where they can't be written.
    """
    encoder = name_of_encoder(clip_vision)
    verdicts = {picture.sha256: picture for picture in newest(taste)}
    there = looks.known_to(taste.folder, encoder)
    waiting = {name: picture.path for name, picture in verdicts.items()} | dict(_named(pictures))
    waiting = {name: path for name, path in waiting.items() if name not in there}
    bar = comfy.utils.ProgressBar(max(1, len(waiting)))
    fresh = {}
    try:
        for name, path in waiting.items():
            interrupt()
            try:
                fresh[name] = _embedding(clip_vision, path)
            except PictureError:  # the taste's own list says which
                continue
            finally:
                bar.update(1)
    finally:
        if fresh or not there:
            _write(taste, encoder, fresh, verdicts)
    return len(fresh)


def name_of_encoder(clip_vision) -> str:
    """What an encoder's embeddings are filed under: two that see otherwise never share a file, where one's numbers
    would be compared with the other's. ValueError with one sentence for an encoder that gives no embedding."""
    about = encoder_of(clip_vision)
    if not gives_embeddings(clip_vision, about):
        raise ValueError(
            f"The connected image encoder is {encoder_in_words(about)}, which gives no embedding that pictures can be "
            "compared by: choose a CLIP in Load CLIP Vision."
        )
    if "digest" in about:
        return about["digest"]
    # Weights that were rounded coarsely, SigLIP and other packs' encoders are known by what they see.
    seen = json.dumps(read_fixed_picture(clip_vision))
    return "seen-" + hashlib.sha256(seen.encode()).hexdigest()


def _write(taste: Taste, encoder: str, fresh: dict, verdicts: dict) -> None:
    try:
        looks.keep(taste.folder, encoder, fresh, verdicts)
    except OSError as error:
        reason = reason_of(error)
        raise ValueError(
            f"What was seen of {printable(taste.name)} could not be written: {reason}. Make room there or let ComfyUI "
            "write."
        ) from error


def newest(taste: Taste) -> Iterator:
    """The newest pictures of each verdict, NEWEST at most."""
    pictures = taste.pictures()
    for verdict in ("liked", "disliked"):
        yield from [picture for picture in pictures if picture.verdict == verdict][-NEWEST:]


def _named(pictures: str) -> Iterator[tuple[str, Path]]:
    """(checksum, file) of what a JSON list names. ValueError for what is no such list."""
    try:
        entries = json.loads(pictures or "[]")
    except ValueError as error:
        raise ValueError("The list of pictures isn't JSON: leave it empty, or let the Rate view write it.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("The list of pictures isn't a JSON list of files: leave it empty.")
    for entry in entries[:MOST_PICTURES]:
        try:
            path = file_of(entry)
            checksum = sha256_of(path)
        except (TasteError, OSError):  # deleted since it was queued, or not to be read
            continue
        yield checksum, path


def _embedding(clip_vision, path: Path):
    """The CLIP embedding [I] of a picture's file, as numpy."""
    pixels = torch.from_numpy(read_picture(path, LONG_SIDE)).float()[None] / 255
    embedding = embedding_in(clip_vision, clip_vision.encode_image(pixels))
    check_read((embedding, None))
    return embedding.numpy()
