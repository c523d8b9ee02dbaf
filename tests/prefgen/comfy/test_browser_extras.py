"""What else the browser asks for: words, looks, folders, and model files from a hub of our own."""

import errno
import json
import time

import numpy as np
import pytest

from tests.prefgen.comfy.test_routes import browser, folder_form, folders_of_comfy, form_of, pictures_of  # noqa: F401
from tests.prefgen.tastes.test_exchange import XMP
from tests.prefgen.tastes.test_taste import picture, sha256
from tests.prefgen.test_download import BIG, FILES, SMALL, content, entry, hub  # noqa: F401


def test_words_are_struck_out_added_and_undone(browser):  # noqa: F811
    route = "/prefgen/tastes/sea/words"
    said = {"word": "fog", "side": "liked", "state": "struck"}
    assert browser("POST", route, json=said)[1]["words"]["liked"] == {"added": [], "struck": ["fog"]}
    assert browser.server.events == [("prefgen.taste", {"name": "sea"})]
    shown = browser("GET", "/prefgen/tastes/sea")[1]["words"]
    assert shown["liked"]["struck"] == ["fog"] and shown["understood"] == {} and len(shown["revision"]) == 8
    assert browser("POST", "/prefgen/tastes/sea/undo", json={}) == (200, {"moved": [], "refused": []})
    assert browser("GET", "/prefgen/tastes/sea")[1]["words"]["liked"]["struck"] == []
    for odd in ({}, said | {"word": 5}, said | {"state": "loved"}, said | {"word": ""}):
        browser.sentence("POST", route, json=odd)
    assert "Another site" in browser.sentence("POST", route, json=said, status=403, Origin="http://evil.example")


def test_describe_preference_speaks_in_the_words_that_are_left(browser, pack):  # noqa: F811
    describe, histories = pack("nodes").DescribePreference, pack("prefgen.comfy.histories")
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    for word, now in (("boats", "struck"), ("sea foam", "added")):
        browser("POST", "/prefgen/tastes/sea/words", json={"word": word, "side": "liked", "state": now})
    images = histories.load(pack("prefgen.comfy.folders").history_of("sea")).liked
    before = describe.fingerprint_inputs(taste=["sea"])
    run = lambda taste: describe.execute([None], images, liked_traits=["boats, fog"], taste=taste).args[0]  # noqa: E731
    assert run(["sea"]) == run(["sea@1a2b3c4d"]) == run(["auto"]) == run(None) == "fog, sea foam"
    assert run(["none"]) == "boats, fog"
    others = describe.execute([None], [images[0] / 2], liked_traits=["boats"], taste=["auto"]).args[0]
    assert others == "boats", "pictures that come from no taste have no words of one"
    browser("POST", "/prefgen/tastes/sea/undo", json={})
    assert describe.fingerprint_inputs(taste="sea") != before and run(["auto"]) == "fog"
    assert describe.validate_inputs(taste="sea") is True and "no taste called" in describe.validate_inputs(taste="no")


def test_auto_takes_no_other_tastes_words_for_the_same_pictures(browser, pack, one_sentence):  # noqa: F811
    """A copy of a taste goes on apart: which of the two was loaded last says nothing of whose pictures these are."""
    describe, histories, folders = (
        pack("nodes").DescribePreference,
        pack("prefgen.comfy.histories"),
        pack("prefgen.comfy.folders"),
    )
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    browser("POST", "/prefgen/tastes/sea/copy", json={"name": "lake"})
    run = lambda images, disliked=None: describe.execute(  # noqa: E731
        [None], images, disliked, liked_traits=["boats, fog"], disliked_traits=["crowds"], taste=["auto"]
    ).args[0]
    for name in ("sea", "lake"):
        loaded = histories.load(folders.history_of(name))
    assert run(loaded.liked) == "boats, fog", "their words are the same, none"
    browser("POST", "/prefgen/tastes/sea/words", json={"word": "boats", "side": "liked", "state": "struck"})
    with pytest.raises(ValueError) as raised:
        run(loaded.liked)
    assert "the tastes sea and lake, whose words differ" in one_sentence(raised)
    # Their disliked pictures tell them apart.
    browser("POST", "/prefgen/tastes/lake/upload", form=form_of("disliked", {"2.png": picture(2)}))
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("disliked", {"3.png": picture(3)}))
    lake, sea = (histories.load(folders.history_of(name)) for name in ("lake", "sea"))
    assert run(lake.liked, lake.disliked) == "boats, fog" and run(sea.liked, sea.disliked) == "fog"


