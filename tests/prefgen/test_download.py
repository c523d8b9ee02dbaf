"""The one command that downloads, against a server of the hub's kind on this machine."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prefgen.download import __main__ as command
from prefgen.download import fetch
from prefgen.download.__main__ import listed

ROOT = Path(__file__).resolve().parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
BIG = os.urandom(1 << 16) * 160  # 10 MB, in pieces of one
SMALL = b'{"a": 1}\n'
FILES = {"weights/model.safetensors": BIG, "config.json": SMALL}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a file at a revision; may break off, crawl, or lack files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.removeprefix(f"/our/files/resolve/{REVISION}/")
        data = self.server.files.get(name)
        if data is None or isinstance(data, int):
            self.send_response(data or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {self.server.ranges or f'{start}-{len(data) - 1}/{len(data)}'}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.server.asked.append((name, start))
        self.send(name, data[start:])

    def send(self, name, data):
        for place in range(0, len(data), 1 << 18):
            if self.server.breaks and place >= self.server.breaks:
                self.close_connection = True
                return
            if self.server.slow and name.endswith(".safetensors"):
                time.sleep(self.server.slow)
            try:
                self.wfile.write(data[place : place + (1 << 18)])
            except OSError:
                return
            self.server.sent += len(data[place : place + (1 << 18)])

    def log_message(self, *_):
        pass


@contextmanager
def running_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.slow, server.sent = dict(FILES), [], 0, 0
    server.ranges, server.breaks = None, 0  # in place of the right ones; after so many bytes
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def sets(tmp_path):
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"ours": entry()}))
    return path


def entry(**changed):
    files = [
        {"path": name, "to": f"LLM/tiny/{Path(name).name}", "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
        for name, d in FILES.items()
    ]
    own = {"what": "two files", "licence": "none", "repository": "our/files", "revision": REVISION, "files": files}
    return own | changed


def start(hub, sets, models, name="ours", offline=False, **options):
    models.mkdir(exist_ok=True)
    inherited = {k: v for k, v in os.environ.items() if offline or k != "HF_HUB_OFFLINE"}
    environment = inherited | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "prefgen.download", name, "--models", str(models), "--sets", str(sets)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True, **pipes, **options)


def ended(process):
    out, errors = process.communicate(timeout=900)
    return process.returncode, out, errors


def content(models):
    return {str(p.relative_to(models)): p.read_bytes() for p in models.rglob("*") if p.is_file()}


WHOLE = {"LLM/tiny/model.safetensors": BIG, "LLM/tiny/config.json": SMALL}


def test_a_set_comes_whole_and_a_second_time_fetches_nothing(hub, sets, tmp_path):
    code, out, errors = ended(start(hub, sets, tmp_path / "models"))
    assert code == 0, errors
    assert content(tmp_path / "models") == WHOLE and "model.safetensors" in out and "100%" in errors
    asked = list(hub.asked)
    assert {name for name, _ in asked} == set(FILES)
    assert ended(start(hub, sets, tmp_path / "models"))[0] == 0
    assert hub.asked == asked


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on_from_there(hub, sets, tmp_path, how):
    hub.slow = 0.05
    models = tmp_path / "models"
    process = start(hub, sets, models)
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and not any(p.stat().st_size for p in models.rglob("*.part")):
        time.sleep(0.02)
    os.killpg(process.pid, how)
    code, _, errors = ended(process)
    assert code == (130 if how == signal.SIGINT else -9) and "Traceback" not in errors
    if how == signal.SIGINT:
        assert errors.endswith("Stopped. The same command goes on from here.\n")
    assert not (models / "LLM").exists()
    hub.slow, hub.sent = 0, 0
    code, _, errors = ended(start(hub, sets, models))
    assert code == 0, errors
    assert content(models) == WHOLE
    assert max(place for _, place in hub.asked) > 0 and hub.sent < len(BIG)


def one_sentence(hub, sets, models, **options):
    code, _, errors = ended(start(hub, sets, models, **options))
    assert code == 1 and "Traceback" not in errors, errors
    return errors.splitlines()[-1]


def test_another_content_than_the_pinned_one_is_thrown_away(hub, sets, tmp_path):
    hub.files["weights/model.safetensors"] = BIG[:-1] + bytes([BIG[-1] ^ 1])
    assert "not the pinned file: it was thrown away" in one_sentence(hub, sets, tmp_path / "models")
    assert not (tmp_path / "models/LLM/tiny/model.safetensors").exists()
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_a_file_that_is_gone_and_no_network_are_sentences(hub, sets, tmp_path):
    del hub.files["weights/model.safetensors"]
    assert "can't be reached (HTTP 404)" in one_sentence(hub, sets, tmp_path / "models")
    hub.server_port = 1  # nobody listens there
    assert "can't be reached" in one_sentence(hub, sets, tmp_path / "models")


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "ftp://hf-mirror.com", "file:///etc"])
def test_an_endpoint_that_is_no_address_is_a_sentence(sets, endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    [file, _] = fetch.load_sets(sets)["ours"].files
    with pytest.raises(fetch.DownloadError, match=f"HF_ENDPOINT is {endpoint}, which is no address"):
        fetch.address(fetch.load_sets(sets)["ours"], file)


def test_a_page_to_log_in_to_is_not_taken_for_the_file(hub, sets, tmp_path):
    """As in a hotel: the network answers every address with its own page, and later with the file."""
    models = tmp_path / "models"
    hub.files = dict.fromkeys(FILES, b"<html>Your room number?</html>")
    assert "was answered with something else" in one_sentence(hub, sets, models)
    assert content(models) == {}, "nothing of it stays"
    hub.files = dict(FILES)
    assert ended(start(hub, sets, models))[0] == 0 and content(models) == WHOLE


@pytest.mark.parametrize("place", ["0-9/100", "5-9/10", "none"])
def test_a_rest_of_another_file_is_not_added(hub, sets, tmp_path, place):
    """A server that resumes elsewhere, or has another file by now."""
    models = tmp_path / "models"
    file = fetch.load_sets(sets)["ours"].files[0]
    part = models / fetch.STAGING / f"{file.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(BIG[:5])
    hub.ranges = place
    assert "was answered with something else" in one_sentence(hub, sets, models)
    assert part.read_bytes() == BIG[:5]
    hub.ranges = None
    assert ended(start(hub, sets, models))[0] == 0 and content(models) == WHOLE


def test_a_file_that_asks_for_an_agreement_is_a_sentence(hub, sets, tmp_path):
    hub.files["weights/model.safetensors"] = 403
    assert "asks for an agreement" in one_sentence(hub, sets, tmp_path / "models")


def test_a_folder_that_can_t_be_used_is_a_sentence(hub, sets, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / fetch.STAGING).write_bytes(b"")
    assert f"{fetch.STAGING} can't be used (" in one_sentence(hub, sets, models) and not hub.asked
    (models / fetch.STAGING).unlink()
    (models / "LLM").write_bytes(b"mine")
    assert "LLM" in one_sentence(hub, sets, models)
    (models / "LLM").unlink()
    asked = len(hub.asked)
    code, _, errors = ended(start(hub, sets, models))
    assert code == 0, errors
    assert content(models) == WHOLE and len(hub.asked) == asked + 1, "what had come was fetched again"


def test_what_another_set_has_begun_neither_counts_nor_is_thrown_away(hub, sets, tmp_path, monkeypatch):
    models = tmp_path / "models"
    begun = models / fetch.STAGING / f"{'0' * 64}.part"
    begun.parent.mkdir(parents=True)
    with open(begun, "wb") as file:
        file.truncate(1 << 40)  # it takes no room
    assert ended(start(hub, sets, models))[0] == 0
    assert begun.stat().st_size == 1 << 40
    usage = fetch.shutil.disk_usage(models)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(fetch.DownloadError, match="make room"):
        list(fetch.fetch(fetch.load_sets()["sd15"], models))


def test_a_connection_that_breaks_off_is_a_sentence_and_the_next_run_goes_on(hub, sets, tmp_path):
    hub.breaks = len(BIG) // 2
    assert "the connection broke off" in one_sentence(hub, sets, tmp_path / "models")
    hub.breaks = 0
    assert ended(start(hub, sets, tmp_path / "models"))[0] == 0
    assert hub.asked[1] == ("weights/model.safetensors", len(BIG) // 2) and content(tmp_path / "models") == WHOLE


def test_a_disk_that_fills_up_on_the_way_is_a_sentence(hub, sets, tmp_path):
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (len(BIG) // 2, len(BIG) // 2))  # EFBIG for ENOSPC
    assert "is full: make room" in one_sentence(hub, sets, tmp_path / "models", preexec_fn=small)
    assert ended(start(hub, sets, tmp_path / "models"))[0] == 0
    assert content(tmp_path / "models") == WHOLE


def test_offline_is_offline(hub, sets, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert one_sentence(hub, sets, tmp_path / "models", offline=True).startswith("HF_HUB_OFFLINE is set")
    assert not hub.asked


def test_the_models_folder_is_named_or_that_of_the_comfyui_around_the_pack(tmp_path, monkeypatch):
    named, pack = tmp_path / "models", tmp_path / "custom_nodes" / "prefgen"
    pack.mkdir(parents=True)
    monkeypatch.setattr(command, "PACK", tmp_path / "elsewhere" / "prefgen")
    monkeypatch.chdir(pack)
    with pytest.raises(fetch.DownloadError, match="models isn't a folder"):
        command.models_folder(named)
    with pytest.raises(fetch.DownloadError, match="name the models folder with --models"):
        command.models_folder(None)
    named.mkdir()
    assert command.models_folder(named) == command.models_folder(None) == named
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fetch.DownloadError, match="isn't inside a ComfyUI"):
        command.models_folder(None)
    monkeypatch.setattr(command, "PACK", pack)
    assert command.models_folder(None) == named


def test_an_unknown_name_and_a_file_of_the_artist_s_own_are_sentences(hub, sets, tmp_path):
    assert "There is no set 'other': choose ours." == one_sentence(hub, sets, tmp_path / "models", name="other")
    own = tmp_path / "models/LLM/tiny/model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    assert "is another file than the pinned one: move it away" in one_sentence(hub, sets, tmp_path / "models")
    assert own.read_bytes() == b"mine" and not hub.asked


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(fetch.DownloadError, match="0.0 GB free, .* GB are needed: make room"):
        list(fetch.fetch(next(iter(fetch.load_sets().values())), tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"to": "../outside.safetensors"},
        {"to": "/etc/model.safetensors"},
        {"path": "../other/model.safetensors"},
        {"to": "LLM/model.bin"},
        {"sha256": ""},
        {"bytes": 0},
    ],
)
def test_a_list_that_leaves_the_folder_or_lacks_a_pin_is_refused(tmp_path, change):
    path, changed = tmp_path / "sets.json", entry()
    changed["files"][0] |= change
    path.write_text(json.dumps({"ours": changed}))
    with pytest.raises(fetch.DownloadError, match="isn't a list of sets") as raised:
        fetch.load_sets(path)
    assert "\n" not in str(raised.value)
    path.write_text(json.dumps({"ours": entry(revision="main")}))
    with pytest.raises(fetch.DownloadError, match="revision 'main' isn't a commit"):
        fetch.load_sets(path)


def test_our_list_holds_together_and_is_shown():
    sets = fetch.load_sets()
    assert {"sd15", "sdxl", "smolvlm-256m", "qwen3-vl-2b"} <= set(sets)
    pins = {}
    for one in sets.values():
        for file in one.files:
            assert pins.setdefault(file.to, file) == file, "one place, one file"
            assert file.to.split("/")[0] in ("clip_vision", "ipadapter", "LLM", "prefgen")
        # Load Preference MLLM lists a folder from its config.json on, so that one comes when all the rest is there.
        assert one.files[-1].path == "config.json" or not one.files[0].to.startswith("prefgen/mllm/")
    assert all(name in listed(sets) for name in sets) and "Apache-2.0" in listed(sets)


@pytest.mark.parametrize("how", [["-m", "prefgen.download"], ["-I", "prefgen/download"]])
def test_it_runs_wherever_the_pack_lies_and_in_an_embedded_python(tmp_path, how):
    pack = tmp_path / "ComfyUI/custom_nodes/any name"
    shutil.copytree(ROOT / "prefgen/download", pack / "prefgen/download")
    (pack / "prefgen/__init__.py").touch()
    (tmp_path / "ComfyUI/models").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    line = [sys.executable, *how]
    ran = subprocess.run(line, cwd=pack, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and "sdxl" in ran.stdout, ran.stderr
    ran = subprocess.run([*line, "sd15"], cwd=pack, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.stdout.startswith(f"sd15: 2.57 GB, Apache-2.0, into {tmp_path / 'ComfyUI/models'} (")
    assert ran.stderr.startswith("HF_HUB_OFFLINE is set") and ran.returncode == 1


def test_nothing_else_in_the_pack_downloads():
    # aiohttp's web answers, its client would ask; urllib.parse reads addresses.
    clients = r"huggingface_hub|requests|httpx|aiohttp(?! import web$)|urllib(?!\.parse)|http"
    speaks = re.compile(rf"^\s*(?:import|from) (?:{clients})\b", re.M)
    for folder in ("nodes", "prefgen"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.parent.name == "download" or not speaks.search(path.read_text()), path


def test_a_models_folder_that_is_a_link_to_another_disk_is_filled(hub, sets, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk here")
    far = Path(tempfile.mkdtemp(dir=other))
    try:
        (tmp_path / "models").mkdir()
        (tmp_path / "models/LLM").symlink_to(far, target_is_directory=True)
        code, _, errors = ended(start(hub, sets, tmp_path / "models"))
        assert code == 0, errors
        assert content(far) == {name.removeprefix("LLM/"): data for name, data in WHOLE.items()}
        assert [path.name for path in (tmp_path / "models").iterdir()] == ["LLM"]
    finally:
        shutil.rmtree(far)
