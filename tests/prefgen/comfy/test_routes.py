"""The routes behind the browser: what they do, and what they refuse, one sentence each."""

import asyncio
import errno
import io
import json
import os
import zipfile

import pytest
from aiohttp import FormData, web
from aiohttp.test_utils import TestClient, TestServer

from tests.prefgen.tastes.test_taste import picture, sha256


class Server:
    """As much of ComfyUI's PromptServer as the routes touch."""

    def __init__(self):
        self.routes = web.RouteTableDef()
        self.events = []

    def send_sync(self, event, data, sid=None):
        self.events.append((event, data))


class Browser:
    """A client of the routes: every call is one request, answered as (status, JSON or bytes)."""

    def __init__(self, server: Server):
        self.server = server

    def __call__(self, method, path, json=None, form=None, raw=None, **headers):
        async def ask():
            app = web.Application(client_max_size=100 << 20)
            app.add_routes(self.server.routes)
            async with TestClient(TestServer(app)) as client:
                body = {"json": json} if json is not None else {"data": form if form is not None else raw}
                headers_ = {key.replace("_", "-"): value for key, value in headers.items()}
                async with client.request(method, path, headers=headers_, **body) as response:
                    content = await response.read()
                    self.headers = response.headers
                    return response.status, content

        status, content = asyncio.run(ask())
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        return status, (__import__("json").loads(content) if is_json else content)

    def sentence(self, *request, status=400, **options) -> str:
        """The sentence of a request that is refused."""
        got, answer = self(*request, **options)
        assert got == status, answer
        text = answer["error"]
        assert "\n" not in text and text.endswith(".") and "Error" not in text and "/tmp" not in text, text
        return text


@pytest.fixture
def folders_of_comfy(tmp_path, monkeypatch):
    import folder_paths

    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def browser(pack, folders_of_comfy, monkeypatch):
    server = Server()
    pack("prefgen.comfy.routes").register(server)
    monkeypatch.setattr(pack("prefgen.comfy.tastes"), "prompt_server", lambda: server)
    monkeypatch.setattr(pack("prefgen.comfy.downloads"), "prompt_server", lambda: server)
    browser = Browser(server)
    assert browser("POST", "/prefgen/tastes", json={"name": "sea"}) == (200, {"name": "sea"})
    server.events.clear()
    return browser


def pictures_of(browser, name="sea") -> list[dict]:
    return browser("GET", f"/prefgen/tastes/{name}")[1]["pictures"]


def folder_form(files: dict[str, bytes]) -> FormData:
    form = FormData(quote_fields=False)
    for name, data in files.items():
        form.add_field("file", data, filename=name, content_type="application/octet-stream")
    return form


def form_of(verdict: str, files: dict[str, bytes]) -> FormData:
    form = FormData()
    form.add_field("verdict", verdict)
    for name, data in files.items():
        form.add_field("file", data, filename=name, content_type="application/octet-stream")
    return form


def test_a_like_on_an_output_is_one_request_and_tells_every_page(browser, folders_of_comfy):
    (folders_of_comfy / "output" / "day").mkdir()
    (folders_of_comfy / "output" / "day" / "boat.png").write_bytes(picture(1))
    liked = {"filename": "boat.png", "subfolder": "day", "type": "output", "verdict": "liked"}
    status, answer = browser("POST", "/prefgen/tastes/sea/rate", json=liked)
    assert status == 200 and answer["moved"] == [{"sha256": sha256(picture(1)), "before": "", "after": "liked"}]
    assert browser.server.events == [("prefgen.taste", {"name": "sea"})]
    [shown] = pictures_of(browser)
    assert (shown["file"], shown["verdict"], shown["source"]) == ("boat.png", "liked", "output")
    assert (folders_of_comfy / "input" / "prefgen" / "sea" / "liked" / "boat.png").exists()
    assert browser("GET", "/prefgen/tastes")[1]["tastes"] == [{"name": "sea", "liked": 1, "disliked": 0}]


def test_twelve_dropped_files_come_in_at_once_and_what_is_no_picture_is_listed(browser):
    files = {f"{n}.png": picture(n) for n in range(12)} | {"notes.txt": b"notes"}
    status, answer = browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", files))
    assert status == 200 and (answer["added"], answer["there"]) == (12, 0)
    assert [name for name, _ in answer["refused"]] == ["notes.txt"]
    again = browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", files))[1]
    assert (again["added"], again["there"]) == (0, 12) and len(pictures_of(browser)) == 12