class Encoder:
    """A CLIP_VISION that tells pictures apart by their mean colour."""

    def __init__(self):
        self.model = __import__("torch").nn.Linear(1, 1)
        self.seen = 0

    def encode_image(self, pixels):
        self.seen += len(pixels)
        return {"image_embeds": pixels.mean((1, 2)) - 0.5}


def plain(red: int, green: int) -> bytes:
    from tests.prefgen.tastes.test_origin import Image, io

    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), (red, green, 0), np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_a_look_tells_where_the_taste_is_least_sure(browser, pack, folders_of_comfy):  # noqa: F811
    node, encoder = pack("nodes").LookAtPictures, Encoder()
    for verdict, colours in (("liked", [(255, 0), (250, 10)]), ("disliked", [(0, 255), (10, 250)])):
        files = {f"{verdict} {n}.png": plain(*colour) for n, colour in enumerate(colours)}
        browser("POST", "/prefgen/tastes/sea/upload", form=form_of(verdict, files))
    output = folders_of_comfy / "output"
    for name, colour in (("red", (240, 20)), ("both", (130, 128)), ("green", (20, 240))):
        (output / f"{name}.png").write_bytes(plain(*colour))
    (output / "broken.png").write_bytes(b"no picture")
    asked = [{"filename": f"{name}.png"} for name in ("red", "both", "green", "broken", "gone")]
    route = "/prefgen/tastes/sea/looked_at"
    before = browser("POST", route, json={"pictures": asked})[1]["pictures"]
    assert [each and each["difference"] for each in before] == [None] * 5 and before[4] is None
    assert browser("GET", "/prefgen/tastes/sea")[1]["settled"] is None
    node.execute(encoder, "sea", json.dumps(asked))
    # The seven, and the picture that an encoder without a checksum is known by.
    assert encoder.seen == 8 and browser.server.events[-1] == ("prefgen.taste", {"name": "sea"})
    red, both, green, broken, gone = browser("POST", route, json={"pictures": asked})[1]["pictures"]
    assert red["difference"] > 0.5 > abs(both["difference"]) and green["difference"] < -0.5
    assert broken["difference"] is None and gone is None and red["sha256"] == sha256(plain(240, 20))
    assert browser("GET", "/prefgen/tastes/sea")[1]["settled"] == {"agreement": 1.0, "pictures": 4}
    node.execute(encoder, "sea", json.dumps(asked))
    assert encoder.seen == 8, "what was looked at is not looked at again"
    for odd in ("{", "{}", "[1]"):
        with pytest.raises(ValueError, match="list of pictures"):
            node.execute(encoder, "sea", odd)
    for odd in ({}, {"pictures": "all"}, {"pictures": [1]}, {"pictures": [{}] * 1001}):
        assert "lacks a list" in browser.sentence("POST", route, json=odd)
    outside = browser("POST", route, json={"pictures": [{"filename": "../secret.png"}, {"filename": "/etc/passwd"}]})
    assert outside[1]["pictures"] == [None, None]


def test_what_was_seen_and_cannot_be_written_is_a_sentence(browser, pack, monkeypatch):  # noqa: F811
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"red.png": plain(255, 0)}))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack("prefgen.tastes.looks"), "write_atomic", full)
    with pytest.raises(ValueError) as raised:
        pack("nodes").LookAtPictures.execute(Encoder(), "sea", "[]")
    assert str(raised.value).startswith("What was seen of sea could not be written: the disk is full.")


