"""A taste in the browser: from the first drop to the last undo, by mouse and by keys alone."""

import base64
import json
import urllib.parse
import urllib.request

import pytest

from tests.prefgen.tastes.test_taste import picture
from tests.web.conftest import HEART

pytestmark = pytest.mark.slow

DROP = """async ([selector, files, share]) => {
    const target = document.querySelector(selector);
    const data = new DataTransfer();
    for (const [name, text] of files) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name));
    }
    const box = target.getBoundingClientRect();
    const place = {clientX: box.left + share * box.width, clientY: box.top + 5, bubbles: true, cancelable: true};
    target.dispatchEvent(new DragEvent("dragover", {dataTransfer: data, ...place}));
    target.dispatchEvent(new DragEvent("drop", {dataTransfer: data, ...place}));
}"""


def drop(page, selector: str, files: dict[str, bytes], share: float = 0.5) -> None:
    """Drop files at a share of an element's width."""
    packed = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    page.evaluate(DROP, [selector, packed, share])


# Where a node is drawn, whatever lies there: the canvas, or elements above it.
DROP_ON_NODE = """async ([kind, files, share]) => {
    const node = app.graph._nodes.find((node) => node.comfyClass === kind);
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const clientX = canvas.left + (node.pos[0] + share * node.size[0] + offset[0]) * scale;
    const clientY = canvas.top + (node.pos[1] + 0.25 * node.size[1] + offset[1]) * scale;
    const data = new DataTransfer();
    for (const [name, text] of files) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        data.items.add(new File([bytes], name));
    }
    const target = document.elementFromPoint(clientX, clientY);
    const place = {clientX, clientY, bubbles: true, cancelable: true, dataTransfer: data};
    target.dispatchEvent(new DragEvent("dragover", place));
    await new Promise(requestAnimationFrame);
    target.dispatchEvent(new DragEvent("drop", place));
}"""


def drop_on_node(page, kind: str, files: dict[str, bytes], share: float) -> None:
    """Drop files on a node, at a share of its width."""
    packed = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    page.evaluate(DROP_ON_NODE, [kind, packed, share])


def asked(server, path: str) -> dict:
    with urllib.request.urlopen(f"{server.address}/prefgen/{urllib.parse.quote(path)}", timeout=60) as response:
        return json.load(response)


def verdicts(server, name: str) -> list[str]:
    return [shown["verdict"] for shown in asked(server, f"tastes/{name}")["pictures"]]


def fresh(page, name: str) -> None:
    """A new, empty taste that is open in the panel."""
    page.evaluate("(name) => fetch('/prefgen/tastes', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
                  "body: JSON.stringify({name})})", name)  # fmt: skip
    page.evaluate("(name) => localStorage.setItem('prefgen.taste', name)", name)


def add_history_node(page, name: str) -> None:
    """A Load Preference History on the canvas that reads a taste."""
    page.evaluate(
        """async (name) => {
            await app.refreshComboInNodes();
            const node = LiteGraph.createNode("PrefGen_LoadPreferenceHistory");
            node.pos = [500, 200];
            app.graph.add(node);
            const combo = node.widgets.find((widget) => widget.name === "history");
            combo.value = name;
            combo.callback?.(name);
            app.canvas.setDirty(true, true);
        }""",
        name,
    )


def open_panel(page, name: str) -> None:
    page.locator(HEART).first.click()
    page.wait_for_selector(".prefgen-panel select")
    page.wait_for_selector(f".prefgen-panel option[value='{name}']", state="attached")
    page.select_option(".prefgen-panel select", name)
    page.wait_for_selector(f".prefgen-panel footer:has-text('{name}@')")


def tab(page, name: str) -> None:
    page.locator(f".prefgen-panel [data-key='tab {name.lower()}']").click()


def test_twelve_files_by_one_drop_then_a_flip_an_undo_and_a_redo(page, server, request):
    name = f"drop {request.node.callspec.id}"
    fresh(page, name)
    open_panel(page, name)
    forms = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
    files = {f"{n}.{forms[n % 6].lower()}": picture(n, forms[n % 6]) for n in range(12)} | {"notes.txt": b"no picture"}
    drop(page, ".prefgen-grid", files)
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[1].textContent.includes('12')")
    page.wait_for_selector("text=left out: notes.txt")
    assert verdicts(server, name) == ["liked"] * 12
    tab(page, "Liked")
    assert page.locator(".prefgen-grid figure img").count() == 12
    first = page.locator(".prefgen-grid figure").first
    first.focus()
    page.keyboard.press("d")
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[2].textContent.includes('1')")
    assert verdicts(server, name).count("disliked") == 1
    page.locator(".prefgen-panel").focus()
    page.keyboard.press("Control+z")
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[2].textContent.includes('0')")
    page.get_by_role("button", name="Redo (Ctrl+Shift+Z)").click()
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[2].textContent.includes('1')")
    assert verdicts(server, name).count("disliked") == 1
    page.reload()
    page.wait_for_selector(HEART, timeout=120_000)
    open_panel(page, name)
    assert "Liked 11" in page.locator(".prefgen-panel nav").inner_text()


