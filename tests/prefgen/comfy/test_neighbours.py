"""Beside the real ComfyUI_IPAdapter_plus: the order of nodes is irrelevant, both effects are there, nothing leaks."""

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tests import neighbours
from tests.closeness import assert_far
from tests.prefgen import ip_adapter_files as files
from tests.prefgen.comfy.tiny_models import UNETS, Both, clip_vision

pytestmark = neighbours.needs(neighbours.IPADAPTER_PLUS)
OURS = {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter-plus_sdxl_vit-h"}
THEIRS = {"sd15": "ip-adapter_sd15", "sdxl": "ip-adapter_sdxl_vit-h"}
QUEUES = 5


@pytest.fixture(scope="module")
def ipadapter_plus():
    return neighbours.ipadapter_plus()


class Graph:
    """Both packs' nodes on one model, and what a sampler makes of them."""

    def __init__(self, family, pack, ipadapter_plus, folder):
        self.patch, self.nodes = pack("prefgen.comfy.patcher"), ipadapter_plus[0]
        self.both = Both(family)
        _, self.vision = clip_vision("CLIP ViT-H", folder, 224)  # their encoding knows no other size
        pictures = [torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        self.picture = pictures[3]
        self.ipadapter = ipadapter_plus[1].ipadapter_model_loader(str(files.write(folder, THEIRS[family], seed=1)))
        history = pack("prefgen.history").PreferenceHistory.from_images(pictures[:2], pictures[2:3])
        with torch.no_grad():
            read = pack("prefgen.comfy.encoding").encode_history(history, None, self.vision)
        adapter = pack("prefgen.adapter_file").load_adapter(files.write(folder, OURS[family]))
        self.user = pack("prefgen.fusion").fuse_user(adapter, read)

    def prefgen(self, model):
        return self.patch.apply_user(model, self.user, 0.7)

    def neighbour(self, model):
        execute = self.nodes.IPAdapterAdvanced().apply_ipadapter
        inputs = {"weight": 0.8, "weight_type": "linear", "image": self.picture, "clip_vision": self.vision}
        with torch.no_grad():
            return execute(model, self.ipadapter, **inputs)[0]


@pytest.fixture(scope="module", params=list(UNETS))
def graph(request, pack, ipadapter_plus, tmp_path_factory):
    return Graph(request.param, pack, ipadapter_plus, tmp_path_factory.mktemp(request.param))


def test_either_order_paints_bit_identical_latents_with_both_effects(graph):
    model = graph.both.patcher
    before = graph.both.latents(graph.prefgen(graph.neighbour(model)))
    after = graph.both.latents(graph.neighbour(graph.prefgen(model)))
    assert torch.equal(before, after)
    for alone in (model, graph.prefgen(model), graph.neighbour(model)):
        assert_far(graph.both.latents(alone), before)


def test_every_queue_paints_the_same_and_nothing_grows(graph):
    """The upstream model stays in ComfyUI's cache; the nodes behind it run again, and so does the sampler."""
    model = graph.both.patcher
    for first, then in ((graph.neighbour, graph.prefgen), (graph.prefgen, graph.neighbour)):
        upstream = first(model)
        expected, alone = graph.both.latents(then(upstream)), graph.both.latents(upstream)
        for _ in range(QUEUES):
            patched = then(upstream)
            assert torch.equal(graph.both.latents(patched), expected)
            assert len(patched.get_wrappers(WrappersMP.APPLY_MODEL, graph.patch.KEY)) == 1
        assert torch.equal(graph.both.latents(upstream), alone)


def test_two_of_each_in_any_order_add_up_to_the_same_picture(graph):
    """Their register and our wrapper both stack."""
    model = graph.both.patcher
    one = graph.both.latents(graph.prefgen(graph.neighbour(graph.prefgen(graph.neighbour(model)))))
    other = graph.both.latents(graph.neighbour(graph.neighbour(graph.prefgen(graph.prefgen(model)))))
    assert torch.equal(one, other)
    assert_far(one, graph.both.latents(graph.prefgen(graph.neighbour(model))))


def test_the_plain_model_is_untouched_by_all_of_it(graph):
    model = graph.both.patcher
    plain, options = graph.both.latents(model), repr(model.model_options)
    graph.both.latents(graph.prefgen(graph.neighbour(model)))
    assert torch.equal(graph.both.latents(model), plain) and repr(model.model_options) == options