def test_a_picture_that_may_not_be_read_is_passed_over(browser, pack, folders_of_comfy, monkeypatch):  # noqa: F811
    looking, encoder = pack("prefgen.comfy.looking"), Encoder()
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"red.png": plain(255, 0)}))
    for name in ("closed", "open"):
        (folders_of_comfy / "output" / f"{name}.png").write_bytes(plain(9, len(name)))
    real = looking.sha256_of

    def closed(path):
        if path.name == "closed.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(looking, "sha256_of", closed)
    pack("nodes").LookAtPictures.execute(
        encoder, "sea", json.dumps([{"filename": "closed.png"}, {"filename": "open.png"}])
    )
    assert encoder.seen == 3, "the liked one, the open one, and the fixed one"


def test_a_folder_comes_in_by_its_sub_folders_and_by_its_stars(browser, folders_of_comfy):  # noqa: F811
    files = {
        "Photos/Liked/a.png": picture(1),
        "Photos/deep/disliked/a.png": picture(2),
        "Photos/five.png": picture(3),
        "Photos/five.png.xmp": XMP % 5,
        "Photos/three.png": picture(4),
        "Photos/._five.png": picture(5),
        "../../liked/out.png": picture(6),
        "Photos/notes.txt": b"notes",
    }
    done = browser("POST", "/prefgen/tastes/sea/import", form=folder_form(files))[1]
    assert done == {"added": 3, "there": 0, "refused": []}
    verdict_of = {shown["sha256"]: shown["verdict"] for shown in pictures_of(browser)}
    assert verdict_of == {sha256(picture(n)): v for n, v in ((1, "liked"), (2, "disliked"), (3, "liked"))}
    assert not list((folders_of_comfy / "temp").iterdir()) and not (folders_of_comfy / "liked").exists()
    assert "no pictures with a verdict" in browser.sentence(
        "POST", "/prefgen/tastes/sea/import", form=folder_form({"x/a.png": picture(7), "x/b.png": picture(8)})
    )


