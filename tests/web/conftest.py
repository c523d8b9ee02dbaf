"""A real browser on a real ComfyUI: Debian's Chromium, driven by Playwright."""

import json
import urllib.request

import pytest

from scripts import setup_env
from scripts.comfy_server import ComfyServer
from tests.prefgen.test_download import entry, running_hub

# The sidebar's button: front ends name it by a class, newer ones by a test id.
HEART = ".prefgen-taste-tab-button, [data-testid='prefgen-taste-tab-button']"
# Of the front end itself: they are there without any pack.
NOT_OURS = ("Failed to load resource", "onChange", "api.comfy.org", "ERR_", "Vue warn", "[Vue", "deprecat", "Deprecat")
NOT_OURS += ("asset fetch failed", "asset json response", "assets.seed", "Content Security Policy")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI with a hub of its own, which has one set of files. With --enable-assets where it takes that."""
    comfyui = setup_env.find_comfyui()
    base = tmp_path_factory.mktemp("browser")
    (base / "sets.json").write_text(json.dumps({"ours": entry()}))
    has_assets = "--enable-assets" in (comfyui / "comfy" / "cli_args.py").read_text()
    with running_hub() as own_hub:
        environment = {"PREFGEN_SETS": str(base / "sets.json"), "HF_HUB_OFFLINE": "0"}
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{own_hub.server_port}"
        arguments = ["--enable-assets"] if has_assets else []
        with ComfyServer(comfyui, base, threads=1, arguments=arguments, environment=environment) as running:
            running.hub = own_hub
            running.has_assets = has_assets
            yield running


def set_up(server, settings: dict) -> None:
    """Write settings of the front end's."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}/api/settings", json.dumps(settings).encode(), headers)
    urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture(params=["classic", "nodes 2.0"])
def page(chromium, server, request):
    """ComfyUI's page, empty, in either renderer; afterwards no error of ours stands in its console."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(120_000)  # of a machine that does other things as well
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    # Before the page asks for them: the first visit opens the templates over everything.
    set_up(server, {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param == "nodes 2.0"})
    page.goto(server.address)
    page.wait_for_function("window.app?.extensionManager && window.app.graph", timeout=120_000)
    page.wait_for_selector(HEART, timeout=120_000)
    page.evaluate("app.graph.clear()")
    yield page
    context.close()
    ours = [fault for fault in faults if not any(word in fault for word in NOT_OURS)]
    assert not ours, ours
