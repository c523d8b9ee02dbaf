"""Bad input through the real server: one clear sentence on the node, the server lives on, the next good run works."""

import itertools
import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts import graph as graphs
from scripts import setup_env
from scripts.comfy_server import ROOT, ComfyServer, GraphError
from tests.prefgen import tiny_mllms

pytestmark = pytest.mark.slow

HISTORY, ENCODE = "PrefGen_LoadPreferenceHistory", "PrefGen_EncodePreferenceHistory"
LOAD = "PrefGen_LoadPreferenceMLLM"
FUSE, APPLY = "PrefGen_FuseUserVector", "PrefGen_ApplyUserCrossAttention"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(setup_env.find_comfyui(), tmp_path_factory.mktemp("bad input"), threads=2) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as connected:
        yield connected


@pytest.fixture
def graph(client):
    """The shipped template, cut down to the branch with a user, few steps."""
    template = graphs.to_api(graphs.load(ROOT / "workflows" / "prefgen_atelier.json"), client.object_info())
    small = graphs.only(template, [graphs.find(template, "SaveImage", "Save with preference")])
    inputs(small, "KSampler")["steps"] = 3
    return small


def inputs(graph, kind):
    return graph[graphs.find(graph, kind)]["inputs"]


def refused(client, graph) -> str:
    """The one sentence with which the graph fails; afterwards a good graph must run on the same server."""
    with pytest.raises(GraphError) as caught:
        client.run(graph)
    sentences = caught.value.sentences
    assert len(sentences) == 1, sentences
    assert "Traceback" not in sentences[0] and "\n" not in sentences[0].strip()
    return sentences[0]


SEEDS = itertools.count(1)


def works(client, graph) -> bool:
    """Whether the graph saves a picture; a new seed each time, since ComfyUI answers a known graph from its cache."""
    inputs(graph, "KSampler")["seed"] = next(SEEDS)
    return any(client.run(graph).values())


def picture(path, size=(40, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def histories(server):
    """input/prefgen of the server, emptied afterwards."""
    folder = server.input_dir / "prefgen"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("value", ["../../x", "/etc", "example: nobody", "", "example: ada/../../../x"])
def test_a_history_that_was_not_offered(client, graph, value):
    inputs(graph, HISTORY)["history"] = value
    assert "history" in refused(client, graph)
    inputs(graph, HISTORY)["history"] = "example: ada"
    assert works(client, graph)


@pytest.mark.parametrize(("kind", "name"), [(FUSE, "adapter"), (LOAD, "mllm")])
def test_a_file_that_was_not_offered(client, graph, kind, name):
    good = inputs(graph, kind)[name]
    inputs(graph, kind)[name] = "../../x"
    assert "../../x" in refused(client, graph)
    inputs(graph, kind)[name] = good
    assert works(client, graph)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no pictures in its `liked`"),
        (["liked/notes.txt", "disliked/notes.txt"], "no pictures in its `liked`"),
        (["disliked/a.png"], "no pictures in its `liked`"),
        (["liked/broken.png"], "broken.png"),
    ],
)
def test_a_history_folder_that_holds_no_history(client, graph, histories, files, message):
    (histories / "mine").mkdir()
    for name in files:
        if name == "disliked/a.png":
            picture(histories / "mine" / name)
        else:
            (histories / "mine" / name).parent.mkdir(exist_ok=True)
            (histories / "mine" / name).write_text("words, not pixels")
    inputs(graph, HISTORY)["history"] = "mine"
    assert message in refused(client, graph)
    shutil.rmtree(histories / "mine" / "disliked", ignore_errors=True)
    (histories / "mine" / "liked" / "broken.png").unlink(missing_ok=True)
    picture(histories / "mine" / "liked" / "good.png")
    assert works(client, graph)


def test_a_history_folder_that_goes_away_between_choosing_and_queueing(client, graph, histories):
    picture(histories / "gone" / "liked" / "a.png")
    client.object_info()
    shutil.rmtree(histories / "gone")
    inputs(graph, HISTORY)["history"] = "gone"
    assert "gone" in refused(client, graph)


def test_one_picture_forty_pictures_and_pictures_of_every_kind_are_read(client, graph, histories):
    picture(histories / "one" / "liked" / "a.png")
    for i in range(40):
        picture(histories / "forty" / ("liked" if i % 2 else "disliked") / f"{i:02d}.png", (30 + i, 70 - i))
    for name, size, mode in (
        ("grey.png", (64, 64), "L"),
        ("alpha.png", (64, 64), "RGBA"),
        ("dot.png", (1, 1), "RGB"),
        ("wide.png", (8000, 50), "RGB"),
        ("tall.png", (50, 8000), "RGB"),
    ):
        picture(histories / "odd" / "liked" / name, size, mode)
    for name in ("one", "forty", "odd"):
        inputs(graph, HISTORY)["history"] = name
        assert works(client, graph)


