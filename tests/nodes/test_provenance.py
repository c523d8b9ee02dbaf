"""What a saved picture says of the taste and the user it was painted with: by real runs, through core's Save Image."""

import copy
import io
import json

import pytest
from PIL import Image

from prefgen.tastes.shelf import Shelf
from scripts import graph as graphs
from scripts import setup_env
from scripts.comfy_server import ROOT, ComfyServer
from tests.prefgen.tastes.test_taste import picture

APPLY = "PrefGen_ApplyUserCrossAttention"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(setup_env.find_comfyui(), tmp_path_factory.mktemp("provenance"), threads=2) as running:
        sea = Shelf(running.input_dir / "prefgen").new("sea")
        for number in range(4):
            sea.rate(picture(number, "PNG"), "liked" if number < 3 else "disliked", f"{number}.png")
        yield running


@pytest.fixture(scope="module")
def graph(server):
    with server.client() as client:
        template = graphs.to_api(graphs.load(ROOT / "workflows" / "prefgen_atelier.json"), client.object_info())
    small = graphs.only(template, [graphs.find(template, "SaveImage", "Save with preference")])
    sampler = graphs.find(small, "KSampler")
    small[sampler]["inputs"]["steps"] = 2
    small[graphs.find(small, "PrefGen_LoadPreferenceHistory")]["inputs"]["history"] = "sea"
    return small


def metadata(server, graph) -> dict | None:
    """What the saved picture of a run says: its text `prefgen`."""
    with server.client() as client:
        (entry,) = (entry for saved in client.run(graph).values() for entry in saved)
        text = Image.open(io.BytesIO(client.picture(entry))).text
    assert json.loads(text["prompt"]).keys() == graph.keys()
    return json.loads(text["prefgen"]) if "prefgen" in text else None


@pytest.mark.slow
def test_a_saved_picture_says_taste_revision_user_adapter_and_weight(server, graph):
    revision = Shelf(server.input_dir / "prefgen").taste("sea").revision()
    node = graphs.find(graph, APPLY)
    said = metadata(server, graph)
    assert said == {
        node: {
            "taste": f"sea@{revision}",
            "user": said[node]["user"],
            "adapter": "adapter.safetensors",
            "weight": 1.0,
        }
    }
    assert len(said[node]["user"]) == 8
    # All but the saver is answered from ComfyUI's cache now.
    again = copy.deepcopy(graph)
    again[graphs.find(again, "SaveImage")]["inputs"]["filename_prefix"] = "again"
    assert metadata(server, again) == said
    # And all but the sampler, which knows nothing of it.
    again[graphs.find(again, "KSampler")]["inputs"]["seed"] = 5
    assert metadata(server, again) == said
    again[node]["inputs"]["weight"] = 0.0
    assert metadata(server, again) == {}
    again[node]["inputs"]["weight"] = 1.0
    Shelf(server.input_dir / "prefgen").taste("sea").rate(picture(9, "PNG"), "liked", "9.png")
    newer = metadata(server, again)
    assert newer[node]["user"] != said[node]["user"] and newer[node]["taste"].startswith("sea@")
    assert newer[node]["taste"] != said[node]["taste"]
    frozen = copy.deepcopy(again)
    frozen[graphs.find(frozen, "PrefGen_LoadPreferenceHistory")]["inputs"]["history"] = f"sea@{revision}"
    assert metadata(server, frozen)[node] == said[node]


@pytest.mark.slow
def test_apply_taste_and_a_blend_say_it_too_and_a_plain_graph_says_nothing(server, graph):
    node = graphs.find(graph, APPLY)
    blended = copy.deepcopy(graph)
    fuse = graphs.find(blended, "PrefGen_FuseUserVector")
    blended["900"] = {"class_type": "PrefGen_BlendUsers", "inputs": {"user_1": [fuse, 0], "weight_1": 1.0}}
    blended["900"]["inputs"] |= {"user_2": [fuse, 0], "weight_2": 3.0}
    blended[node]["inputs"]["user"] = ["900", 0]
    taste = metadata(server, blended)[node]["taste"]
    assert taste.startswith("0.25 sea@") and " + 0.75 sea@" in taste
    simple = copy.deepcopy(graph)
    model = simple[node]["inputs"]["model"]
    simple[node] = {
        "class_type": "PrefGen_ApplyTaste",
        "inputs": {"model": model, "taste": "example: ada", "strength": 0.5},
    }
    simple = graphs.only(simple, [graphs.find(simple, "SaveImage")])
    said = metadata(server, simple)[node]
    assert said["taste"] == "example: ada" and said["weight"] == 0.5 and len(said["user"]) == 8
    simple[graphs.find(simple, "KSampler")]["inputs"]["model"] = model
    assert metadata(server, graphs.only(simple, [graphs.find(simple, "SaveImage")])) is None


def test_what_is_queued_keeps_what_it_brings_and_gets_an_id_of_its_own(pack):
    on_prompt = pack("prefgen.comfy.provenance").on_prompt
    graph = {"1": {"class_type": APPLY, "inputs": {"model": ["2", 0]}}, "2": {"class_type": "Load", "inputs": {}}}
    request = on_prompt({"prompt": graph, "extra_data": {"extra_pnginfo": {"workflow": {"id": 7}}}})
    assert request["extra_data"]["extra_pnginfo"] == {"workflow": {"id": 7}, "prefgen": {}}
    assert len(request["prompt_id"]) == 36
    assert on_prompt({"prompt": graph, "prompt_id": "mine"})["prompt_id"] == "mine"
    for other in ({"prompt": {"2": graph["2"]}}, {"prompt": None}, {}, {"prompt": {"1": None}}):
        assert "extra_pnginfo" not in on_prompt(dict(other)).get("extra_data", {})
    looped = {"1": {"class_type": APPLY, "inputs": {"model": ["1", 0]}}}
    assert on_prompt({"prompt": looped})["extra_data"]["extra_pnginfo"]["prefgen"] == {}


def test_a_signature_follows_all_that_feeds_a_node_and_nothing_else(pack):
    signature = pack("prefgen.comfy.provenance").signature
    graph = {
        "1": {"class_type": APPLY, "inputs": {"model": ["2", 0], "weight": 1.0}},
        "2": {"class_type": "Load", "inputs": {"name": "a"}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": 1}},
    }
    before = signature(graph, "1")
    graph["3"]["inputs"]["seed"] = 2
    assert signature(graph, "1") == before
    graph["2"]["inputs"]["name"] = "b"
    assert signature(graph, "1") != before
