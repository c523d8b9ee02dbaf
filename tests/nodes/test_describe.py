"""Describe Preference with the atelier's own MLLM: what it says of the bundled users is what they like and dislike."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def mllm(pack):
    models = pack("prefgen.atelier.models")
    return pack("prefgen.comfy.memory").load_mllm(models.MLLM_FOLDER, "auto", "cpu")


@pytest.fixture(scope="module")
def described(pack, mllm):
    """(user, liked traits, disliked traits) of every bundled example user, as the node gives them."""
    world, histories = pack("prefgen.atelier.users"), pack("prefgen.comfy.histories")
    rows = []
    for number in world.EXAMPLE_USERS.values():
        liked, disliked = histories.load(number)[:2]
        output = pack("nodes").DescribePreference.execute(mllm=[mllm], liked=liked, disliked=disliked)
        positive, negative, document = output.args
        traits = json.loads(document)
        assert positive == ", ".join(traits["liked"]) and negative == ", ".join(traits["disliked"])
        rows.append((world.user(number), traits["liked"], traits["disliked"]))
    return rows


def test_every_trait_is_a_phrase_of_the_atelier_and_none_is_on_both_sides(described, pack):
    attributes = pack("prefgen.atelier.attributes").FAMILIES.values()
    phrases = {attribute.phrase for family in attributes for attribute in family}
    for _, liked, disliked in described:
        assert liked and disliked and not set(liked) & set(disliked)
        assert set(liked) | set(disliked) <= phrases


def test_what_is_said_is_true_far_more_often_than_by_chance(described, pack):
    families = pack("prefgen.atelier.attributes").FAMILIES.values()
    phrase = {(a.family, a.name): a.phrase for family in families for a in family}
    for side in ("liked", "disliked"):
        said = true = 0
        for person, *sides in described:
            pairs = [p for t in person.tastes for p in t.liked] if side == "liked" else person.disliked
            words = sides[0] if side == "liked" else sides[1]
            said, true = said + len(words), true + len({phrase[tuple(p)] for p in pairs} & set(words))
        assert true >= said / 3, f"{side}: {true} of {said}"  # chance is a tenth


def test_the_bar_is_full_with_the_last_picture_and_the_answer(pack, mllm, progress):
    liked, disliked = pack("prefgen.comfy.histories").load(0)[:2]
    progress.clear()
    pack("nodes").DescribePreference.execute(mllm=[mllm], liked=liked, disliked=disliked)
    count = len(liked) + len(disliked) + 1
    assert {total for _, total in progress} == {count} and max(done for done, _ in progress) == count


def test_typed_traits_take_the_place_of_the_mllms(pack, mllm, described):
    from prefgen.atelier.users import EXAMPLE_USERS

    liked, disliked = pack("prefgen.comfy.histories").load(next(iter(EXAMPLE_USERS.values())))[:2]
    describe = pack("nodes").DescribePreference.execute
    output = describe(mllm=[mllm], liked=liked, disliked=disliked, liked_traits=["boats"], disliked_traits=[""])
    assert output.args[0] == "boats" and output.args[1] == ", ".join(described[0][2])
    untouched = describe(mllm=[None], liked=liked, liked_traits=["boats"], disliked_traits=["noise"])
    assert untouched.args[:2] == ("boats", "noise")


def test_without_disliked_pictures_nothing_is_said_of_them(pack, mllm):
    from prefgen.atelier.users import EXAMPLE_USERS

    liked, _ = pack("prefgen.comfy.histories").load(next(iter(EXAMPLE_USERS.values())))[:2]
    output = pack("nodes").DescribePreference.execute(mllm=[mllm], liked=liked)
    assert output.args[0] and output.args[1] == ""


def test_words_for_all_that_there_are_pictures_of_leave_the_mllm_alone(pack, mllm, described):
    """It is neither run nor loaded: ComfyUI asks for an input that is lazy only if the node names it."""
    from prefgen.atelier.users import EXAMPLE_USERS

    liked, disliked = pack("prefgen.comfy.histories").load(next(iter(EXAMPLE_USERS.values())))[:2]
    node = pack("nodes").DescribePreference
    assert next(i for i in node.define_schema().inputs if i.id == "mllm").lazy
    cases = [
        ({"disliked": disliked, "liked_traits": ["boats"], "disliked_traits": ["noise"]}, ("boats", "noise")),
        ({"liked_traits": ["boats"]}, ("boats", "")),
        ({"disliked": [], "liked_traits": ["boats"], "disliked_traits": [""]}, ("boats", "")),
    ]
    for inputs, expected in cases:
        assert node.check_lazy_status(mllm=(None,), liked=liked, **inputs) == []
        assert node.execute(mllm=(None,), liked=liked, **inputs).args[:2] == expected
    for inputs in ({}, {"disliked": disliked, "liked_traits": ["boats"]}, {"disliked_traits": ["noise"]}):
        assert node.check_lazy_status(mllm=(None,), liked=liked, **inputs) == ["mllm"]


@pytest.mark.slow
def test_in_a_graph_the_words_reach_both_prompts(tmp_path):
    """Through the real server: described, joined to the prompt, painted with the plain model."""
    from scripts import graph as graphs
    from scripts import setup_env
    from scripts.comfy_server import ROOT, ComfyServer

    with ComfyServer(setup_env.find_comfyui(), tmp_path, threads=2) as server, server.client() as client:
        template = graphs.to_api(graphs.load(ROOT / "workflows" / "prefgen_atelier.json"), client.object_info())
        graph = graphs.only(template, [graphs.find(template, "SaveImage", "Save without preference")])
        for kind in ("PrefGen_LoadPreferenceHistory", "PrefGen_LoadPreferenceMLLM"):
            node = graphs.find(template, kind)
            graph[node] = template[node]
        history, mllm = (graphs.find(graph, f"PrefGen_LoadPreference{kind}") for kind in ("History", "MLLM"))
        inputs = {"mllm": [mllm, 0], "liked": [history, 0], "disliked": [history, 1]}
        graph["900"] = {"class_type": "PrefGen_DescribePreference", "inputs": inputs}
        graph["901"] = {"class_type": "PrefGen_EncodePreferenceHistory", "inputs": inputs}
        # Without a sampler: a history can be looked at alone.
        shown = {}
        for number in ("900", "901"):
            run = client.queue(graphs.only(graph, [number]))
            client.wait(run)
            shown |= client.history(run)["outputs"]
        assert "liked: " in shown["900"]["text"][0] and shown["901"]["images"]
        del graph["901"]
        sampler = graph[graphs.find(graph, "KSampler")]["inputs"]
        sampler["steps"] = 3
        for slot, side in enumerate(("positive", "negative")):
            text = graph[sampler[side][0]]["inputs"]
            joined = {"string_a": text["text"], "string_b": ["900", slot], "delimiter": ", "}
            graph[f"90{slot + 1}"] = {"class_type": "StringConcatenate", "inputs": joined}
            text["text"] = [f"90{slot + 1}", 0]
        saved = client.run(graph)
        # One that can't be loaded, which nobody notices as long as the words are typed.
        broken = server.base / "models" / "prefgen" / "mllm" / "broken"
        broken.mkdir(parents=True)
        (broken / "config.json").write_text("{}")
        graph[mllm]["inputs"]["mllm"] = "broken"
        del graph["900"]["inputs"]["disliked"]
        graph["900"]["inputs"]["liked_traits"] = "boats"
        typed = client.run(graph)
    assert any(saved.values()) and any(typed.values())


def test_several_where_one_is_meant_are_refused(pack, mllm, one_sentence):
    """A node before may give a list; the first of it would be taken and the others dropped without a word."""
    liked = [torch.rand(1, 32, 32, 3)]
    describe, encode = pack("nodes").DescribePreference, pack("nodes").EncodePreferenceHistory
    for run, name in (
        (lambda: describe.execute(mllm=[mllm, mllm], liked=liked), "mllm"),
        (lambda: describe.execute(mllm=[mllm], liked=liked, liked_traits=["a", "b"]), "liked_traits"),
        (lambda: encode.execute(mllm=[mllm, mllm], liked=liked), "mllm"),
        (lambda: encode.execute(mllm=[mllm], liked=liked, clip_vision=[None, None]), "clip_vision"),
    ):
        with pytest.raises(ValueError, match=f"The input {name} takes one value, but a list of 2") as raised:
            run()
        one_sentence(raised)
