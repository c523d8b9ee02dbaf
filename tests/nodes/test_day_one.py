"""The first day, through the real server: an IP-Adapter file, CLIP vision and pictures; no MLLM, nothing trained."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts import graph as graphs
from scripts import setup_env
from scripts.comfy_server import ROOT, ComfyServer, GraphError

pytestmark = pytest.mark.slow

ENCODE, FUSE, APPLY = (
    "PrefGen_EncodePreferenceHistory",
    "PrefGen_FuseUserVector",
    "PrefGen_ApplyUserCrossAttention",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(setup_env.find_comfyui(), tmp_path_factory.mktemp("day one"), threads=2) as running:
        folder = running.base / "models" / "ipadapter"
        folder.mkdir(parents=True, exist_ok=True)
        write_for_the_atelier(folder / "any name.safetensors")
        yield running


@pytest.fixture
def graph(server):
    """The shipped template without its MLLM, with a public adapter, and without the inputs that older graphs lack."""
    with server.client() as client:
        template = graphs.to_api(graphs.load(ROOT / "workflows" / "prefgen_atelier.json"), client.object_info())
    del template[graphs.find(template, ENCODE)]["inputs"]["mllm"]
    small = graphs.only(template, [graphs.find(template, "SaveImage", "Save with preference")])
    inputs(small, "KSampler")["steps"] = 3
    inputs(small, FUSE)["adapter"] = "ipadapter/any name.safetensors"
    for kind, names in ((FUSE, ("pooling", "push")), (APPLY, ("blocks", "block_weights", "weight_schedule"))):
        for name in names:
            del inputs(small, kind)[name]
    return small


def write_for_the_atelier(path):
    """The base layout in the atelier's widths, random weights."""
    from safetensors import safe_open

    from prefgen.atelier.models import CLIP_VISION_CONFIG, WEIGHTS, edition

    text, generator = edition().unet["cross_attention_dim"], torch.Generator().manual_seed(0)
    with safe_open(WEIGHTS / "adapter.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if key.startswith("ip_adapter.")}
    width = CLIP_VISION_CONFIG["projection_dim"]
    shapes |= {"image_proj.proj.weight": [4 * text, width], "image_proj.proj.bias": [4 * text]}
    tensors = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}
    save_file(tensors | {"image_proj.norm.weight": torch.ones(text), "image_proj.norm.bias": torch.zeros(text)}, path)


def inputs(graph, kind):
    return graph[graphs.find(graph, kind)]["inputs"]


def painted(server, graph):
    """The picture that a graph saves; Encode's preview is only temporary."""
    with server.client() as client:
        (entry,) = (e for entries in client.run(graph).values() for e in entries if e["type"] == "output")
        return np.asarray(Image.open(io.BytesIO(client.picture(entry)))).astype(int)


def refused(server, graph):
    with server.client() as client, pytest.raises(GraphError) as caught:
        client.run(graph)
    (sentence,) = caught.value.sentences
    return sentence


def test_pictures_alone_bend_the_picture_and_every_pooling_bends_it_otherwise(server, graph):
    seen = [painted(server, graph)]
    inputs(graph, APPLY)["weight"] = 0.0
    seen.append(painted(server, graph))
    inputs(graph, APPLY)["weight"] = 1.0
    for way in ("side by side", "least disliked", "negative"):
        inputs(graph, FUSE)["pooling"] = way
        seen.append(painted(server, graph))
    assert all(np.abs(one - other).mean() > 0.2 for i, one in enumerate(seen) for other in seen[:i])


def test_what_is_missing_or_mistyped_is_one_sentence_on_its_node(server, graph):
    vision = inputs(graph, ENCODE).pop("clip_vision")
    assert "connect an MLLM" in refused(server, graph)
    inputs(graph, ENCODE)["clip_vision"] = vision
    inputs(graph, APPLY)["block_weights"] = "in99=1"
    assert "this model has no block 'in99'" in refused(server, graph)
    inputs(graph, APPLY)["block_weights"] = ""
    inputs(graph, FUSE)["pooling"] = "average"
    assert "average" in refused(server, graph)