def test_flip_undo_and_redo(browser):
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1), "2.png": picture(2)}))
    chosen = [shown["sha256"] for shown in pictures_of(browser)]
    browser("POST", "/prefgen/tastes/sea/place", json={"pictures": chosen, "verdict": "disliked"})
    assert {shown["verdict"] for shown in pictures_of(browser)} == {"disliked"}
    assert browser("POST", "/prefgen/tastes/sea/undo", json={})[0] == 200
    before = browser("GET", "/prefgen/tastes/sea")[1]
    assert before["can_undo"] and before["can_redo"] and {p["verdict"] for p in before["pictures"]} == {"liked"}
    browser("POST", "/prefgen/tastes/sea/redo", json={})
    browser("POST", "/prefgen/tastes/sea/place", json={"pictures": chosen[:1], "verdict": ""})
    assert len(pictures_of(browser)) == 1
    assert browser("POST", "/prefgen/tastes/sea/empty_trash", json={})[1] == {"deleted": 1}


def test_thumbnails_and_pictures_are_shown_as_pictures_and_nothing_else(browser, folders_of_comfy):
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    name = sha256(picture(1))
    status, data = browser("GET", f"/prefgen/tastes/sea/thumbnail/{name}")
    assert status == 200 and data[:4] == b"RIFF" and "immutable" in browser.headers["Cache-Control"]
    status, data = browser("GET", f"/prefgen/tastes/sea/picture/{name}")
    assert data == picture(1) and browser.headers["Content-Type"] == "image/png"
    assert (
        browser.headers["X-Content-Type-Options"] == "nosniff"
        and "sandbox" in browser.headers["Content-Security-Policy"]
    )
    for number, name, kind in ((2, "2.PNG", "image/png"), (3, "3.bmp", "application/octet-stream")):
        data = picture(number, "PNG" if number == 2 else "BMP")
        (folders_of_comfy / "input" / "prefgen" / "sea" / "liked" / name).write_bytes(data)
        assert browser("GET", f"/prefgen/tastes/sea/picture/{sha256(data)}") == (200, data)
        assert browser.headers["Content-Type"] == kind
    assert "isn't in sea any more" in browser.sentence("GET", "/prefgen/tastes/sea/thumbnail/" + "0" * 64)
    assert "isn't in sea" in browser.sentence("GET", "/prefgen/tastes/sea/picture/..%2F..%2Fsecret")


def test_rename_copy_export_import_and_forget(browser, folders_of_comfy):
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    assert browser("POST", "/prefgen/tastes/sea/rename", json={"name": "Sea"})[1] == {"name": "Sea"}
    assert browser("POST", "/prefgen/tastes/Sea/copy", json={"name": "two"})[1] == {"name": "two"}
    status, data = browser("GET", "/prefgen/tastes/two/export?private=1")
    assert status == 200 and browser.headers["Content-Type"] == "application/zip"
    assert "two/liked/1.png" in zipfile.ZipFile(io.BytesIO(data)).namelist()
    browser("POST", "/prefgen/tastes", json={"name": "three"})
    done = browser("POST", "/prefgen/tastes/three/import", form=form_of("", {"two.zip": data}))[1]
    assert done == {"added": 1, "there": 0, "refused": []}
    revisions = {browser("GET", f"/prefgen/tastes/{name}")[1]["revision"] for name in ("Sea", "two", "three")}
    assert len(revisions) == 1
    for name in ("Sea", "two", "three"):
        assert browser("DELETE", f"/prefgen/tastes/{name}")[0] == 200
    assert os.listdir(folders_of_comfy / "input" / "prefgen") == []


HOSTILE = [
    "../secret.png",
    "..",
    "/etc/passwd",
    "C:\\secret.png",
    "a\0.png",
    "boat.png:stream",
    "con.png",
    "sub/../../x",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["filename", "subfolder"])
def test_no_name_leads_out_of_comfyuis_folders(browser, folders_of_comfy, name, field):
    (folders_of_comfy / "secret.png").write_bytes(picture(1))
    (folders_of_comfy / "x").write_bytes(picture(1))
    asked = {"filename": "boat.png", "subfolder": "", "type": "output", "verdict": "liked"} | {field: name}
    browser.sentence("POST", "/prefgen/tastes/sea/rate", json=asked)
    assert not pictures_of(browser)