def test_a_picture_that_cannot_be_read_is_named_on_the_node_and_the_graph_runs_with_the_rest(client, graph, histories):
    picture(histories / "torn" / "liked" / "good.png")
    (histories / "torn" / "liked" / "bad.jpg").write_bytes(b"words, not pixels")
    inputs(graph, HISTORY)["history"] = "torn"
    inputs(graph, "KSampler")["seed"] = next(SEEDS)
    shown = []
    client.wait(client.queue(graph), on_event=lambda kind, data: kind == "progress_text" and shown.append(data))
    (said,) = shown
    assert said["node"] == graphs.find(graph, HISTORY)
    assert "bad.jpg in torn/liked" in said["text"] and "isn't a picture" in said["text"]


def test_no_liked_picture_is_connected(client, graph):
    del inputs(graph, ENCODE)["liked"]
    assert "liked" in refused(client, graph)


ADAPTER_DAMAGE = {
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:-1000]),
    "words": lambda path, _: path.write_text("not an adapter"),
    "pickle": lambda path, _: torch.save({"a": torch.ones(2)}, path),
    "lora": lambda path, _: save_file({"lora_unet.alpha": torch.ones(1)}, path),
    "nan": lambda path, good: save_file(
        load_file(good) | {"image_proj.norm.bias": torch.full((128,), float("nan"))}, path, metadata=header_of(good)
    ),
}


def header_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", ADAPTER_DAMAGE)
def test_an_adapter_that_is_none(client, server, graph, kind):
    from prefgen.atelier.models import WEIGHTS

    folder = server.base / "models" / "prefgen"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.safetensors"
    ADAPTER_DAMAGE[kind](path, WEIGHTS / "adapter.safetensors")
    inputs(graph, FUSE)["adapter"] = path.name
    assert path.name in refused(client, graph)
    shutil.copy(WEIGHTS / "adapter.safetensors", path)
    assert works(client, graph)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def code_of_its_own(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def half_downloaded(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def a_shard_is_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def another_kind(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


MLLM_DAMAGE = {
    without_weights: "has no weights",
    pickles_only: "only pickled weights",
    code_of_its_own: "asks to run code of its own",
    half_downloaded: "download it again",
    a_shard_is_missing: "lacks model-00002-of-00002.safetensors",
    without_tokenizer: "has no tokenizer.json",
    another_kind: "holds a llama",
}


@pytest.mark.parametrize("damage", MLLM_DAMAGE, ids=lambda damage: damage.__name__)
def test_an_mllm_folder_that_cannot_be_used(client, server, graph, damage):
    folder = server.base / "models" / "prefgen" / "mllm" / damage.__name__
    folder.mkdir(parents=True)
    tiny_mllms.write_folder(folder, "SmolVLM2")
    damage(folder)
    inputs(graph, LOAD)["mllm"] = folder.name
    sentence = refused(client, graph)
    assert MLLM_DAMAGE[damage] in sentence and folder.name in sentence
    assert not (folder / "ran").exists()
    inputs(graph, LOAD)["mllm"] = "atelier"
    assert works(client, graph)


def test_a_lora_for_another_mllm(client, server, graph):
    folder = server.base / "models" / "prefgen" / "mllm_lora" / "other"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "models/large-vlm"})
    )
    layer = "base_model.model.model.text_model.layers.30.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 4096), f"{layer}.lora_B.weight": torch.ones(4096, 2)},
        folder / "adapter_model.safetensors",
    )
    inputs(graph, LOAD)["lora"] = "other"
    assert "was made for another MLLM (large-vlm)" in refused(client, graph)
    inputs(graph, LOAD)["lora"] = "none"
    assert works(client, graph)


def test_a_mask_of_another_size(client, graph):
    graph["900"] = {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 333, "height": 77}}
    inputs(graph, APPLY)["attn_mask"] = ["900", 0]
    assert works(client, graph)


@pytest.mark.parametrize("phase", ["sampling", "encoding"])
def test_an_interrupt_stops_the_run_and_nothing_else(client, server, graph, histories, phase):
    if phase == "sampling":
        inputs(graph, "KSampler")["steps"] = 4000
    else:
        for i in range(60):
            picture(histories / "long" / ("liked" if i % 2 else "disliked") / f"{i:02d}.png", (1200, 1200))
        inputs(graph, HISTORY)["history"] = "long"
    waiting = graphs.find(graph, "KSampler" if phase == "sampling" else ENCODE)
    reached = threading.Event()

    def follow(kind, data):
        if kind == "executing" and data.get("node") == waiting:
            reached.set()

    def stop():
        assert reached.wait(900)
        time.sleep(0.3)
        with server.client() as other:
            other.interrupt()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(GraphError, match="(?i)interrupt"):  # a run that came to its end raises nothing
        client.wait(client.queue(graph), on_event=follow)
    stopper.join()
    inputs(graph, "KSampler")["steps"] = 3
    inputs(graph, HISTORY)["history"] = "example: bruno"
    assert works(client, graph)


def test_pictures_with_values_that_are_not_numbers(pack):
    """No core node makes such a picture, so the node is called itself."""
    encode = pack("nodes").EncodePreferenceHistory
    good = torch.rand(1, 16, 16, 3)
    with pytest.raises(ValueError, match="liked picture 2 holds values that are not numbers"):
        encode.execute(mllm=[None], liked=[good, good * float("nan")])
    with pytest.raises(ValueError, match="no liked pictures"):
        encode.execute(mllm=[None], liked=[], disliked=[good])