@pytest.fixture
def downloads(pack, tmp_path, monkeypatch, hub):  # noqa: F811
    """The routes' module with a list of one set, from a hub on this machine into an empty models folder."""
    module = pack("prefgen.comfy.downloads")
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"ours": entry(), "other": entry()}))
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("PREFGEN_SETS", str(path))
    monkeypatch.setattr(module, "_current", None)
    monkeypatch.setattr(module.folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(module.folder_paths, "folder_names_and_paths", {})
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return module


def ended(browser, state: str = "") -> dict:  # noqa: F811
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        current = browser("GET", "/prefgen/downloads")[1]["current"]
        if current["state"] != "running" and (not state or current["state"] == state):
            return current
        time.sleep(0.05)
    raise AssertionError(current)


def test_a_set_comes_by_a_click_and_says_how_far_it_is(browser, downloads, tmp_path):  # noqa: F811
    listed = browser("GET", "/prefgen/downloads")[1]
    assert listed["current"] is None and [each["missing"] for each in listed["sets"]] == [len(BIG) + len(SMALL)] * 2
    assert browser("POST", "/prefgen/downloads/ours", json={})[1]["state"] == "running"
    assert ended(browser)["state"] == "done"
    assert content(tmp_path / "models") == {f"LLM/tiny/{name.rsplit('/')[-1]}": data for name, data in FILES.items()}
    [ours, _] = browser("GET", "/prefgen/downloads")[1]["sets"]
    assert ours["name"] == "ours"
    assert ours["missing"] == 0 and ours["files"] == []
    last = browser.server.events[-1]
    assert last == ("prefgen.download", {"name": "ours", "state": "done", "done": len(BIG) + len(SMALL),
                                         "total": len(BIG) + len(SMALL), "error": ""})  # fmt: skip


def test_what_nobody_thought_of_ends_a_download_and_the_next_one_begins(browser, downloads, monkeypatch, caplog):  # noqa: F811
    real = downloads.fetch

    def odd(*_):
        raise KeyError("of our own")

    monkeypatch.setattr(downloads, "fetch", odd)
    browser("POST", "/prefgen/downloads/ours", json={})
    assert "PrefGen failed inside" in ended(browser, "failed")["error"] and "of our own" in caplog.text
    monkeypatch.setattr(downloads, "fetch", real)
    browser("POST", "/prefgen/downloads/other", json={})
    assert ended(browser, "done")["error"] == ""


def test_a_list_of_sets_that_cannot_be_read_is_a_sentence(browser, downloads, tmp_path):  # noqa: F811
    (tmp_path / "sets.json").write_text("{")
    for request in (("GET", "/prefgen/downloads"), ("POST", "/prefgen/downloads/ours")):
        assert "PREFGEN_SETS" in browser.sentence(*request, json={} if request[0] == "POST" else None)


def test_what_is_missing_is_what_would_be_fetched(browser, downloads, tmp_path, monkeypatch):  # noqa: F811
    elsewhere = tmp_path / "other disk"
    roots = {"LLM": ([str(elsewhere)], set())}
    monkeypatch.setattr(downloads.folder_paths, "folder_names_and_paths", roots)
    every_byte = len(BIG) + len(SMALL)
    for name, missing in (("model.safetensors", every_byte), ("config.json", 0)):
        data = next(data for path, data in FILES.items() if path.endswith(name))
        (elsewhere / "tiny").mkdir(parents=True, exist_ok=True)
        (elsewhere / "tiny" / name).write_bytes(data)
        assert browser("GET", "/prefgen/downloads")[1]["sets"][0]["missing"] == missing, "all or nothing"


def test_a_cancelled_one_goes_on_from_there(browser, downloads, tmp_path, hub):  # noqa: F811
    hub.slow = 0.05
    browser("POST", "/prefgen/downloads/ours", json={})
    assert "is on its way" in browser.sentence("POST", "/prefgen/downloads/other", json={})
    assert browser("POST", "/prefgen/downloads/ours", json={})[1]["state"] == "running", "a second click waits for it"
    deadline = time.monotonic() + 120
    while not hub.sent and time.monotonic() < deadline:
        time.sleep(0.02)
    assert browser("DELETE", "/prefgen/downloads/other")[0] == 200, "another one's is left alone"
    assert browser("DELETE", "/prefgen/downloads/ours") == (200, {})
    assert ended(browser)["state"] == "cancelled" and not (tmp_path / "models" / "LLM").exists()
    begun = browser("GET", "/prefgen/downloads")[1]["sets"][0]["begun"]
    assert 0 < begun < len(BIG)
    hub.slow = 0
    browser("POST", "/prefgen/downloads/ours", json={})
    assert ended(browser, "done") and ("weights/model.safetensors", begun) in hub.asked


def test_what_goes_wrong_is_a_sentence(browser, downloads, hub, tmp_path):  # noqa: F811
    hub.files["weights/model.safetensors"] = BIG[:-1] + b"x"
    browser("POST", "/prefgen/downloads/ours", json={})
    assert "not the pinned file" in ended(browser, "failed")["error"]
    hub.files["weights/model.safetensors"] = 404
    browser("POST", "/prefgen/downloads/ours", json={})
    assert "HTTP 404" in ended(browser, "failed")["error"]
    (tmp_path / "models" / ".prefgen-download").rmdir()
    (tmp_path / "models" / ".prefgen-download").write_bytes(b"")
    browser("POST", "/prefgen/downloads/ours", json={})
    assert "can't be used" in ended(browser, "failed")["error"]
    assert "no set of that name" in browser.sentence("POST", "/prefgen/downloads/..%2F..", json={})
    for headers in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
        assert "Another site" in browser.sentence("POST", "/prefgen/downloads/ours", status=403, json={}, **headers)
    assert "isn't JSON" in browser.sentence("POST", "/prefgen/downloads/ours", raw="{}", Content_Type="text/plain")
