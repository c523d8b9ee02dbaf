"""From a page that was just opened to the first picture in one's own taste: four acts, and no file manager."""

import pytest

from scripts.comfy_server import ROOT
from scripts.graph import load
from tests.web.conftest import HEART, set_up
from tests.web.test_panel import WAIT, drawn
from tests.web.test_taste import drop_on_node

pytestmark = pytest.mark.slow
TEMPLATE = "prefgen_atelier"
HISTORY = "PrefGen_LoadPreferenceHistory"


def test_four_acts_lead_to_the_first_picture_in_ones_own_taste(chromium, server):
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    # A first visit: ComfyUI opens its templates by itself.
    set_up(server, {"Comfy.TutorialCompleted": False, "Comfy.VueNodes.Enabled": False})
    acts = []
    try:
        page.goto(server.address)
        page.wait_for_selector(HEART)
        page.get_by_role("button", name="prefgen", exact=True).click()
        acts.append("click prefgen")
        page.locator(f"[data-testid='template-workflow-{TEMPLATE}']").first.click()
        acts.append("click the template")
        page.wait_for_function(f"app.graph._nodes.some((node) => node.comfyClass === '{HISTORY}')")
        # Newer front ends show the whole graph: how far away the node is, a frame later.
        page.wait_for_timeout(1000)
        drop_on_node(page, HISTORY, drawn(True, 6), share=0.2)
        acts.append("drop six pictures on the left half")
        page.wait_for_function(
            f"app.graph._nodes.some((node) => node.comfyClass === '{HISTORY}'"
            " && !node.widgets[0].value.startsWith('example: '))"
        )
        page.get_by_role("button", name="Run", exact=True).first.click()
        acts.append("click Run")
        page.wait_for_function(
            "Object.values(app.nodeOutputs ?? {}).filter((output) => output?.images?.length).length >= 2"
        )
    finally:
        set_up(server, {"Comfy.TutorialCompleted": True})
        context.close()
    assert len(acts) == 4 and len(load(ROOT / "workflows" / f"{TEMPLATE}.json")["nodes"]) > 0