def test_a_link_that_leads_out_is_refused(browser, folders_of_comfy):
    (folders_of_comfy / "secret.png").write_bytes(picture(1))
    (folders_of_comfy / "output" / "link.png").symlink_to(folders_of_comfy / "secret.png")
    (folders_of_comfy / "output" / "door").symlink_to(folders_of_comfy)
    for asked in ({"filename": "link.png"}, {"filename": "secret.png", "subfolder": "door"}):
        asked |= {"type": "output", "verdict": "liked"}
        assert "isn't there any more" in browser.sentence("POST", "/prefgen/tastes/sea/rate", json=asked)
    for place in ("models", "user", "../output", ""):
        asked = {"filename": "boat.png", "type": place, "verdict": "liked"}
        assert "none of ComfyUI's folders" in browser.sentence("POST", "/prefgen/tastes/sea/rate", json=asked)


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2foutput", ".trash", "SEA", "sea%00", "nobody"])
def test_a_taste_that_is_not_there_is_named_whatever_the_path_says(browser, name):
    for method, route in (("GET", ""), ("POST", "/undo"), ("DELETE", ""), ("GET", "/export")):
        body = {"json": {}} if method == "POST" else {}
        status, _ = browser(method, f"/prefgen/tastes/{name}{route}", **body)
        assert status in (400, 404, 405)
    assert browser("GET", "/prefgen/tastes")[1]["tastes"][0]["name"] == "sea"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "null"},
    ],
)
def test_another_sites_page_changes_nothing(browser, headers):
    for method, path, body in (
        ("POST", "/prefgen/tastes", {"json": {"name": "two"}}),
        ("DELETE", "/prefgen/tastes/sea", {}),
        ("POST", "/prefgen/tastes/sea/upload", {"form": form_of("liked", {"1.png": picture(1)})}),
    ):
        assert "Another site" in browser.sentence(method, path, status=403, **body, **headers)
    assert browser("GET", "/prefgen/tastes")[1]["tastes"] == [{"name": "sea", "liked": 0, "disliked": 0}]


