"""The store when everything happens at once, and when the disk is full at any of its calls."""

import collections
import errno
import os
import random
import struct
import tempfile
import zlib
from pathlib import Path

import pytest

from prefgen.tastes import journal
from prefgen.tastes.names import TasteError
from prefgen.tastes.taste import TRASH, Taste
from tests.prefgen.tastes.test_taste import FORK, picture, sha256, state

NUMBERS = range(8)


@pytest.fixture
def taste(tmp_path) -> Taste:
    (tmp_path / "sea").mkdir()
    return Taste(tmp_path / "sea")


def act(taste: Taste, generator: random.Random) -> None:
    """One random act of any kind; what can't be done is refused in a sentence."""
    number = generator.choice(NUMBERS)
    side = generator.choice(["liked", "disliked"])
    acts = {
        "rate": lambda: taste.rate(picture(number), side, f"{number % 3}.png"),
        "place": lambda: taste.place([sha256(picture(number))], generator.choice([side, ""])),
        "say": lambda: taste.say(f"word {number}", side, generator.choice(["added", "struck", ""])),
        "undo": taste.undo,
        "redo": taste.redo,
        "look": lambda: (taste.pictures(), taste.keep_revision()),
    }
    try:
        acts[generator.choice([*acts, "rate", "place"])]()
    except TasteError as error:
        assert str(error).endswith(".")


def many_acts(folder: Path, seed: int, count: int) -> None:
    generator = random.Random(seed)
    taste = Taste(folder)
    for _ in range(count):
        act(taste, generator)


def check_whole(taste: Taste) -> None:
    """Every picture that was ever rated lies in exactly one place, and the journal says in which."""
    last = {event.sha256: event.after for event in journal.read(taste.folder)}
    files = collections.Counter()
    for folder in ("liked", "disliked", TRASH):
        if (taste.folder / folder).is_dir():
            files.update(sha256(path.read_bytes()) for path in (taste.folder / folder).glob("*.png"))
    assert set(files.values()) <= {1} and set(files) == set(last)
    assert dict(state(taste)) == {checksum: verdict for checksum, verdict in last.items() if verdict}


def test_random_acts_of_several_processes_lose_nothing_and_double_nothing(taste):
    processes = [FORK.Process(target=many_acts, args=(taste.folder, seed, 40)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    check_whole(taste)
    # What they did goes back act by act, whoever did it, to the empty taste.
    while taste.acts()[0]:
        taste.undo()
    assert not state(taste) and taste.words().digest() == ""
    check_whole(taste)


CALLS = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "chmod"), (tempfile, "NamedTemporaryFile")]


class FullDisk:
    """The nth call of those that write fails, once."""

    def __init__(self, monkeypatch, number: int):
        self.left = number
        for module, name in CALLS:
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, function):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        return call


ACTS = {
    "new": lambda taste: taste.rate(picture(7), "disliked", "new.png"),
    "flip": lambda taste: taste.rate(picture(0), "disliked"),
    "several": lambda taste: taste.place([sha256(picture(n)) for n in (0, 1)], "disliked"),
    "remove": lambda taste: taste.place([sha256(picture(1))], ""),
    "word": lambda taste: taste.say("fog", "liked", "added"),
    "undo": lambda taste: taste.undo(),
}


@pytest.mark.parametrize("kind", list(ACTS))
def test_a_disk_that_is_full_at_any_call_loses_nothing(tmp_path, monkeypatch, kind):
    refused = 0
    for number in range(1, 40):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        taste = Taste(folder)
        for n in (0, 1):
            taste.rate(picture(n), "liked", f"{n}.png")
        before = dict(state(taste))
        events = len(journal.read_all(folder))
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, number)
            try:
                ACTS[kind](taste)
            except TasteError as error:
                refused += 1
                assert "the disk is full" in str(error) or "can't be moved: no space left" in str(error)
                assert dict(state(taste)) == before and len(journal.read_all(folder)) == events
        check_whole(taste)
        assert not [path for path in folder.rglob("*.tmp")]
        if disk.left > 0:  # the act has fewer calls than that
            break
    assert refused and number < 39


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_picture_that_says_it_is_enormous_is_refused_before_it_unfolds(taste, one_sentence):
    with pytest.raises(TasteError) as raised:
        taste.rate(bomb(60_000), "liked", "bomb.png")
    assert "bomb.png" in one_sentence(raised) and not taste.pictures()
