"""A taste as files: what is there counts once, every act can be undone, nothing is lost whoever writes or dies."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prefgen.files import write_atomic
from prefgen.history_folder import MOVING, HistoryFolder
from prefgen.tastes import journal, revisions, stored, words
from prefgen.tastes import taste as module
from prefgen.tastes.journal import Event
from prefgen.tastes.names import TasteError
from prefgen.tastes.origin import Origin
from prefgen.tastes.taste import Taste


def picture(number: int, form: str = "PNG", **options) -> bytes:
    """A small picture's file; another number, another picture."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def state(taste: Taste) -> list[tuple[str, str]]:
    """[(checksum, verdict)], oldest verdict first."""
    return [(p.sha256, p.verdict) for p in taste.pictures()]


@pytest.fixture
def taste(tmp_path) -> Taste:
    (tmp_path / "sea").mkdir()
    return Taste(tmp_path / "sea")


def test_a_rated_picture_lies_in_the_folder_of_its_verdict_and_in_the_journal(taste):
    change = taste.rate(picture(1), "liked", "my boat.png", "drop", Origin("a boat", 7, "sdxl"))
    [event] = change.events
    assert (event.before, event.after, event.prompt, event.seed, event.model) == ("", "liked", "a boat", 7, "sdxl")
    assert (taste.folder / "liked" / "my boat.png").read_bytes() == picture(1)
    [shown] = taste.pictures()
    assert shown.sha256 == sha256(picture(1)) and shown.verdict == "liked" and shown.origin.seed == 7
    assert taste.prompt_of(shown) == "a boat" and taste.counts() == {"liked": 1, "disliked": 0}
    assert not taste.rate(picture(1), "liked").events, "the same again changes nothing"
    assert len(journal.read(taste.folder)) == 1


def test_the_other_verdict_moves_the_file_with_its_prompt(taste):
    taste.rate(picture(1), "liked", "boat.png")
    (taste.folder / "liked" / "boat.txt").write_text("a red boat")
    taste.rate(picture(1), "disliked")
    assert sorted(os.listdir(taste.folder / "disliked")) == ["boat.png", "boat.txt"]
    assert not os.listdir(taste.folder / "liked") and taste.prompt_of(taste.pictures()[0]) == "a red boat"


def prompts(taste):
    return {shown.sha256: taste.prompt_of(shown) for shown in taste.pictures()}


@pytest.mark.parametrize("own", ["a red boat", ""])
def test_a_move_takes_no_other_picture_s_prompt_and_gives_none_away(taste, own):
    taste.rate(picture(1), "liked", "boat.png")
    taste.rate(picture(2, "JPEG"), "disliked", "boat.jpg")
    (taste.folder / "disliked" / "boat.txt").write_text("a blue boat")
    if own:
        (taste.folder / "liked" / "boat.txt").write_text(own)
    taste.rate(picture(1), "disliked")
    taste.rate(picture(3, "WEBP"), "disliked", "boat.webp")
    expected = {sha256(picture(1)): own, sha256(picture(2, "JPEG")): "a blue boat", sha256(picture(3, "WEBP")): ""}
    assert prompts(taste) == expected
    taste.undo()
    taste.undo()
    assert prompts(taste) == {key: prompt for key, prompt in expected.items() if key != sha256(picture(3, "WEBP"))}


def test_a_text_file_of_two_pictures_stays_for_the_other(taste):
    taste.rate(picture(1), "liked", "boat.png")
    taste.rate(picture(2, "JPEG"), "liked", "boat.jpg")
    (taste.folder / "liked" / "boat.txt").write_text("a boat")
    taste.place([sha256(picture(1))], "disliked")
    assert set(prompts(taste).values()) == {"a boat"} and len(taste.pictures()) == 2


def test_loose_pictures_move_in_with_their_prompts(taste):
    for name, form, number in (("boat.png", "PNG", 1), ("boat.jpg", "JPEG", 2), ("house.png", "PNG", 3)):
        (taste.folder / name).write_bytes(picture(number, form))
    (taste.folder / "boat.txt").write_text("a boat")
    (taste.folder / "house.TXT").write_text("a house")
    before = prompts(taste)
    assert sorted(before.values()) == ["a boat", "a boat", "a house"]
    taste.rate(picture(4), "liked", "sea.png")
    assert prompts(taste) == before | {sha256(picture(4)): ""}


