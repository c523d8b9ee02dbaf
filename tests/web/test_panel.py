"""The rest of the panel: words, the Rate view's grid and its own pictures, model files, faults, and other languages."""

import json
import shutil
import time
import urllib.request

import numpy as np
import pytest

from prefgen.atelier import users
from prefgen.atelier.renderer import render
from tests.prefgen.tastes.test_taste import picture
from tests.prefgen.test_download import BIG
from tests.web.conftest import HEART, set_up
from tests.web.test_taste import asked, drop, fresh, open_panel, tab, verdicts

pytestmark = pytest.mark.slow

# The panel is the same document in either renderer; nodes are where they differ.
one_renderer = pytest.mark.parametrize("page", ["nodes 2.0"], indirect=True)
WAIT = 240_000  # ms, for what a model does


def drawn(verdict: bool, count: int) -> dict[str, bytes]:
    """Pictures of the atelier that its first example user likes, or doesn't."""
    import io

    from PIL import Image

    files = {}
    examples = users.history(users.user(next(iter(users.EXAMPLE_USERS.values()))), count, count, 1)
    for number, example in enumerate(example for example in examples if example.liked == verdict):
        out = io.BytesIO()
        Image.fromarray(np.asarray(render(example.scene))).save(out, "PNG")
        files[f"{verdict} {number}.png"] = out.getvalue()
    return files


def until(page, script: str) -> None:
    """Wait for a function of the page's that imports, which `wait_for_function` doesn't wait for."""
    deadline = time.monotonic() + WAIT / 1000
    while not page.evaluate(script):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(250)


def taste_of_an_example(page, name: str) -> None:
    fresh(page, name)
    open_panel(page, name)
    tab(page, "Liked")
    drop(page, ".prefgen-grid", drawn(True, 6))
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[1].textContent.includes('6')")
    tab(page, "Disliked")
    drop(page, ".prefgen-grid", drawn(False, 6))
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[2].textContent.includes('6')")


ATELIER = """async () => {
    const add = (kind, widgets = {}) => {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        for (const widget of node.widgets ?? []) if (widget.name in widgets) widget.value = widgets[widget.name];
        return node;
    };
    const loader = add("PrefGen_LoadAtelier");
    const text = add("CLIPTextEncode", {text: "a boat"});
    const size = add("EmptyLatentImage", {width: 128, height: 128});
    const sampler = add("KSampler", {steps: 2, seed: 7});
    const decode = add("VAEDecode");
    const save = add("PreviewImage");
    loader.connect(0, sampler, 0);
    loader.connect(1, text, 0);
    text.connect(0, sampler, 1);
    text.connect(0, sampler, 2);
    size.connect(0, sampler, 3);
    sampler.connect(0, decode, 0);
    loader.connect(2, decode, 1);
    decode.connect(0, save, 0);
}"""


@one_renderer
def test_words_are_read_struck_out_and_added_and_describe_goes_by_them(page, server):
    name = "words"
    taste_of_an_example(page, name)
    tab(page, "Words")
    page.click("[data-key=read]")
    page.wait_for_selector(".prefgen-chip[data-state='']", timeout=WAIT)
    understood = asked(server, f"tastes/{name}")["words"]["understood"]["words"]
    assert all(0 < each["sure"] <= 1 for each in understood)
    liked = [each["word"] for each in understood if each["side"] == "liked"]
    assert page.locator(f".prefgen-chip[data-word='{liked[0]}'] small").inner_text().endswith("%")
    page.get_by_role("button", name=f"Strike out “{liked[0]}”").click()
    page.wait_for_selector(f".prefgen-chip[data-word='{liked[0]}'][data-state=struck]")
    page.locator("[data-key='add liked']").fill("sea foam")
    page.keyboard.press("Enter")
    page.wait_for_selector(".prefgen-chip[data-word='sea foam'][data-state=added]")
    with server.client() as client:
        graph = {
            "1": {"class_type": "PrefGen_LoadPreferenceMLLM", "inputs": {"mllm": "atelier"}},
            "2": {"class_type": "PrefGen_LoadPreferenceHistory", "inputs": {"history": name}},
            "3": {"class_type": "PrefGen_DescribePreference", "inputs": {"mllm": ["1", 0], "liked": ["2", 0]}},
            "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
        }
        schema = client.object_info()["PrefGen_LoadPreferenceMLLM"]["input"]["required"]
        presets = {key: spec[1].get("default") or spec[1]["options"][0] for key, spec in schema.items()}
        graph["1"]["inputs"] = presets | graph["1"]["inputs"]
        prompt = client.queue(graph)
        client.wait(prompt)
        said = client.history(prompt)["outputs"]["4"]["text"][0].split(", ")
    assert "sea foam" in said and liked[0] not in said
    page.locator(".prefgen-panel").focus()
    page.get_by_role("button", name="Undo (Ctrl+Z)").click()
    page.wait_for_selector(".prefgen-chip[data-word='sea foam']", state="detached")


