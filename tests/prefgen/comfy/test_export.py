"""What training exports, in stock diffusers and in the node pack: the branch that was trained, in both."""

import sys

import pytest
import torch

from tests.closeness import assert_close
from tests.prefgen.comfy.tiny_models import Both
from tests.training import warm
from tests.training.tiny_bases import world
from training.common.user_branch import connect, install

WEIGHT = 1.0


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def exported(request, tmp_path_factory):
    """(family, file) of a run of two steps, by the real scripts."""
    world_ = world(tmp_path_factory.mktemp(request.param), request.param)
    options = ["--config", world_.config, "--runs", world_.runs, "--set", "train_user_attention.steps=2"]
    options += ["--set", "train_user_attention.batch=2"]
    for module, more in (
        ("train_alignment", []),
        ("train_user_attention", []),
        ("export", ["--out", world_.runs / "e.safetensors"]),
    ):
        ran = warm.run([sys.executable, "-m", f"training.{module}", *options, *more])
        assert ran.returncode == 0, ran.stderr[-2000:]
    return request.param, world_.runs / "e.safetensors"


def test_stock_diffusers_and_the_node_pack_add_what_was_trained(exported, pack):
    family, path = exported
    both, checks = Both(family), pack("prefgen.adapter_checks")
    adapter = pack("prefgen.adapter_file").load_adapter(path)
    checks.check_compatible(adapter.header, adapter.header.block_widths, {"sd15": 768, "sdxl": 2048}[family])
    vector = torch.randn(adapter.header.user_width, generator=torch.Generator().manual_seed(3))
    user = pack("prefgen.fusion").FusedUser(vector, adapter)
    in_comfyui = both.ours(pack("prefgen.comfy.patcher").apply_user(both.patcher, user, WEIGHT, apply_to="both"))
    vectors = torch.stack([vector, torch.zeros_like(vector)])
    in_diffusers = both.theirs(path, vectors[:, None], WEIGHT)
    plain = both.ours(both.patcher)

    # Training's own branch, on the same UNet.
    sampling = both.patcher.model.model_sampling
    sigma = sampling.sigmas[both.t].repeat(2)
    connect(install(both.unet, fused=True), adapter.keys_values(vectors))
    added = {"text_embeds": both.pooled, "time_ids": both.ids} if family == "sdxl" else None
    with torch.no_grad():
        scaled = sampling.calculate_input(sigma, both.x)
        noise = both.unet(scaled, torch.tensor([both.t] * 2), both.states, added_cond_kwargs=added).sample
    trained = sampling.calculate_denoised(sigma, noise, both.x)

    for half in range(2):
        assert_close(in_diffusers[half], trained[half], ulps=64, unlike=plain[half])
        assert_close(in_comfyui[half], trained[half], ulps=64, unlike=plain[half])