def stop_rename_of(monkeypatch, name, error):
    rename = os.rename

    def stopped(source, target):
        if Path(source).name == name:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", stopped)


def test_loose_pictures_move_in_together_or_not_at_all(taste, monkeypatch):
    for number in range(3):
        (taste.folder / f"{number}.png").write_bytes(picture(number))
    before = state(taste)
    stop_rename_of(monkeypatch, "2.png", PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(TasteError, match="Nothing was changed in sea: permission denied"):
        taste.rate(picture(7), "liked")
    assert state(taste) == before and len(before) == 3 and not (taste.folder / MOVING).exists()
    monkeypatch.undo()
    assert taste.rate(picture(7), "liked").events and len(state(taste)) == 4


def test_killed_while_loose_pictures_move_in_all_go_on_counting(taste, monkeypatch):
    for number in range(3):
        (taste.folder / f"{number}.png").write_bytes(picture(number))
    before = state(taste)
    stop_rename_of(monkeypatch, "1.png", SystemExit())
    with pytest.raises(SystemExit):
        taste.rate(picture(7), "liked")
    monkeypatch.undo()
    taste = Taste(taste.folder)
    assert len(os.listdir(taste.folder / "liked")) == 1 and state(taste) == before and taste.counts()["liked"] == 3
    assert len(HistoryFolder(taste.folder).files["liked"]) == 3
    assert taste.rate(picture(7), "liked").events and len(state(taste)) == 4
    assert sorted(os.listdir(taste.folder / "liked")) == ["0.png", "1.png", "2.png", "picture.png"]
    # What is put there later is loose again, and no longer liked.
    (taste.folder / "later.png").write_bytes(picture(9))
    assert len(state(taste)) == 4 and len(HistoryFolder(taste.folder).files["liked"]) == 4


def test_where_a_verdict_cannot_be_written_down_the_text_file_goes_back_too(taste, monkeypatch):
    taste.rate(picture(1), "liked", "boat.png")
    (taste.folder / "liked" / "boat.txt").write_text("a boat")
    before = state(taste), prompts(taste)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "append", full)
    with pytest.raises(TasteError, match="Nothing was changed"):
        taste.rate(picture(1), "disliked")
    assert (state(taste), prompts(taste)) == before


@pytest.mark.parametrize("call", ["copy2", "rename"])
@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), SystemExit()])
def test_a_move_that_fails_or_is_killed_takes_no_picture_s_prompt(taste, monkeypatch, call, error):
    taste.rate(picture(1), "liked", "boat.png")
    (taste.folder / "liked" / "boat.txt").write_text("a boat")
    before = state(taste), prompts(taste)

    def stopped(*_):
        raise error

    monkeypatch.setattr(shutil if call == "copy2" else os, call, stopped)
    with pytest.raises(SystemExit if isinstance(error, SystemExit) else TasteError):
        taste.place([sha256(picture(1))], "disliked")
    monkeypatch.undo()
    assert (state(taste), prompts(taste)) == before
    taste.place([sha256(picture(1))], "disliked")
    assert prompts(taste) == before[1] and not os.listdir(taste.folder / "liked")


def test_killed_before_the_old_text_file_is_deleted_a_namesake_does_not_get_it(taste, monkeypatch):
    taste.rate(picture(1), "liked", "boat.png")
    (taste.folder / "liked" / "boat.txt").write_text("a boat")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    taste.place([sha256(picture(1))], "disliked")
    monkeypatch.undo()
    taste.rate(picture(2), "liked", "boat.png")
    assert prompts(taste) == {sha256(picture(1)): "a boat", sha256(picture(2)): ""}


def test_several_pictures_are_one_act(taste):
    numbers = [sha256(picture(n)) for n in range(4)]
    for n in range(4):
        taste.rate(picture(n), "liked", f"{n}.png")
    before = taste.revision()
    taste.place(numbers[:3], "disliked")
    assert [verdict for _, verdict in state(taste)] == ["liked", "disliked", "disliked", "disliked"]
    taste.undo()
    assert taste.revision() == before
    taste.redo()
    assert taste.counts() == {"liked": 1, "disliked": 3}
    twice = taste.place([numbers[3]] * 2, "disliked")
    assert len(twice.events) == 1 and not twice.refused


