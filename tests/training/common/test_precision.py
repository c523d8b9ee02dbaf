"""Losses are computed in fp32 with autocast off, on whatever device, and no table of a device is fp64."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.prefgen import tiny_mllms
from tests.training import tiny_bases
from training import train_alignment, train_mllm, train_user_attention
from training.common.base import Base
from training.common.bases import load_base
from training.common.config.command import load
from training.common.errors import exit_with_message
from training.common.precision import full_precision
from training.data.preference_questions import NO, YES
from training.data.readers import Reader
from training.data.vqa import make as vqa
from training.data.worlds import DataSetWorld

HALF = (torch.bfloat16, torch.float16)
# Reductions that a loss is made of, by the names under which torch passes them to a mode.
REDUCTIONS = {
    "cross_entropy",
    "binary_cross_entropy_with_logits",
    "mse_loss",
    "l1_loss",
    "softplus",
    "normalize",
    "cosine_similarity",
    "logsumexp",
    "cdist",
}
TO_HALF = {"matmul", "mm", "addmm", "bmm", "baddbmm", "linear", "conv2d", "__matmul__", "einsum"}


class CudasCasts(TorchFunctionMode):
    """What AutocastCUDA does and AutocastCPU doesn't: products of matrices in bf16, and neither cross_entropy nor
    vector_norm brought back to fp32 (aten/src/ATen/autocast_mode.h). Where autocast is off it does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            if func.__name__ in TO_HALF:
                args = tuple(a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
            return func(*args, **kwargs)


class Watch(TorchFunctionMode):
    """Notes every reduction of a loss, whether autocast was on, and the least precision of its inputs."""

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = set(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in REDUCTIONS:
            self.seen.add(func.__name__)
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            half = [t.dtype for t in tensors if t.dtype in HALF]
            if half or torch.is_autocast_enabled("cpu"):
                self.wrong.append((func.__name__, half))
        return func(*args, **kwargs or {})


def halves(users=6, width=64):
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(users, width, generator=generator)
    return [own + 0.05 * torch.randn(users, width, generator=generator) for _ in range(2)]


LOSSES = {
    "identity": (lambda a, b: train_mllm.identity_loss(a, b), halves()),
    "answer": (lambda a: train_mllm.answer_loss(a, torch.arange(6)), [30 * halves()[0]]),
    "contrast": (lambda a: train_mllm.contrast_loss(a), [8 * halves()[0].flatten()]),
    "denoising": (lambda a, b: train_user_attention.squared_error(a, b).sum(), halves()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_fp32_under_the_autocast_of_cpu_and_of_cuda(name):
    loss, inputs = LOSSES[name]

    def value_and_gradients(*modes):
        tensors = [t.clone().requires_grad_() for t in inputs]
        for mode in modes:
            mode.__enter__()
        try:
            value = loss(*tensors)
        finally:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)
        return [value, *torch.autograd.grad(value, tensors)]

    plain = value_and_gradients()
    assert plain[0] > 0
    for modes in ([torch.autocast("cpu", torch.bfloat16)], [torch.autocast("cpu", torch.bfloat16), CudasCasts()]):
        for exact, actual in zip(plain, value_and_gradients(*modes), strict=True):
            assert actual.dtype == torch.float32 and torch.equal(exact, actual)


def test_the_imitation_of_cuda_shows_what_an_unguarded_identity_loss_would_lose():
    """The control: without the guard the loss is far off, as it is on a card."""
    a, b = halves()
    unguarded = train_mllm.identity_loss.__wrapped__
    with torch.autocast("cpu", torch.bfloat16), CudasCasts():
        wrong = unguarded(a, b).item()
    assert abs(wrong - train_mllm.identity_loss(a, b).item()) > 0.1 * train_mllm.identity_loss(a, b).item()


def test_half_precision_inputs_are_widened_and_double_ones_stay():
    @full_precision
    def total(values, scale):
        return (values * scale).sum()

    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        with torch.autocast("cpu", torch.bfloat16):
            assert total(torch.ones(3, dtype=dtype), scale=2).dtype == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    tiny_bases.write_data(folder / "agents")
    vqa.make(folder / "agents", folder / "vqa", 10, seed=0)
    tiny_mllms.write_folder(folder / "mllm", "LLaVA-OneVision")
    return folder


def run_stage(monkeypatch, stage, config, runs):
    monkeypatch.setattr(sys, "argv", [stage.__name__, "--config", str(config), "--runs", str(runs)])
    with exit_with_message(), Watch() as watch:
        stage.main()
    return watch


def test_train_mllm_in_bf16_computes_every_loss_in_fp32(folder, tmp_path, monkeypatch):
    config = tiny_bases.write_config(
        tmp_path / "run.yaml",
        "sd15",
        folder / "base",
        folder / "agents",
        data={"questions": str(folder / "vqa")},
        mllm={"path": str(folder / "mllm"), "precision": "bf16", "lora": {"rank": 2}},
        train_mllm={"steps": 1, "batch": 8, "users": 20, "pictures": 2, "contrast": 1.0, "others": 0.25},
    )
    watch = run_stage(monkeypatch, train_mllm, config, tmp_path / "runs")
    assert watch.seen >= {"cross_entropy", "softplus", "normalize", "binary_cross_entropy_with_logits"}
    assert watch.wrong == []


def test_alignment_and_the_branch_in_bf16_compute_every_loss_in_fp32(tmp_path, monkeypatch):
    world = tiny_bases.world(tmp_path, "sd15")
    short = {"steps": 1, "batch": 2, "users": 2, "ema": 0.9, "lr": 1e-3}
    changes = {"base": {"precision": "bf16"}, "train_alignment": {"steps": 1}, "train_user_attention": short}
    config = tiny_bases.write_config(tmp_path / "bf16.yaml", "sd15", world.base, world.data, **changes)
    for stage, reduction in ((train_alignment, "normalize"), (train_user_attention, "mse_loss")):
        watch = run_stage(monkeypatch, stage, config, world.runs)
        assert reduction in watch.seen and watch.wrong == []


def test_the_leaning_towards_a_word_is_exact_where_the_mllm_computes_in_bf16(folder):
    from prefgen.mllm.model import PreferenceMLLM

    reader = Reader(PreferenceMLLM.load(folder / "mllm", torch.bfloat16), DataSetWorld(folder / "agents"))
    head = reader.mllm.model.get_output_embeddings()
    states = 20 * torch.randn(5, head.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    first, second = (reader.answer_ids(answer)[0] for answer in (YES, NO))
    exact = states.double() @ (head.weight[first].double() - head.weight[second].double())
    with torch.autocast("cpu", torch.bfloat16):
        actual = reader.leaning(states, (YES, NO))
    assert actual.dtype == torch.float32
    assert torch.allclose(actual.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


class NoDoubles(TorchDispatchMode):
    """A device that refuses fp64, as MPS does: here it is `meta`, where a table can't hide on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, f"{func} makes fp64 on the device"
        return result


@pytest.mark.parametrize("family", ["atelier", "sd15"])
def test_no_table_of_a_base_is_fp64_on_its_device(family):
    with NoDoubles():
        if family == "atelier":
            base = load_base(load("atelier"), "meta")
        else:
            base = Base(family, None, None, [], DDIMScheduler(), 64, torch.float32, "meta")
        timesteps, latents = torch.zeros(2, dtype=torch.long, device="meta"), torch.zeros(2, 4, 8, 8, device="meta")
        noisy, target = base.schedule.add_noise(latents, latents, timesteps)
        assert noisy.dtype == target.dtype == torch.float32
        assert base.schedule.min_snr_weights(timesteps, 5.0).dtype == torch.float32
    on_the_device = [v for v in vars(base.schedule).values() if isinstance(v, torch.Tensor) and v.device.type == "meta"]
    assert on_the_device and all(v.dtype == torch.float32 for v in on_the_device)


def test_noise_and_weights_are_those_of_the_schedule_in_fp64():
    base = load_base(load("atelier"))
    alphas = base.schedule.alphas.double()
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    rng = np.random.default_rng(0)
    clean, noise = (torch.from_numpy(rng.standard_normal((5, 8, 4, 4))) for _ in range(2))
    signal, spread = ((a.sqrt())[timesteps][:, None, None, None] for a in (alphas, 1 - alphas))
    noisy, target = base.schedule.add_noise(clean.float(), noise.float(), timesteps)
    assert torch.allclose(noisy.double(), signal * clean + spread * noise, rtol=1e-5, atol=1e-6)
    assert torch.allclose(target.double(), signal * noise - spread * clean, rtol=1e-5, atol=1e-6)


def test_sizes_in_pixels_reach_sdxl_unrounded():
    base = SimpleNamespace(family="sdxl", pixels=1024, device=torch.device("cpu"), dtype=torch.bfloat16)
    text = SimpleNamespace(pooled=torch.zeros(1, 4))
    added = Base.added_conditions(base, text, torch.tensor([[1301, 1013, 3, 5]]))
    assert added["time_ids"].tolist() == [[1301, 1013, 3, 5, 1024, 1024]]


def test_normalize_under_autocast_is_watched():
    """The watch itself: it sees a reduction that autocast computes."""
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        F.normalize(torch.ones(2, 2))
    assert watch.wrong == [("normalize", [])]
