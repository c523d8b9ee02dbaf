"""The one schema of every preference data set, simulated or real, and the splits.

A set is a folder:

    pictures/pictures-00000.parquet   PICTURES, one row a user's picture
    users.parquet                     USERS, one row a user
    pairs.parquet                     PAIRS, the held-out choices that evaluation asks about
    index.parquet                     INDEX, where each picture lies; everything but the image
    report.json                       what was counted while the set was made
    manifest.json                     configuration, versions, rows, bytes and SHA-256 of every file
    card.md, card/*.png               the data card
"""

from __future__ import annotations

import hashlib
import unicodedata

import pyarrow as pa

FORMAT_VERSION = 1
LIKED, DISLIKED = "liked", "disliked"
TRAIN, TEST, MIXED = "train", "test", "mixed"
TEST_SHARE = 26 / 256  # of users and of prompts, about one in ten: a hash's first byte decides

_FIELDS = {
    "picture": pa.string(),  # unique for its user; the same picture seen by two users has one name
    "user": pa.int64(),
    "item": pa.int32(),  # place in the user's history, from 0
    "verdict": pa.string(),  # LIKED or DISLIKED
    "prompt": pa.string(),  # what was asked for, without the user's taste
    "attributes": pa.list_(pa.string()),  # "family/name", what the picture was made to show; empty when unknown
    "split": pa.string(),  # TRAIN: user and prompt for training; TEST: neither; MIXED: one of them
    "heldout": pa.bool_(),  # belongs to a pair of PAIRS, so not to the history
    "seed": pa.int64(),  # of the renderer; null for real pictures
}
PICTURES = pa.schema([("image", pa.binary()), *_FIELDS.items()])  # image: a file of prefgen.pictures.PUBLISHED, or null
INDEX = pa.schema([*_FIELDS.items(), ("shard", pa.int32()), ("row", pa.int32())])
OPINION = pa.struct([("attribute", pa.string()), ("weight", pa.float32())])  # "family/name", 0..1
USERS = pa.schema(
    [
        ("user", pa.int64()),
        ("split", pa.string()),  # TRAIN or TEST
        ("liked", pa.int32()),  # pictures of the history, without the held-out ones
        ("disliked", pa.int32()),
        ("pairs", pa.int32()),
        ("tastes", pa.list_(pa.list_(OPINION))),  # one or two; empty for real users
        ("dislikes", pa.list_(OPINION)),
    ]
)
PAIRS = pa.schema(
    [
        ("user", pa.int64()),
        ("pair", pa.int32()),
        ("prompt", pa.string()),
        ("liked", pa.string()),  # picture
        ("disliked", pa.string()),
        ("split", pa.string()),
    ]
)


def _is_test(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < TEST_SHARE * 256


def user_split(user: int) -> str:
    """TRAIN or TEST (one in ten), by a hash of the id: the same split as the atelier's users."""
    return TEST if _is_test(f"user {user}") else TRAIN


def normal_prompt(prompt: str) -> str:
    """A prompt as the split sees it: case, width and spacing make no new prompt."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_split(prompt: str) -> str:
    """TRAIN or TEST (one in ten), by a hash of the normalised prompt."""
    return TEST if _is_test(f"prompt {normal_prompt(prompt)}") else TRAIN


def split(user: str, prompt: str) -> str:
    """The split of a picture, from its user's and its prompt's."""
    return user if user == prompt else MIXED