def test_undo_and_redo_go_back_and_forth_to_the_same_revisions(taste):
    revisions = [taste.revision()]
    for n in range(3):
        taste.rate(picture(n), "liked", f"{n}.png")
        revisions.append(taste.revision())
    taste.place([sha256(picture(0))], "")
    revisions.append(taste.revision())
    for expected in reversed(revisions[:-1]):
        taste.undo()
        assert taste.revision() == expected
    with pytest.raises(TasteError, match="nothing to undo in sea"):
        taste.undo()
    for expected in revisions[1:]:
        taste.redo()
        assert taste.revision() == expected
    with pytest.raises(TasteError, match="nothing to do again"):
        taste.redo()
    taste.undo()
    taste.rate(picture(9), "liked")
    with pytest.raises(TasteError, match="nothing to do again"):
        taste.redo()


def test_what_was_removed_waits_in_the_trash_and_comes_back_when_it_is_rated_again(taste):
    taste.rate(picture(1), "liked", "boat.png")
    taste.place([sha256(picture(1))], "")
    assert os.listdir(taste.folder / ".trash") == ["boat.png"] and not taste.pictures()
    taste.rate(picture(1), "disliked", "another name.png")
    assert [p.path.name for p in taste.pictures()] == ["boat.png"] and not os.listdir(taste.folder / ".trash")
    taste.place([sha256(picture(1))], "")
    assert taste.empty_trash() == 1
    with pytest.raises(TasteError, match="in no folder of the taste"):
        taste.undo()


def test_files_that_somebody_put_there_count_by_their_time_and_once(taste):
    files = [("liked", "b.png", 1, 200), ("liked", "a.png", 2, 300), ("disliked", "c.png", 3, 100)]
    for verdict, name, number, when in [*files, ("liked", "copy.png", 1, 50)]:
        path = taste.folder / verdict / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))
        os.utime(path, (when, when))
    assert [p.path.name for p in taste.pictures()] == ["c.png", "b.png", "a.png"]
    write_atomic(taste.folder / "disliked" / "again.png", picture(2))
    assert ("disliked", sha256(picture(2))) in [(p.verdict, p.sha256) for p in taste.pictures()]
    assert len(taste.pictures()) == 3, "liked and disliked: the newer verdict counts"


def test_loose_pictures_go_on_counting_when_the_first_one_is_liked(taste):
    (taste.folder / "old.png").write_bytes(picture(1))
    assert taste.counts()["liked"] == 1
    taste.rate(picture(2), "liked", "new.png")
    assert sorted(os.listdir(taste.folder / "liked")) == ["new.png", "old.png"] and len(taste.pictures()) == 2


def test_a_listing_opens_no_file_that_it_has_seen_before(taste, monkeypatch):
    for n in range(5):
        taste.rate(picture(n), "liked", f"{n}.png")
    taste.pictures()
    (taste.folder / "liked" / "by hand.png").write_bytes(picture(9))
    opened = []
    monkeypatch.setattr(
        "prefgen.tastes.index.file_sha256", lambda path: opened.append(os.path.basename(path)) or "0" * 64
    )
    unread = taste.pictures(read_new=False)
    assert not opened and [p.sha256 for p in unread].count("") == 1
    taste.pictures()
    taste.pictures()
    assert opened == ["by hand.png"]


def test_names_that_a_system_would_trip_over_are_changed_and_never_collide(taste):
    names = [
        "con.png",
        "a/../../b.png",
        "trailing. .png",
        "x" * 300 + ".png",
        "",
        "ü.png",
        "u\u0308.png",
        "A.PNG",
        "a.png",
    ]
    for n, name in enumerate(names):
        taste.rate(picture(n), "liked", name)
    written = os.listdir(taste.folder / "liked")
    assert len(written) == len(names) == len({name.casefold() for name in written})
    assert all(len(name) < 120 and "/" not in name and not name.startswith(".") for name in written)
    assert "_con.png" in written and "b.png" in written


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken", picture(1)[:60]])
def test_what_is_no_picture_is_refused_and_leaves_nothing(taste, data, one_sentence):
    with pytest.raises(TasteError) as raised:
        taste.rate(data, "liked", "file.png")
    assert "file.png" in one_sentence(raised) and not taste.pictures() and not journal.read(taste.folder)


def test_a_picture_is_named_by_what_it_is(taste):
    taste.rate(picture(1, "JPEG"), "liked", "photo.png")
    taste.rate(picture(2, "WEBP"), "liked", "photo.jpg")
    assert sorted(os.listdir(taste.folder / "liked")) == ["photo.jpg", "photo.webp"]