@one_renderer
def test_rate_makes_pictures_and_asks_first_where_the_taste_is_least_sure(page, server):
    name = "least sure"
    taste_of_an_example(page, name)
    page.evaluate(ATELIER)
    page.locator("[data-key=rate]").click()
    page.locator("[data-key=make]").click()
    # Four of them come in, are looked at by the workflow's own CLIP vision, and the surest is asked last.
    until(
        page,
        """async () => {
            const {recent} = await import("/extensions/prefgen/taste/recent.js");
            const fresh = recent.pictures.filter((each) => each.type === "temp");
            return fresh.length === 4 && fresh.every((each) => recent.differences.has(recent.key(each)));
        }""",
    )
    assert page.evaluate("app.graph._nodes.find((node) => node.type === 'KSampler').widgets[0].value") == 7
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.prefgen-rate header').textContent.includes('1 given')")
    settled = asked(server, f"tastes/{name}")["settled"]
    assert settled["pictures"] >= 12 and 0 <= settled["agreement"] <= 1
    shown = page.evaluate(
        """async () => {
            const {recent} = await import("/extensions/prefgen/taste/recent.js");
            const now = document.querySelector(".prefgen-stage img").src;
            const rated = recent.verdicts();
            const doubts = recent.pictures.filter((each) => !rated.has(recent.key(each)))
                .map((each) => [Math.abs(recent.differences.get(recent.key(each)) ?? Infinity), recent.source(each)]);
            doubts.sort((a, b) => a[0] - b[0]);
            return [now.endsWith(doubts[0][1]), doubts.length];
        }"""
    )
    assert shown[0] and shown[1] >= 3
    page.keyboard.press("Escape")
    assert "%" in page.locator(".prefgen-panel .prefgen-note").first.inner_text()


def rate_view(page, server, name: str, numbers: range) -> None:
    """The Rate view of a new taste, with that many fresh pictures in the output folder."""
    for place, number in enumerate(numbers):
        (server.output_dir / f"{name} {place:02}.png").write_bytes(picture(number))
    fresh(page, name)
    open_panel(page, name)
    page.locator("[data-key=rate]").click()
    page.wait_for_selector(".prefgen-rate img")


@one_renderer
def test_nine_at_once_by_keys(page, server):
    name = "grid"
    rate_view(page, server, name, range(4000, 4012))
    page.keyboard.press("p")
    page.keyboard.press("p")
    page.wait_for_function("document.querySelectorAll('.prefgen-nine .prefgen-cell').length === 9")
    before = page.locator(".prefgen-cell img").first.get_attribute("alt")
    page.keyboard.press("l")
    page.wait_for_function("document.querySelector('.prefgen-rate header').textContent.includes('1 given')")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("d")
    page.wait_for_function("document.querySelector('.prefgen-rate header').textContent.includes('2 given')")
    assert sorted(verdicts(server, name)) == ["disliked", "liked"]
    assert before not in [each.get_attribute("alt") for each in page.locator(".prefgen-cell img").all()]
    page.keyboard.press(" ")
    page.wait_for_function("document.querySelectorAll('.prefgen-zoomed img').length === 1")
    page.keyboard.press(" ")
    page.keyboard.press("n")
    page.wait_for_function(f"!document.querySelector('.prefgen-rate').innerHTML.includes('{name} 11')")
    page.keyboard.press("Escape")


