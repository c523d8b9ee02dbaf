"""The routes on a real ComfyUI: there beside core's own, behind its doors, heard by every open page."""

import json
import urllib.error
import urllib.request

import pytest

from scripts import setup_env
from scripts.comfy_server import ComfyServer
from tests.prefgen.tastes.test_taste import picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(setup_env.find_comfyui(), tmp_path_factory.mktemp("routes"), threads=1) as running:
        yield running


def ask(server, method: str, path: str, content: dict | None = None, **headers) -> tuple[int, dict]:
    body = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{server.address}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def test_a_like_is_heard_by_every_open_page(server):
    assert ask(server, "POST", "/prefgen/tastes", {"name": "sea"}) == (200, {"name": "sea"})
    (server.output_dir / "boat.png").write_bytes(picture(1))
    with server.client() as page:
        liked = {"filename": "boat.png", "type": "output", "verdict": "liked"}
        # Core answers below /api as well: that is where its front end asks.
        assert ask(server, "POST", "/api/prefgen/tastes/sea/rate", liked)[0] == 200
        event = json.loads(page._receive())
        while event["type"] != "prefgen.taste":
            event = json.loads(page._receive())
        assert event["data"] == {"name": "sea"}
        # The history can be chosen as soon as the node is looked at again.
        options = page.object_info()["PrefGen_LoadPreferenceHistory"]["input"]["required"]["history"]
        assert "sea" in json.dumps(options)
    assert (server.input_dir / "prefgen" / "sea" / "liked" / "boat.png").exists()


def test_another_sites_page_changes_nothing(server):
    status, _ = ask(server, "POST", "/prefgen/tastes", {"name": "two"}, Origin="http://evil.example")
    assert status == 403
    assert [taste["name"] for taste in ask(server, "GET", "/prefgen/tastes")[1]["tastes"]] == ["sea"]