def test_a_revision_is_what_the_mllm_reads_in_its_order(taste):
    taste.rate(picture(1), "liked", origin=Origin("a boat"))
    taste.rate(picture(2), "disliked")
    lines = f"{sha256(picture(1))} liked a boat\n{sha256(picture(2))} disliked \n"
    assert taste.revision() == sha256(lines.encode())[:8]
    (taste.folder / "liked" / "picture.txt").write_text("another prompt")
    assert taste.revision() != sha256(lines.encode())[:8]


def test_a_frozen_revision_is_the_same_pictures_after_a_hundred_edits(taste):
    for n in range(6):
        taste.rate(picture(n), "liked" if n % 2 else "disliked", f"{n}.png", origin=Origin(f"prompt {n}"))
    revision, rows = taste.keep_revision(), state(taste)
    generator = random.Random(0)
    for edit in range(100):
        if generator.random() < 0.5:
            taste.rate(picture(100 + edit), generator.choice(["liked", "disliked"]), f"{edit}.png")
        else:
            taste.place([generator.choice(taste.pictures()).sha256], generator.choice(["liked", "disliked", ""]))
    frozen = taste.frozen(revision)
    assert [(p.sha256, p.verdict) for p in frozen] == rows and taste.revision() != revision
    assert [sha256(p.path.read_bytes()) for p in frozen] == [row[0] for row in rows]
    assert {p.origin.prompt for p in frozen} == {f"prompt {n}" for n in range(6)}


def test_a_revision_that_nobody_wrote_down_is_found_in_the_journal(taste):
    taste.rate(picture(1), "liked")
    revision = taste.revision()
    taste.rate(picture(2), "liked")
    assert [p.sha256 for p in taste.frozen(revision)] == [sha256(picture(1))]
    with pytest.raises(TasteError, match="sea has no revision 00000000"):
        taste.frozen("00000000")
    with pytest.raises(TasteError, match="has no revision"):
        taste.frozen("../../../etc/passwd")


def test_a_frozen_revision_names_the_pictures_that_it_lacks(taste, one_sentence):
    taste.rate(picture(1), "liked", "boat.png")
    revision = taste.keep_revision()
    taste.place([sha256(picture(1))], "")
    taste.empty_trash()
    with pytest.raises(TasteError) as raised:
        taste.frozen(revision)
    assert "boat.png left the taste and its trash" in one_sentence(raised)


def test_half_a_line_is_passed_over_and_ended_by_the_next_writer(taste):
    taste.rate(picture(1), "liked")
    with open(taste.folder / "taste.jsonl", "ab") as file:
        file.write(b'{"version": 1, "sha256": "dead')
    assert len(journal.read(taste.folder)) == 1
    taste.rate(picture(2), "liked")
    assert [event.sha256 for event in journal.read(taste.folder)] == [sha256(picture(1)), sha256(picture(2))]


@pytest.mark.parametrize("line", [b"[]", b"1", b"{}", b"\xff\xfe", b'{"version": 2, "sha256": "a"}', b"null", b'"' * 9])
def test_lines_of_others_are_passed_over(taste, line):
    (taste.folder / "taste.jsonl").write_bytes(line + b"\n")
    assert journal.read(taste.folder) == [] and not taste.pictures()
    odd = json.dumps({"version": 1, "sha256": "a", "file": "b", "before": "", "after": "adored"})
    assert journal.parsed(odd.encode()) is None


def test_an_event_comes_back_as_it_was_written(taste):
    event = Event("ab", "ü.png", "", "liked", "drop", 'two "lines"\n of a prompt', 2**63, "m", "g")
    journal.append(taste.folder, event)
    assert journal.read(taste.folder) == [event]


@pytest.mark.parametrize("where", ["write_atomic", "journal"])
def test_a_full_disk_changes_nothing_and_says_so(taste, monkeypatch, where, one_sentence):
    taste.rate(picture(1), "liked", "1.png")
    before = state(taste), (taste.folder / "taste.jsonl").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((module, "write_atomic", full) if where == "write_atomic" else (journal.os, "fsync", full)))
    acts = [lambda: taste.rate(picture(2), "liked")]
    if where == "journal":
        acts += [lambda: taste.rate(picture(1), "disliked"), lambda: taste.place([sha256(picture(1))], ""), taste.undo]
    for act in acts:
        with pytest.raises(TasteError) as raised:
            act()
        assert "the disk is full" in one_sentence(raised)
        assert (state(taste), (taste.folder / "taste.jsonl").read_bytes()) == before


