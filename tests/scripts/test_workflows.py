"""Every graph we ship: wired without loose ends, known to the real server, and run by it."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import graph as graphs
from scripts import setup_env
from scripts.comfy_server import ROOT, ComfyServer

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    base = tmp_path_factory.mktemp("workflows")
    # Without its cache ComfyUI runs every node each time, so that "twice" means twice.
    comfyui = setup_env.find_comfyui()
    with ComfyServer(comfyui, base, threads=2, arguments=["--cache-none"]) as server, server.client() as connected:
        yield connected


def test_there_is_a_graph_to_open():
    assert "prefgen_atelier.json" in [path.name for path in WORKFLOWS]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_wired_without_loose_ends(path):
    workflow = graphs.load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    assert max(nodes) <= workflow["last_node_id"]
    assert max(link[0] for link in workflow["links"]) <= workflow["last_link_id"]
    for number, origin, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][entry]["link"] == number
        assert nodes[origin]["outputs"][slot]["type"] == nodes[target]["inputs"][entry]["type"] == kind


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflows_sockets_and_widgets_are_those_of_the_server(path, client):
    info = client.object_info()
    for node in graphs.load(path)["nodes"]:
        if node["type"] in graphs.NOTES:
            continue
        schema = info[node["type"]]
        known = [name for group in ("required", "optional") for name in schema["input"].get(group, {})]
        assert [entry["name"] for entry in node["inputs"]] == known, node["type"]
        assert len(node["widgets_values"]) == len(graphs.widget_names(schema)), node["type"]
        assert [output["type"] for output in node["outputs"]] == schema["output"], node["type"]


@pytest.mark.slow
def test_the_template_browser_lists_the_graph(client):
    assert "prefgen_atelier" in client.get("/api/workflow_templates")["prefgen"]


@pytest.mark.slow
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_twice_to_the_same_pictures(path, client, first_run):
    graph, first = first_run(path)
    second = rendered(client, graph)
    assert first.keys() == second.keys() and first
    assert all((first[title] == second[title]).all() for title in first)


@pytest.mark.slow
def test_the_template_paints_another_picture_with_a_preference_and_the_plain_one_at_weight_zero(client, first_run):
    graph, pictures = first_run(ROOT / "workflows" / "prefgen_atelier.json")
    plain, leaning = pictures["Save without preference"], pictures["Save with preference"]
    assert np.abs(plain.astype(int) - leaning).mean() > 1
    output = graphs.find(graph, "SaveImage", "Save with preference")
    weightless = graphs.only(graph, [output])
    weightless[graphs.find(weightless, "PrefGen_ApplyUserCrossAttention")]["inputs"]["weight"] = 0.0
    assert (rendered(client, weightless)["Save with preference"] == plain).all()


@pytest.fixture(scope="module")
def first_run(client):
    """A function that gives a workflow's graph and its pictures, painted once for all tests."""

    @functools.cache
    def run(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
        graph = graphs.to_api(graphs.load(path), client.object_info())
        return graph, rendered(client, graph)

    return run


def rendered(client, graph: dict) -> dict[str, np.ndarray]:
    """Run a graph and return its saved pictures by the title of their node."""
    found = {}
    for node_id, entries in client.run(graph).items():
        if graph[node_id]["class_type"] == "SaveImage":
            data = client.picture(entries[0])
            found[graph[node_id]["_meta"]["title"]] = np.asarray(Image.open(io.BytesIO(data)))
    return found