@one_renderer
def test_the_rate_view_never_goes_on_in_another_taste(page, server):
    """Another page renames or forgets the taste: the next one of the list opens, and keys went there."""
    fresh(page, "another")
    rate_view(page, server, "leaving", range(4200, 4204))
    there = asked(server, "tastes")["tastes"]
    page.evaluate(
        """fetch('/prefgen/tastes/leaving/rename', {
            method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{"name": "left"}'})"""
    )
    page.get_by_text("leaving isn't there any more: ").first.wait_for()
    page.get_by_text("leaving isn't open any more, so Rate was closed.").first.wait_for()
    assert page.locator(".prefgen-rate").count() == 0
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    now = asked(server, "tastes")["tastes"]
    assert sorted((each["liked"], each["disliked"]) for each in now) == sorted(
        (each["liked"], each["disliked"]) for each in there
    ), "nothing was rated"
    # What this page does itself is no news.
    page.locator(".prefgen-panel select").first.select_option("left")
    page.evaluate(
        "document.querySelectorAll('.p-toast-message, .p-toast-close-button').forEach((each) => each.click?.())"
    )
    page.evaluate("app.extensionManager.dialog.confirm = async () => true")
    said = page.get_by_text("left isn't there any more").count()
    page.locator(".prefgen-menu summary").click()
    page.get_by_role("menuitem", name="Forget this taste…").click()
    page.wait_for_selector(".prefgen-panel option[value='left']", state="detached")
    page.wait_for_timeout(300)
    assert said == page.get_by_text("left isn't there any more").count() == 0