def test_a_simple_form_of_another_site_is_no_json(browser):
    text = json.dumps({"name": "two"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert "isn't JSON" in browser.sentence("POST", "/prefgen/tastes", raw=text, Content_Type=kind)


async def in_parts(*parts: bytes):
    """A request's body that arrives part by part."""
    for part in parts:
        yield part
        await asyncio.sleep(0.05)


def test_a_request_that_arrives_in_parts_is_read_whole(browser):
    text = json.dumps({"name": "two", "more": "x" * 300_000}).encode()
    sent = {"raw": in_parts(text[:20], text[20:200_000], text[200_000:]), "Content_Type": "application/json"}
    assert browser("POST", "/prefgen/tastes", **sent) == (200, {"name": "two"})


def test_a_request_of_unsaid_length_ends_where_it_is_too_long(browser):
    sent = {"raw": in_parts(b'{"name": "two"', *[b" " * (1 << 20)] * 5), "Content_Type": "application/json"}
    assert "more than 4 MB" in browser.sentence("POST", "/prefgen/tastes", **sent)


def test_a_verdict_that_arrives_in_two_parts_is_read_whole(browser):
    field = b'--end\r\nContent-Disposition: form-data; name="verdict"\r\n\r\nlik'
    file = b'ed\r\n--end\r\nContent-Disposition: form-data; name="file"; filename="1.png"\r\n\r\n'
    sent = {"raw": in_parts(field, file, picture(1), b"\r\n--end--\r\n")}
    status, answer = browser(
        "POST", "/prefgen/tastes/sea/upload", **sent, Content_Type="multipart/form-data; boundary=end"
    )
    assert status == 200 and answer["added"] == 1, answer


FIELD = b'--end\r\nContent-Disposition: form-data; name="verdict"\r\n\r\nliked\r\n'
FILE = b'--end\r\nContent-Disposition: form-data; name="file"; filename="1.png"\r\n\r\n'
NESTED = b"--end\r\nContent-Type: multipart/mixed; boundary=in\r\n\r\n--in\r\n\r\nx\r\n--in--\r\n"
BROKEN_FORMS = {
    "a form inside of it": ("; boundary=end", NESTED + FIELD + FILE + picture(1) + b"\r\n--end--\r\n"),
    "no boundary": ("", FIELD),
    "another boundary": ("; boundary=other", FIELD),
    "nothing": ("; boundary=end", b""),
    "no headers": ("; boundary=end", b"--end\r\n\xff\xfe\r\nno header\r\n"),
    "an odd encoding": ("; boundary=end", FILE[:-2] + b"Content-Transfer-Encoding: odd\r\n\r\n" + picture(1)),
    "half a file": ("; boundary=end", FIELD + FILE + picture(1)[:40]),
    "no end": ("; boundary=end", FIELD + FILE + picture(1)),
    "an odd length": ("; boundary=end", FILE[:-2] + b"Content-Length: x\r\n\r\n" + picture(1) + b"\r\n--end--\r\n"),
}


@pytest.mark.parametrize("route", ["upload", "import"])
@pytest.mark.parametrize("form", BROKEN_FORMS)
def test_a_form_that_cannot_be_read_is_a_sentence_and_adds_nothing_broken(browser, route, form):
    boundary, body = BROKEN_FORMS[form]
    sent = {"raw": body, "Content_Type": f"multipart/form-data{boundary}"}
    status, answer = browser("POST", f"/prefgen/tastes/sea/{route}", **sent)
    assert status in (200, 400) and "failed inside" not in str(answer), answer
    assert {each["sha256"] for each in pictures_of(browser)} <= {sha256(picture(1))}


@pytest.mark.parametrize("act", ["import", "export"])
def test_a_disk_that_is_full_where_forms_and_zips_are_kept_is_a_sentence(browser, pack, monkeypatch, act):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/somewhere")

    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    name = {"import": "TemporaryDirectory", "export": "TemporaryFile"}[act]
    monkeypatch.setattr(pack("prefgen.comfy.uploads").tempfile, name, full)
    request = {"import": ("POST", {"form": folder_form({"liked/2.png": picture(2)})}), "export": ("GET", {})}[act]
    sentence = browser.sentence(request[0], f"/prefgen/tastes/sea/{act}", status=507, **request[1])
    assert "the disk is full" in sentence and len(pictures_of(browser)) == 1


@pytest.mark.parametrize("raw", ["", "[]", "null", "{", '{"name": 5}', '{"name": null}', "[" * 100_000, "\xff"])
def test_odd_json_is_refused(browser, raw):
    browser.sentence("POST", "/prefgen/tastes", raw=raw.encode("latin-1"), Content_Type="application/json")


ODD_ACTS = [
    {},
    {"pictures": "all", "verdict": "liked"},
    {"pictures": [1], "verdict": "liked"},
    {"pictures": ["a" * 64], "verdict": "adored"},
    {"pictures": ["ab"], "verdict": "liked"},
]


@pytest.mark.parametrize("content", ODD_ACTS)
def test_odd_acts_are_refused(browser, content):
    browser.sentence("POST", "/prefgen/tastes/sea/place", json=content)


def test_uploads_are_bounded_and_decoded(browser, pack, monkeypatch):
    monkeypatch.setattr(pack("prefgen.comfy.uploads"), "MAX_BYTES", 5000)
    big = {
        "big.png": b"\x89PNG" + b"\0" * 10_000,
        "small.png": picture(1),
        "page.png": b"<html><script>alert(1)</script>",
    }
    answer = browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", big))[1]
    assert answer["added"] == 1 and [name for name, _ in answer["refused"]] == ["big.png", "page.png"]
    polyglot = picture(2) + b"<script>alert(1)</script>"
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"both.html": polyglot}))
    assert sorted(shown["file"] for shown in pictures_of(browser)) == ["both.png", "small.png"]
    monkeypatch.setattr(pack("prefgen.comfy.uploads"), "MAX_UPLOAD", 100)
    assert "in parts" in browser.sentence("POST", "/prefgen/tastes/sea/import", form=form_of("", {"a.zip": b"0" * 300}))
    empty = b"--x\r\nContent-Disposition: form-data; name=verdict\r\n\r\nliked\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    assert "holds no file" in browser.sentence("POST", "/prefgen/tastes/sea/import", raw=empty, Content_Type=kind)
    assert "isn't a zip" in browser.sentence("POST", "/prefgen/tastes/sea/import", form=form_of("", {"a.zip": b"PK"}))


def test_a_picture_of_just_the_size_allowed_is_rated_and_one_byte_more_is_refused(
    browser, pack, folders_of_comfy, monkeypatch
):
    folder = folders_of_comfy / "output"
    (folder / "fits.png").write_bytes(picture(1))
    (folder / "large.png").write_bytes(picture(1) + b"\0")
    monkeypatch.setattr(pack("prefgen.comfy.routes"), "MAX_BYTES", len(picture(1)))
    rate = {"type": "output", "verdict": "liked"}
    assert "large.png" in browser.sentence("POST", "/prefgen/tastes/sea/rate", json=rate | {"filename": "large.png"})
    assert browser("POST", "/prefgen/tastes/sea/rate", json=rate | {"filename": "fits.png"})[0] == 200


def test_a_fault_of_our_own_is_a_sentence_and_in_the_log(browser, pack, monkeypatch, caplog):
    monkeypatch.setattr(pack("prefgen.comfy.routes"), "summaries", lambda: 1 / 0)
    assert "the log of ComfyUI says where" in browser.sentence("GET", "/prefgen/tastes", status=500)
    assert "ZeroDivisionError" in caplog.text