def test_a_like_on_an_output_by_its_button_and_by_a_key(page, server, request):
    name = f"output {request.node.callspec.id}"
    (server.output_dir / f"{name}.png").write_bytes(picture(500))
    fresh(page, name)
    open_panel(page, name)
    tab(page, "Recent")
    figure = page.locator(f".prefgen-grid figure[title='{name}.png']")
    figure.hover()
    figure.get_by_role("button", name="Like", exact=True).click()
    page.wait_for_selector(f".prefgen-grid figure[title='{name}.png'][data-verdict=liked]")
    assert verdicts(server, name) == ["liked"]
    # The same picture on a node, and the key that dislikes it.
    page.evaluate(
        """async (file) => {
            const node = LiteGraph.createNode("PreviewImage");
            app.graph.add(node);
            const image = new Image();
            image.src = `/view?filename=${encodeURIComponent(file)}&type=output&subfolder=`;
            await image.decode();
            node.imgs = [image];
            app.canvas.selectNode(node, false);
            app.canvas.canvas.focus();
        }""",
        f"{name}.png",
    )
    page.evaluate("document.activeElement?.blur()")
    page.keyboard.press("Alt+d")
    page.wait_for_selector(f".prefgen-grid figure[title='{name}.png'][data-verdict=disliked]")
    assert verdicts(server, name) == ["disliked"]


def test_the_node_shows_its_pictures_and_its_halves_take_drops(page, server, request):
    name = f"node {request.node.callspec.id}"
    fresh(page, name)
    drop_first = {"first.png": picture(600)}
    open_panel(page, name)
    drop(page, ".prefgen-grid", drop_first)
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[1].textContent.includes('1')")
    add_history_node(page, name)
    page.wait_for_selector(".prefgen-node .prefgen-half[data-verdict=liked] img")
    drop(page, ".prefgen-node", {"no.png": picture(601)}, share=0.8)
    page.wait_for_selector(".prefgen-node .prefgen-half[data-verdict=disliked] img")
    drop(page, ".prefgen-node", {"yes.png": picture(602)}, share=0.2)
    page.wait_for_function(
        "document.querySelectorAll('.prefgen-node .prefgen-half[data-verdict=liked] img').length === 2"
    )
    assert sorted(verdicts(server, name)) == ["disliked", "liked", "liked"]
    assert not page.evaluate("app.graph._nodes.some((node) => node.type === 'LoadImage')"), "as core's drop would add"


def test_a_drop_on_a_node_too_small_to_show_its_halves_goes_to_the_half_that_it_hits(page, server, request):
    name = f"far {request.node.callspec.id}"
    fresh(page, name)
    add_history_node(page, name)
    page.evaluate("app.canvas.ds.changeScale(0.3, [640, 330]); app.canvas.setDirty(true, true)")
    page.wait_for_timeout(500)  # some frames
    for number, (share, expected) in enumerate(((0.2, ["liked"]), (0.8, ["disliked", "liked"]))):
        files = {f"{number}.png": picture(650 + number)}
        if page.locator(".prefgen-node").first.is_visible():  # Nodes 2.0 draws it at any size
            drop(page, ".prefgen-node", files, share)
        else:
            drop_on_node(page, "PrefGen_LoadPreferenceHistory", files, share)
        for _ in range(100):
            if len(verdicts(server, name)) == len(expected):
                break
            page.wait_for_timeout(100)
        assert sorted(verdicts(server, name)) == expected


def test_twenty_verdicts_by_keys_alone(page, server, request):
    name = f"rate {request.node.callspec.id}"
    for n in range(24):
        (server.output_dir / f"{name} {n:02}.png").write_bytes(picture(700 + n))
    fresh(page, name)
    open_panel(page, name)
    page.locator("[data-key=rate]").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".prefgen-rate img")
    for n in range(10):
        page.keyboard.press("ArrowRight" if n % 2 else "ArrowLeft")
        page.wait_for_function(
            "(n) => document.querySelector('.prefgen-rate header').textContent.includes(`${n} given`)", arg=n + 1
        )
    page.keyboard.press("p")
    page.wait_for_function("document.querySelectorAll('.prefgen-stage img').length === 2")
    for n in range(5):
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "(n) => document.querySelector('.prefgen-rate header').textContent.includes(`${n} given`)", arg=12 + 2 * n
        )
    assert len(verdicts(server, name)) == 20 and verdicts(server, name).count("liked") == 10
    page.keyboard.press("z")
    page.wait_for_function("document.querySelector('.prefgen-rate')")
    page.wait_for_timeout(500)
    assert len(verdicts(server, name)) == 19
    page.keyboard.press("Escape")
    assert page.locator(".prefgen-rate").count() == 0


def test_a_second_page_shows_what_the_first_one_did(page, server, chromium, request):
    name = f"two pages {request.node.callspec.id}"
    fresh(page, name)
    open_panel(page, name)
    other = chromium.new_page()
    other.goto(server.address)
    other.wait_for_function("window.app?.extensionManager && window.app.graph", timeout=120_000)
    other.evaluate(
        """async ([name, text]) => {
            const form = new FormData();
            form.append("verdict", "liked");
            form.append("file", new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]), "x.png");
            await fetch(`/prefgen/tastes/${encodeURIComponent(name)}/upload`, {method: "POST", body: form});
        }""",
        [name, base64.b64encode(picture(900)).decode()],
    )
    page.wait_for_function("document.querySelectorAll('.prefgen-panel [role=tab]')[1].textContent.includes('1')")
    other.close()


def test_a_fault_of_ours_is_said_in_our_words(page, server, request):
    page.evaluate(
        """() => {
            const sentence = "This adapter is for SDXL.";
            const node = {node_type: "PrefGen_FuseUserVector", node_id: "1", executed: [], prompt_id: ""};
            const detail = {...node, exception_message: sentence, exception_type: "ValueError", traceback: []};
            app.api.dispatchEvent(new CustomEvent("execution_error", {detail}));
        }"""
    )
    page.wait_for_selector("text=This adapter is for SDXL.")