@one_renderer
def test_keys_faster_than_the_server_go_to_one_picture_each_and_undo_takes_the_last_back(page, server):
    name = "fast"
    rate_view(page, server, name, range(4100, 4108))
    page.evaluate(
        """async () => {
            const {api} = await import("/scripts/api.js");
            const plain = api.fetchApi;
            api.fetchApi = async (address, ...rest) => {
                if (address.endsWith("/rate")) await new Promise((done) => setTimeout(done, 400));
                return plain.call(api, address, ...rest);
            };
        }"""
    )
    order = [page.locator(".prefgen-stage img").get_attribute("alt")]
    for key in ("ArrowRight", "ArrowLeft", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
        order.append(page.locator(".prefgen-stage img").get_attribute("alt"))
    page.keyboard.press("z")
    page.wait_for_function("document.querySelector('.prefgen-rate header').textContent.includes('4 given')")
    until(page, f"document.querySelector('.prefgen-stage img').alt === {json.dumps(order[3])}")
    assert len(set(order)) == 5
    rated = {each["file"]: each["verdict"] for each in asked(server, f"tastes/{name}")["pictures"]}
    assert rated == {order[0]: "liked", order[1]: "disliked", order[2]: "liked"}
    page.keyboard.press("Escape")


@one_renderer
def test_of_several_that_are_rated_each_gets_its_own_mark(page, server):
    name = "marks"
    for number in range(3):
        (server.output_dir / f"{name} {number}.png").write_bytes(picture(4200 + number))
    fresh(page, name)
    open_panel(page, name)
    shown = page.evaluate(
        """async (name) => {
            const {recent} = await import("/extensions/prefgen/taste/recent.js");
            const {rate} = await import("/extensions/prefgen/taste/tastes.js");
            const {rateNodes} = await import("/extensions/prefgen/taste/anywhere.js");
            const views = [0, 1, 2].map((n) => ({filename: `${name} ${n}.png`, subfolder: "", type: "output"}));
            await rate([views[0]], "liked", name);  // another page's, as far as this one knows
            const images = views.map((view) => ({src: "/view?" + new URLSearchParams(view)}));
            await rateNodes([{imgs: images}], "liked");
            await rateNodes([{imgs: [images[1]]}], "disliked");
            return views.map((view) => recent.verdicts().get(recent.key(view)));
        }""",
        name,
    )
    assert shown == ["liked", "disliked", "liked"]


@one_renderer
def test_a_taste_that_is_chosen_is_never_shown_with_the_last_one_s_pictures(page, server):
    """Its pictures come late, and those of the one before even later."""
    for name in ("late a", "late b"):
        fresh(page, name)
    open_panel(page, "late a")
    seen = page.evaluate(
        """async () => {
            const {tastes, choose, listen} = await import("/extensions/prefgen/taste/tastes.js");
            const {api} = await import("/scripts/api.js");
            const plain = api.fetchApi;
            const late = {"late%20a": 600, "late%20b": 200};
            api.fetchApi = async (address, ...rest) => {
                const wait = Object.entries(late).find(([name]) => address.endsWith(`tastes/${name}`));
                const answer = await plain.call(api, address, ...rest);
                if (wait) await new Promise((done) => setTimeout(done, wait[1]));
                return answer;
            };
            const seen = [];
            const stop = listen(() => seen.push([tastes.name, tastes.open?.name ?? ""]));
            await Promise.all([choose("late a"), choose("late b")]);
            await new Promise((done) => setTimeout(done, 900));
            stop();
            api.fetchApi = plain;
            return seen;
        }"""
    )
    assert seen[-1] == ["late b", "late b"] and all(open_ in ("", name) for name, open_ in seen)


@one_renderer
def test_the_menu_stays_open_and_focused_when_news_come_in(page, server):
    fresh(page, "news")
    open_panel(page, "news")
    page.locator(".prefgen-menu summary").click()
    page.get_by_role("menuitem", name="Copy…").focus()
    fresh(page, "more news")
    page.wait_for_selector(".prefgen-panel option[value='more news']", state="attached")
    assert page.get_by_role("menuitem", name="Copy…").is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Copy…"
    page.get_by_role("menuitem", name="Model files…").click()
    page.wait_for_selector(".prefgen-dialog")
    assert page.locator(".prefgen-menu[open]").count() == 0


@one_renderer
def test_a_taste_is_forgotten_that_was_asked_about_whichever_is_open_by_then(page, server):
    for name in ("kept", "gone"):
        fresh(page, name)
    open_panel(page, "gone")
    page.evaluate(
        """() => {
            window.answered = new Promise((resolve) => (window.answer = resolve));
            app.extensionManager.dialog.confirm = () => window.answered;
        }"""
    )
    page.locator(".prefgen-menu summary").click()
    page.get_by_role("menuitem", name="Forget this taste…").click()
    # Another page deletes it meanwhile, and this one opens what is left.
    page.evaluate("fetch('/prefgen/tastes/gone', {method: 'DELETE'})")
    page.wait_for_selector(".prefgen-panel option[value='gone']", state="detached")
    there = {taste["name"] for taste in asked(server, "tastes")["tastes"]}
    page.evaluate("window.answer(true)")
    page.get_by_text("There is no taste called gone").first.wait_for()
    assert {taste["name"] for taste in asked(server, "tastes")["tastes"]} == there >= {"kept"}


@one_renderer
def test_model_files_come_by_a_click_are_cancelled_and_go_on(page, server):
    server.hub.slow = 0.2
    open_models(page)
    row = page.locator("[data-set=ours]")
    assert not server.hub.asked, "nothing is fetched without a click"
    row.get_by_role("button").click()
    page.wait_for_function("Number(document.querySelector('[data-set=ours] progress')?.value) > 1e6", timeout=60_000)
    row.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("[data-set=ours] button:has-text('Go on')")
    server.hub.slow = 0
    row.get_by_role("button").click()
    page.wait_for_selector("[data-set=ours]:has-text('is there')", timeout=60_000)
    assert (server.base / "models" / "LLM" / "tiny" / "model.safetensors").read_bytes() == BIG
    assert [start > 0 for name, start in server.hub.asked if "weights" in name] == [False, True]
    page.keyboard.press("Escape")
    page.wait_for_selector(".prefgen-dialog", state="detached")


@one_renderer
def test_an_answer_that_comes_after_the_news_changes_nothing(page, server):
    """A small set is there before the click is answered: its row went on as if it were on its way."""
    shutil.rmtree(server.base / "models" / "LLM", ignore_errors=True)
    open_models(page)
    late = []
    page.route("**/prefgen/downloads/ours", lambda route: late.append((route, route.fetch())))
    row = page.locator("[data-set=ours]")
    row.get_by_role("button").click()
    page.wait_for_selector("[data-set=ours]:has-text('is there')", timeout=60_000)
    [(route, answer)] = late
    assert answer.json()["state"] in ("running", "done")
    route.fulfill(json=answer.json() | {"state": "running"})
    page.wait_for_timeout(500)
    assert row.get_by_role("button").count() == 0 and "is there" in row.inner_text()
    page.unroute("**/prefgen/downloads/ours")
    page.keyboard.press("Escape")
    page.wait_for_selector(".prefgen-dialog", state="detached")


def open_models(page) -> None:
    page.locator(HEART).first.click()
    page.locator(".prefgen-menu summary").click()
    page.get_by_role("menuitem", name="Model files…").click()
    page.wait_for_selector("[data-set=ours] button")


def test_a_run_that_fails_says_our_sentence_and_shows_the_node(page, server):
    page.evaluate(
        """async () => {
            const history = LiteGraph.createNode("PrefGen_LoadPreferenceHistory");
            const encode = LiteGraph.createNode("PrefGen_EncodePreferenceHistory");
            encode.pos = [3000, 3000];
            app.graph.add(history);
            app.graph.add(encode);
            const slot = encode.inputs.findIndex((input) => input.name === "liked");
            history.connect(0, encode, slot);
            await app.queuePrompt(0);
        }"""
    )
    fault = page.locator(".prefgen-fault")
    fault.wait_for(timeout=WAIT)
    assert "Nothing reads the history: connect an MLLM" in fault.inner_text()
    fault.get_by_role("button", name="Show node").click()
    assert page.evaluate("Object.values(app.canvas.selected_nodes)[0].type") == "PrefGen_EncodePreferenceHistory"
    offset = page.evaluate("[app.canvas.ds.offset[0], app.canvas.ds.offset[1]]")
    assert offset[0] < -1000 and offset[1] < -1000, "the canvas has moved to the node"
    fault.get_by_role("button", name="Close").click()
    assert fault.count() == 0


def test_the_panel_speaks_the_languages_of_the_front_end(chromium, server):
    set_up(server, {"Comfy.TutorialCompleted": True, "Comfy.Locale": "zh"})
    page = chromium.new_page()
    page.set_default_timeout(120_000)
    try:
        page.goto(server.address)
        page.wait_for_selector(HEART, timeout=120_000)
        page.locator(HEART).first.click()
        page.wait_for_selector(".prefgen-panel nav:has-text('词语')")
        assert "最近" in page.locator(".prefgen-panel nav").inner_text()
    finally:
        set_up(server, {"Comfy.Locale": "en"})
        page.close()


@one_renderer
def test_assets_come_in_by_their_tags_where_comfyui_has_them(page, server):
    name = "tags"
    fresh(page, name)
    open_panel(page, name)
    page.locator(".prefgen-menu summary").click()
    entry = page.get_by_role("menuitem", name="Import by tags of assets…")
    if not server.has_assets:
        assert entry.count() == 0
        return
    for number, tag in ((5000, "liked"), (5001, "rejected")):
        upload_asset(server, f"{number}.png", picture(number), tag)
    entry.click()
    page.locator("dialog").get_by_role("button", name="Import", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[2].textContent.includes('1')")
    assert sorted(verdicts(server, name)) == ["disliked", "liked"]


def upload_asset(server, name: str, data: bytes, tag: str) -> None:
    """As core's own front end uploads an asset: a form with tags, one of which says where it goes."""
    lines = [b"--x", b'Content-Disposition: form-data; name="tags"', b"", json.dumps(["input", tag]).encode()]
    lines += [b"--x", f'Content-Disposition: form-data; name="file"; filename="{name}"'.encode()]
    lines += [b"Content-Type: image/png", b"", data, b"--x--", b""]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{server.address}/api/assets", b"\r\n".join(lines), headers)
    urllib.request.urlopen(request, timeout=60).close()