def test_a_folder_that_is_called_as_another_entry_of_the_combo_stands_in_it_once(browser, pack, folders_of_comfy):
    (folders_of_comfy / "input" / "prefgen" / "none").mkdir()
    tastes = pack("prefgen.comfy.tastes")
    assert tastes.choices() == ["auto", "none", "sea"] and tastes.chosen("none") is None


def test_a_revision_can_be_chosen_by_its_name_and_stays_what_it_was(browser, pack, folders_of_comfy, monkeypatch):
    folders = pack("prefgen.comfy.folders")
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1), "2.png": picture(2)}))
    name = f"sea@{browser('GET', '/prefgen/tastes/sea')[1]['revision']}"
    node = pack("nodes").LoadPreferenceHistory
    before = [tensor.tolist() for tensor in node.execute(name).result[0]]
    print_before = folders.history_fingerprint(name)
    browser("POST", "/prefgen/tastes/sea/place", json={"pictures": [sha256(picture(1))], "verdict": ""})
    assert node.validate_inputs(name) is True and folders.history_fingerprint(name) == print_before
    assert [tensor.tolist() for tensor in node.execute(name).result[0]] == before
    assert len(node.execute("sea").result[0]) == 1
    for wrong in ("sea@00000000", "nobody@1a2b3c4d", "../sea@1a2b3c4d"):
        assert isinstance(node.validate_inputs(wrong), str)


def test_a_thumbnail_that_is_there_is_shown_without_a_look_at_the_folder(browser, pack, monkeypatch):
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    address = f"/prefgen/tastes/sea/thumbnail/{sha256(picture(1))}"
    first = browser("GET", address)
    monkeypatch.setattr(pack("prefgen.comfy.routes"), "picture_of", lambda *_: 1 / 0)
    assert browser("GET", address) == first


def test_what_is_sent_another_way_than_the_panel_sends_it_is_refused(browser, pack, monkeypatch):
    for place, what in (("upload", "The pictures aren't"), ("import", "The zip isn't")):
        said = browser.sentence("POST", f"/prefgen/tastes/sea/{place}", raw="x", Content_Type="text/plain")
        assert said == f"{what} sent as a form: use the panel, or multipart/form-data."
    monkeypatch.setattr(pack("prefgen.comfy.doors"), "MAX_JSON", 1 << 20)
    long = {"name": "x" * (1 << 20)}
    assert "has more than 1 MB: send it in parts" in browser.sentence("POST", "/prefgen/tastes", json=long)
    assert browser("GET", "/prefgen/no such page")[0] == 404


def test_a_form_of_more_files_than_a_taste_takes_at_once_is_refused(browser, pack, monkeypatch):
    monkeypatch.setattr(pack("prefgen.comfy.uploads"), "MAX_FILES", 2)
    form = folder_form({f"liked/{n}.png": picture(n) for n in range(3)})
    assert "more than 2 files: import them in parts" in browser.sentence(
        "POST", "/prefgen/tastes/sea/import", form=form
    )
    assert pictures_of(browser) == []


def test_files_of_one_name_come_in_side_by_side_and_parts_without_a_name_are_passed_over(browser):
    form = FormData(quote_fields=False)
    form.add_field("note", "no file")
    for number, name in enumerate(("a/liked/1.png", "a/liked/1.png", "b/liked/1.png")):
        form.add_field("file", picture(number), filename=name)
    assert browser("POST", "/prefgen/tastes/sea/import", form=form)[1]["added"] == 3
    assert {each["sha256"] for each in pictures_of(browser)} == {sha256(picture(n)) for n in range(3)}
    form = form_of("liked", {"4.png": picture(4)})
    form.add_field("note", "no file")
    assert browser("POST", "/prefgen/tastes/sea/upload", form=form)[1]["added"] == 1


def test_a_taste_of_which_nothing_can_be_read_is_no_empty_zip(browser, folders_of_comfy, pack, monkeypatch):
    browser("POST", "/prefgen/tastes/sea/upload", form=form_of("liked", {"1.png": picture(1)}))
    uploads = pack("prefgen.comfy.uploads")
    monkeypatch.setattr(uploads, "export_zip", lambda taste, file, private: [("1.png", "permission denied")])
    monkeypatch.setattr(pack("prefgen.tastes.taste").Taste, "pictures", lambda taste: [])
    said = browser.sentence("GET", "/prefgen/tastes/sea/export")
    assert said == "Nothing of sea can be read: permission denied."
