"""What the branch does in a whole sampling run, counted: host reads, projections, graph breaks, what stays behind."""

from functools import cached_property

import comfy.sample
import pytest
import torch
from comfy.ldm.modules import attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.closeness import SAMPLED, assert_close
from tests.prefgen import ip_adapter_files as files
from tests.prefgen.comfy.tiny_models import UNETS, Both, clip_vision

LAYOUT = {"sd15": "ip-adapter-plus_sd15", "sdxl": "ip-adapter_sdxl_vit-h"}
STEPS = 3
# Everything by which the host learns a value of a tensor, and so waits for the device.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "item"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}


class Counted(TorchDispatchMode):
    """Counts host reads, operations that touch any of the `watched` tensors, and matrix products among them."""

    def __init__(self, watched=()):
        super().__init__()
        self.watched = {tensor.untyped_storage().data_ptr() for tensor in watched}
        self.reads = self.touched = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.reads += name in READS
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() in self.watched for t in tensors):
            self.touched += 1
            self.products += name in PRODUCTS
        return function(*args, **(kwargs or {}))


class Graph:
    def __init__(self, family, pack, folder):
        self.patch = pack("prefgen.comfy.patcher")
        self.both = Both(family)
        _, vision = clip_vision("CLIP ViT-H", folder)
        pictures = [torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        history = pack("prefgen.history").PreferenceHistory.from_images(pictures[:2], pictures[2:])
        with torch.no_grad():
            read = pack("prefgen.comfy.encoding").encode_history(history, None, vision)
        self.adapter = pack("prefgen.adapter_file").load_adapter(files.write(folder, LAYOUT[family]))
        self.user = pack("prefgen.fusion").fuse_user(self.adapter, read)

    def applied(self, **options):
        return self.patch.apply_user(self.both.patcher, self.user, 0.7, **options)

    def sample(self, model, steps=STEPS, callback=None):
        pooled = {"pooled_output": self.both.pooled[:1]} if self.both.family == "sdxl" else {}
        conds = [[[self.both.states[i : i + 1], dict(pooled)]] for i in range(2)]
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        settings = {"disable_pbar": True, "seed": 0, "callback": callback}
        with torch.no_grad():
            return comfy.sample.sample(
                model, noise, steps, 4.0, "euler", "normal", *conds, torch.zeros_like(noise), **settings
            )

    @cached_property
    def plain_reads(self):
        """Host reads of one step of the plain model."""
        return self.counts(self.both.patcher)[0]

    def counts(self, model, steps=STEPS, watched=()):
        """(host reads of one step, operations on the watched tensors between the first step's end and the last's)."""
        seen = []
        with Counted(watched) as counted:
            self.sample(model, steps, lambda *_: seen.append((counted.reads, counted.touched)))
        reads = {after[0] - before[0] for before, after in zip(seen, seen[1:], strict=False)}
        assert len(reads) == 1, "every step is like every other"
        return reads.pop(), seen[-1][1] - seen[0][1]


@pytest.fixture(scope="module", params=list(UNETS))
def graph(request, pack, tmp_path_factory):
    return Graph(request.param, pack, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "options, reads",
    [
        ({}, 0),
        ({"apply_to": "both"}, 0),
        ({"attn_mask": torch.rand(1, 64, 64)}, 0),
        ({"start_at": 0.0, "end_at": 0.9}, 1),
        ({"weight_schedule": "0=1, 1=0.2"}, 1),
    ],
    ids=["always", "both halves", "mask", "start and end", "schedule"],
)
def test_a_model_call_reads_sigma_once_at_most_and_nothing_else(graph, options, reads):
    assert graph.counts(graph.applied(**options))[0] - graph.plain_reads == reads


@pytest.mark.parametrize("options", [{}, {"start_at": 0.1, "end_at": 0.9}, {"weight_schedule": "0=1, 1=0.2"}])
def test_a_whole_run_reads_nothing_else(graph, options):
    """Euler calls the model once a step: every read but those of the plain run is one of sigma."""
    model = graph.applied(**options)
    runs = []
    for each in (graph.both.patcher, model):
        with Counted() as counted:
            graph.sample(each)
        runs.append(counted.reads)
    assert runs[1] - runs[0] == (STEPS if options else 0)


def test_a_schedule_that_a_later_node_gives_the_model_is_asked_anew(graph):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    ends = {"end_at": 0.4}
    other = ModelSamplingDiscrete().patch(graph.both.patcher, "v_prediction", True)[0]
    before = graph.patch.apply_user(other, graph.user, 0.7, **ends)
    after = ModelSamplingDiscrete().patch(graph.applied(**ends), "v_prediction", True)[0]
    assert torch.equal(graph.sample(before), graph.sample(after))


def test_two_users_with_ends_share_one_read(graph):
    model = graph.patch.apply_user(graph.applied(end_at=0.9), graph.user, 0.5, end_at=0.8)
    assert graph.counts(model)[0] - graph.plain_reads == 1


def test_keys_and_values_are_projected_once_a_run_and_no_weight_is_touched_after_the_first_step(graph):
    projections = [*graph.adapter.to_k_ip, *graph.adapter.to_v_ip]
    weights = [*projections, *graph.adapter.projection.parameters()]
    assert len(projections) == 2 * len(files.WIDTHS[graph.both.family])
    for steps in (2, 5):
        with Counted(projections) as counted:
            graph.sample(graph.applied(), steps)
        assert counted.products == len(projections)
        assert graph.counts(graph.applied(), steps, weights)[1] == 0


def test_a_run_leaves_nothing_behind(graph):
    model = graph.applied(end_at=0.9)
    before = repr(model.model_options)
    graph.sample(model)
    assert repr(model.model_options) == before and graph.patch.KEY not in model.model_options["transformer_options"]


def compiled(graph, model):
    """(what it painted in two steps, graph breaks, graphs after two runs, graphs after three) of the compiled UNet."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    latents = graph.sample(model, 2)
    graph.sample(model, 5)
    early = counters["stats"]["unique_graphs"]
    graph.sample(model, 5)
    return latents, sum(counters["graph_break"].values()), early, counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_a_compiled_model_with_a_user_has_no_graph_breaks_and_does_not_compile_every_step(graph, pack, monkeypatch):
    # A card's attention. What ComfyUI takes on a CPU breaks the graph at each call, to ask psutil for free memory.
    for module in (attention, pack("prefgen.comfy.run")):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)
    options = {"weight_schedule": "0=1, 1=0.2"} if graph.both.family == "sd15" else {}
    try:
        latents, breaks, early, late = compiled(graph, graph.applied(**options))
    finally:
        torch._dynamo.reset()
    assert breaks == 0
    # With a schedule the weight is first taken for a constant, then for a number that changes.
    assert early == late <= (3 if options else 1)
    expected = graph.sample(graph.applied(**options), 2)
    assert_close(latents, expected, ulps=SAMPLED, unlike=graph.sample(graph.both.patcher, 2))
