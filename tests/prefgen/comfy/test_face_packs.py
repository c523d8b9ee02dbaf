"""Beside the real InstantID and PuLID packs: their own patch functions and attention, random identity weights.

What they find faces with (insightface, facexlib, OpenCV) isn't needed for the attention: where it isn't installed,
empty modules stand in.
"""

import importlib.abc
import importlib.machinery
import sys
import types

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tests.closeness import assert_far
from tests.neighbours import checkout, modules_of, why_not
from tests.prefgen import ip_adapter_files as files
from tests.prefgen.comfy.tiny_models import UNETS, Both, clip_vision

PACKS = {  # folder -> (module, its patch function, the name under which its attention knows its weights)
    "ComfyUI_InstantID": ("InstantID", "_set_model_patch_replace", "ipadapter"),
    "PuLID_ComfyUI": ("pulid", "set_model_patch_replace", "pulid"),
}
FACES = ("insightface", "facexlib", "cv2", "timm", "ftfy", "einops_exts", "xformers", "apex")
ADAPTER = {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter-plus_sdxl_vit-h"}
QUEUES, TOKENS = 5, 6


class StandIn(types.ModuleType):
    """A module of which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for what FACES names and isn't installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FACES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module", params=list(PACKS))
def face_pack(request):
    """(patch function, class of the identity's K and V, name of the weights) of a pack."""
    if checkout(request.param) is None:
        pytest.skip(why_not(request.param))
    module, function, weights = PACKS[request.param]
    finder, modules_before = StandIns(), set(sys.modules)
    sys.meta_path.append(finder)  # last, so that what is installed is found first
    try:
        (loaded,) = modules_of(request.param, module)
        yield getattr(loaded, function), loaded.To_KV, weights
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - modules_before:
            if isinstance(sys.modules[name], StandIn) or name.split(".")[0] == request.param:
                del sys.modules[name]


class Graph:
    def __init__(self, family, pack, face_pack, folder):
        self.patch, self.both = pack("prefgen.comfy.patcher"), Both(family)
        self.set_patch, to_kv, self.weights = face_pack
        self.blocks = list(self.patch.unet_blocks(self.both.patcher.get_model_object("diffusion_model")))
        cross = self.blocks[0][1].to_k.in_features
        random = torch.Generator().manual_seed(1)
        state = {
            f"{2 * i + 1}.{side}.weight": torch.randn(a.to_k.out_features, cross, generator=random) * cross**-0.5
            for i, (_, a) in enumerate(self.blocks)
            for side in ("to_k_ip", "to_v_ip")
        }
        self.identity = types.SimpleNamespace(ip_layers=to_kv(state))
        self.cond, self.uncond = torch.randn(2, 1, TOKENS, cross, generator=random)
        _, vision = clip_vision("CLIP ViT-H", folder)
        pictures = [torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        history = pack("prefgen.history").PreferenceHistory.from_images(pictures[:1], pictures[1:])
        with torch.no_grad():
            read = pack("prefgen.comfy.encoding").encode_history(history, None, vision)
        adapter = pack("prefgen.adapter_file").load_adapter(files.write(folder, ADAPTER[family]))
        self.user = pack("prefgen.fusion").fuse_user(adapter, read)

    def prefgen(self, model):
        return self.patch.apply_user(model, self.user, 0.7)

    def neighbour(self, model):
        """The pack's patches on every block, as its node puts them: SDXL by transformer, SD1.5 by block."""
        model = model.clone()
        for i, ((kind, number, index), _) in enumerate(self.blocks):
            arguments = {
                "cond": self.cond,
                "uncond": self.uncond,
                "weight": 0.8,
                "mask": None,
                self.weights: self.identity,
            }
            arguments |= {"sigma_start": 1e9, "sigma_end": 0.0, "module_key": str(2 * i + 1)}
            key = (kind, number, index) if self.both.family == "sdxl" else (kind, number)
            self.set_patch(model, arguments, key)
        return model


@pytest.fixture(scope="module", params=list(UNETS))
def graph(request, pack, face_pack, tmp_path_factory):
    return Graph(request.param, pack, face_pack, tmp_path_factory.mktemp(request.param))


def test_either_order_paints_bit_identical_latents_with_both_effects(graph):
    model = graph.both.patcher
    before = graph.both.latents(graph.prefgen(graph.neighbour(model)))
    assert torch.equal(before, graph.both.latents(graph.neighbour(graph.prefgen(model))))
    for alone in (model, graph.prefgen(model), graph.neighbour(model)):
        assert_far(graph.both.latents(alone), before)


def test_every_queue_paints_the_same_and_nothing_leaks(graph):
    model = graph.both.patcher
    plain, options = graph.both.latents(model), repr(model.model_options)
    for first, then in ((graph.neighbour, graph.prefgen), (graph.prefgen, graph.neighbour)):
        upstream = first(model)
        expected, alone = graph.both.latents(then(upstream)), graph.both.latents(upstream)
        for _ in range(QUEUES):
            patched = then(upstream)
            assert torch.equal(graph.both.latents(patched), expected)
            assert len(patched.get_wrappers(WrappersMP.APPLY_MODEL, graph.patch.KEY)) == 1
        assert torch.equal(graph.both.latents(upstream), alone)
    assert torch.equal(graph.both.latents(model), plain) and repr(model.model_options) == options