def test_a_picture_that_cannot_be_moved_is_named_and_stays(taste, monkeypatch):
    taste.rate(picture(1), "liked", "1.png")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "rename", refuse)
    with pytest.raises(TasteError, match="1.png can't be moved: permission denied"):
        taste.place([sha256(picture(1))], "disliked")
    assert taste.counts() == {"liked": 1, "disliked": 0}


def test_thumbnails_are_small_and_made_once(taste):
    big = np.zeros((900, 1800, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(big).save(out, "PNG")
    taste.rate(out.getvalue(), "liked", "big.png")
    [shown] = taste.pictures()
    data = taste.thumbnail(shown)
    assert Image.open(io.BytesIO(data)).size == (256, 128)
    shown.path.unlink()
    assert taste.thumbnail(shown) == data


def test_a_thumbnail_that_cannot_be_kept_is_shown_and_told(taste, monkeypatch, caplog):
    taste.rate(picture(1), "liked", "1.png")

    def refuse(path, data):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "write_atomic", refuse)
    caplog.set_level("INFO")
    [shown] = taste.pictures()
    assert Image.open(io.BytesIO(taste.thumbnail(shown))).format == "WEBP"
    assert caplog.messages == ["PrefGen keeps no thumbnail of 1.png: Read-only file system."]
    assert taste.stored_thumbnail(shown.sha256) is None


class Acts(RuleBasedStateMachine):
    """Random acts beside a plain list of states: what undo and redo must come back to."""

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.taste = Taste(self.folder.name)
        self.states = [{}]
        self.place = 0
        self.seen: set[int] = set()

    def did(self, expected: dict[str, str]):
        if expected != self.states[self.place]:
            self.states = [*self.states[: self.place + 1], expected]
            self.place += 1

    @rule(number=st.integers(0, 5), verdict=st.sampled_from(["liked", "disliked"]))
    def rate(self, number, verdict):
        self.taste.rate(picture(number), verdict, f"{number % 2}.png")
        self.seen.add(number)
        self.did(self.states[self.place] | {sha256(picture(number)): verdict})

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), verdict=st.sampled_from(["liked", "disliked", ""]))
    def move(self, data, verdict):
        numbers = data.draw(st.sets(st.sampled_from(sorted(self.seen)), min_size=1, max_size=3))
        checksums = [sha256(picture(number)) for number in sorted(numbers)]
        self.taste.place(checksums, verdict)
        rest = {k: v for k, v in self.states[self.place].items() if k not in checksums}
        self.did(rest | ({k: verdict for k in checksums} if verdict else {}))

    @rule()
    def undo(self):
        if self.place:
            self.taste.undo()
            self.place -= 1

    @rule()
    def redo(self):
        if self.place + 1 < len(self.states):
            self.taste.redo()
            self.place += 1

    @invariant()
    def the_folder_is_what_was_done(self):
        if hasattr(self, "taste"):
            assert dict(state(self.taste)) == self.states[self.place]

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestActs = Acts.TestCase
TestActs.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)

FORK = multiprocessing.get_context("fork")  # a process that needn't import torch again


def write(folder: Path, first: int, count: int, done: Path) -> None:
    """In a process of its own: rate pictures, and note each one that is done."""
    taste = Taste(folder)
    for number in range(first, first + count):
        taste.rate(picture(number), "liked", "same name.png")
        with open(done, "a") as file:
            file.write(f"{number}\n")
        if number % 3 == 0:
            taste.place([sha256(picture(number))], "disliked")


