"""The pack's nodes in the browser: what counts for an adapter, and what a node says below itself."""

import pytest

from scripts import graph as graphs
from scripts.setup_env import ROOT
from tests.prefgen import ip_adapter_files

pytestmark = pytest.mark.slow

# What an artist can see of a node's inputs: the classic renderer asks the widget, Nodes 2.0 draws elements.
SHOWN = """() => {
    const node = app.graph._nodes[0];
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`);
    const names = ["semantic", "core", "image", "pooling", "push"];
    if (drawn) return names.filter((name) => drawn.textContent.includes(name));
    const seen = (widget) => !widget.hidden && !(widget.advanced && !node.showAdvanced);
    return names.filter((name) => node.widgets.some((widget) => widget.name === name && seen(widget)));
}"""


def choose(page, adapter: str) -> None:
    page.evaluate(
        """async (adapter) => {
            const combo = app.graph._nodes[0].widgets.find((widget) => widget.name === "adapter");
            combo.value = adapter;
            combo.callback?.(adapter);
            app.canvas.setDirty(true, true);
        }""",
        adapter,
    )


def test_fuse_shows_what_counts_for_the_chosen_adapter(page, server):
    folder = server.base / "models" / "ipadapter"
    # Made when the server started, so that an artist finds it.
    assert folder.is_dir() and (server.base / "models" / "prefgen").is_dir()
    assert (server.input_dir / "prefgen").is_dir()
    name = "ip-adapter_sd15"
    if not (folder / f"{name}.safetensors").exists():
        ip_adapter_files.write(folder, name)
    page.evaluate(
        """async () => {
            await app.refreshComboInNodes();
            const node = LiteGraph.createNode("PrefGen_FuseUserVector");
            node.pos = [300, 200];
            app.graph.add(node);
        }"""
    )
    page.wait_for_function(f"JSON.stringify(({SHOWN})()) === JSON.stringify(['semantic', 'core', 'image'])")
    if "Nodes 2.0" in page.evaluate("document.querySelector('[data-node-id]') ? 'Nodes 2.0' : ''"):
        return  # front end 1.32.9 draws there what was folded first until the page is loaded anew
    choose(page, f"ipadapter/{name}.safetensors")
    page.wait_for_function(f"JSON.stringify(({SHOWN})()) === JSON.stringify(['image', 'pooling', 'push'])")
    choose(page, "atelier")
    page.wait_for_function(f"JSON.stringify(({SHOWN})()) === JSON.stringify(['semantic', 'core', 'image'])")


def test_describe_runs_alone_and_its_words_stand_below_it(page):
    page.evaluate(
        """async () => {
            const [history, mllm, describe] = ["LoadPreferenceHistory", "LoadPreferenceMLLM", "DescribePreference"].map(
                (name, number) => {
                    const node = LiteGraph.createNode(`PrefGen_${name}`);
                    node.pos = [100 + 400 * number, 150];
                    app.graph.add(node);
                    return node;
                },
            );
            history.widgets.find((widget) => widget.name === "history").value = "example: ada";
            history.connect(0, describe, "liked");
            history.connect(1, describe, "disliked");
            mllm.connect(0, describe, "mllm");
            await app.queuePrompt(0);
        }"""
    )
    page.wait_for_selector(".prefgen-text:has-text('disliked: ')", timeout=120_000)
    assert "palette" in page.locator(".prefgen-text").inner_text()
    box = page.locator(".prefgen-text").bounding_box()
    assert box["height"] > 40 and box["width"] > 100


def test_a_template_opens_as_an_app_with_what_an_artist_changes(page):
    # Older front ends have the command, for a mode that takes nothing from a graph.
    version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__ ?? '0.0'")
    if tuple(map(int, version.split(".")[:2])) < (1, 40):
        pytest.skip("this front end has no App mode")
    page.evaluate("(graph) => app.loadGraphData(graph)", graphs.load(ROOT / "workflows" / "prefgen_atelier.json"))
    page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
    widgets = page.locator("[data-testid='linear-widgets']")
    for name in ("text", "history", "weight"):
        widgets.get_by_text(name, exact=True).first.wait_for()
