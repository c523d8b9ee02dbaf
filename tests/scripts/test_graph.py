"""Graphs as the front end saves them, turned into what the HTTP API runs."""

import pytest

from scripts import graph as graphs

OBJECT_INFO = {
    "Loader": {"input": {"required": {"name": [["a", "b"], {}]}}, "display_name": "Load"},
    "Patch": {"input": {"required": {"model": ["MODEL", {}], "weight": ["FLOAT", {}]}}},
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {}],
            },
            "optional": {"mask": ["MASK", {}], "mode": ["COMBO", {}], "strength": ["FLOAT", {"forceInput": True}]},
        }
    },
}


def saved_graph(patch_mode: int = 0) -> dict:
    return {
        "nodes": [
            {"id": 1, "type": "Loader", "widgets_values": ["b"], "inputs": [], "outputs": [{"type": "MODEL"}]},
            {
                "id": 2,
                "type": "Patch",
                "mode": patch_mode,
                "widgets_values": [0.5],
                "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
                "outputs": [{"type": "MODEL"}],
            },
            {
                "id": 3,
                "type": "Sampler",
                "title": "Mine",
                "widgets_values": [7, "fixed", 20, "fast"],
                "inputs": [
                    {"name": "model", "type": "MODEL", "link": 2},
                    {"name": "mask", "type": "MASK", "link": None},
                ],
                "outputs": [],
            },
            {"id": 4, "type": "MarkdownNote", "widgets_values": ["hello"], "inputs": [], "outputs": []},
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]],
    }


def test_widget_values_find_their_inputs_and_the_seed_control_is_left_out():
    graph = graphs.to_api(saved_graph(), OBJECT_INFO)
    assert graph["3"]["inputs"] == {"model": ["2", 0], "seed": 7, "steps": 20, "mode": "fast"}
    assert graph["3"]["_meta"] == {"title": "Mine"}
    assert graph["1"] == {"class_type": "Loader", "inputs": {"name": "b"}, "_meta": {"title": "Load"}}


def test_notes_are_not_sent():
    assert "4" not in graphs.to_api(saved_graph(), OBJECT_INFO)


def test_a_bypassed_node_is_seen_through():
    graph = graphs.to_api(saved_graph(graphs.BYPASSED), OBJECT_INFO)
    assert "2" not in graph and graph["3"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_feeds_nothing():
    graph = graphs.to_api(saved_graph(graphs.MUTED), OBJECT_INFO)
    assert "2" not in graph and "model" not in graph["3"]["inputs"]


def test_a_node_that_the_server_lacks_is_named():
    with pytest.raises(ValueError, match="Patch"):
        graphs.to_api(saved_graph(), {name: spec for name, spec in OBJECT_INFO.items() if name != "Patch"})


def test_cutting_a_graph_keeps_what_feeds_the_output_and_leaves_the_original_alone():
    graph = graphs.to_api(saved_graph(), OBJECT_INFO)
    cut = graphs.only(graph, ["2"])
    cut["2"]["inputs"]["weight"] = 9
    assert sorted(cut) == ["1", "2"] and graph["2"]["inputs"]["weight"] == 0.5


def test_finding_a_node_needs_exactly_one():
    graph = graphs.to_api(saved_graph(), OBJECT_INFO)
    assert graphs.find(graph, "Sampler", "Mine") == "3"
    with pytest.raises(ValueError, match="0 nodes Sampler"):
        graphs.find(graph, "Sampler", "Yours")


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="broken.json"):
        graphs.load(path)