@pytest.mark.slow
def test_several_processes_at_once_lose_nothing_and_count_nothing_twice(taste, tmp_path):
    processes = [FORK.Process(target=write, args=(taste.folder, 100 * n, 12, tmp_path / "done")) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    expected = {100 * n + k for n in range(4) for k in range(12)}
    assert {checksum for checksum, _ in state(taste)} == {sha256(picture(number)) for number in expected}
    assert len(taste.pictures()) == 48
    assert {p.verdict for p in taste.pictures() if p.sha256 == sha256(picture(102))} == {"disliked"}


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing_that_was_rated(taste, tmp_path):
    generator = random.Random(1)
    done = tmp_path / "done"
    for start in range(0, 500, 10):  # 50 kills
        process = FORK.Process(target=write, args=(taste.folder, start, 10, done))
        process.start()
        time.sleep(generator.uniform(0, 0.12))
        process.kill()
        process.join()
    rated = {int(line) for line in done.read_text().split()}
    listed = [checksum for checksum, _ in state(taste)]
    assert len(listed) == len(set(listed)) and {sha256(picture(number)) for number in rated} <= set(listed)
    assert 50 < len(rated) <= len(listed) < 500, "killed neither before nor after all of its work"
    assert not [name for name in os.listdir(taste.folder / "liked") if not name.endswith((".png", ".tmp"))]
    taste.rate(picture(999), "liked")
    assert len(journal.read(taste.folder)) >= len(rated)


def test_the_lock_is_waited_for_and_then_refused_in_a_sentence(taste, monkeypatch, one_sentence):
    inside, done = multiprocessing.Event(), multiprocessing.Event()

    def hold():
        with Taste(taste.folder).changing():
            inside.set()
            done.wait(60)

    process = FORK.Process(target=hold)
    process.start()
    assert inside.wait(60)
    monkeypatch.setattr(taste, "_lock", module.FileLock(taste.folder / ".lock", timeout=0.1))
    with pytest.raises(TasteError) as raised:
        taste.rate(picture(1), "liked")
    done.set()
    process.join()
    assert "Another program is changing sea" in one_sentence(raised)


def test_half_a_letter_in_a_picture_s_own_words_stops_nothing(taste):
    graph = {"1": {"inputs": {"seed": 3, "positive": ["2", 0]}}, "2": {"inputs": {"text": "a \ud800 boat"}}}
    info = PngInfo()
    info.add_text("prompt", json.dumps(graph))
    assert taste.rate(picture(1, pnginfo=info), "liked", "\ud800.png").events
    [shown] = taste.pictures()
    assert (shown.name, shown.origin.prompt, shown.origin.seed) == ("_.png", "a ? boat", 3)
    assert taste.say("half \ud800", "liked", "added").events and taste.words().chosen("liked", "added") == ("half ?",)


def test_a_damaged_note_of_a_revision_is_passed_over(taste):
    taste.rate(picture(1), "liked")
    revision = taste.keep_revision()
    for text in ("", "{", "null", "[1]", '[["a", "b"]]'):
        (taste.folder / revisions.REVISIONS / f"{revision}.json").write_text(text)
        assert [p.sha256 for p in taste.frozen(revision)] == [sha256(picture(1))]


@pytest.mark.parametrize("moment", ["NaN", "Infinity", "1" + "0" * 400])
def test_a_time_that_no_browser_can_read_is_no_event(taste, moment):
    taste.rate(picture(1), "liked")
    path = taste.folder / journal.JOURNAL
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row).replace(str(row["time"]), moment) + "\n")
    assert moment in path.read_text() and journal.read(taste.folder) == []
    assert all(abs(p.time) < 1e12 for p in taste.pictures())


def test_a_verdict_is_one_of_two(taste, one_sentence):
    with pytest.raises(TasteError) as raised:
        taste.rate(picture(1), "loved", "1.png")
    assert "liked or disliked, not loved" in one_sentence(raised) and taste.pictures() == []


def test_a_picture_of_more_bytes_than_a_taste_keeps_is_refused(taste, monkeypatch, one_sentence):
    monkeypatch.setattr(stored, "MAX_BYTES", 1 << 20)
    assert taste.rate(picture(1), "liked", "small.png").events
    with pytest.raises(TasteError) as raised:
        taste.rate(bytes((1 << 20) + 1), "liked", "large.png")
    assert "large.png has more than 1 MB: shrink it first" in one_sentence(raised)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_nowhere_is_no_picture(taste):
    taste.rate(picture(1), "liked", "1.png")
    (taste.folder / "liked" / "gone.png").symlink_to("nowhere.png")
    assert [shown.path.name for shown in taste.pictures()] == ["1.png"]


def test_a_revision_and_words_that_cannot_be_kept_are_told_and_harm_nothing(taste, monkeypatch, caplog):
    taste.rate(picture(1), "liked", "1.png")

    def refuse(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in (revisions, words):
        monkeypatch.setattr(where, "write_atomic", refuse)
    revision = revisions.keep(taste.folder, [])
    words.keep_understood(taste.folder, revision, [])
    assert caplog.messages == [
        f"PrefGen can't note the revision {revision} of sea: No space left on device.",
        "PrefGen can't keep what was understood of sea: No space left on device.",
    ]
    assert words.understood(taste.folder) == {} and taste.counts() == {"liked": 1, "disliked": 0}
