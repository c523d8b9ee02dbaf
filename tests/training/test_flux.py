"""A PrefGen adapter for Flux: trained on a tiny transformer, exported, and read by stock diffusers and by the pack."""

import sys

import diffusers
import pytest
import torch

from prefgen.adapter import FLUX
from prefgen.adapter_file import load_adapter
from prefgen.pipeline import put_on, user_embeds
from tests.closeness import assert_close
from tests.training.tiny_bases import world
from training import export, train_alignment, train_user_attention
from training.common.bases import BaseError, load_base, load_unet
from training.common.checkpoints import last_state
from training.common.config.command import ConfigError, load
from training.common.errors import exit_with_message
from training.common.flux import FlowSchedule
from training.common.user_branch import connect, install


def run(module, world_, patched, *more):
    """One stage on a world."""
    options = ["--config", world_.config, "--runs", world_.runs, "--set", "train_user_attention.steps=3", *more]
    patched.setattr(sys, "argv", [module.__name__, *map(str, options)])
    with exit_with_message():
        module.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A world whose branch was trained, and the file that artists load."""
    world_ = world(tmp_path_factory.mktemp("flux"), "flux")
    world_.file = world_.runs / "taste.safetensors"
    shown = ["--set", "train_user_attention.pictures_every=3"]
    with pytest.MonkeyPatch.context() as patched:
        run(train_alignment, world_, patched)
        run(train_user_attention, world_, patched, *shown)
        run(export, world_, patched, *shown, "--out", world_.file, "--dtype", "fp32")
    return world_


def test_the_branch_learns_and_shows_pictures(trained):
    state = last_state(trained.runs / "train_user_attention")
    for side in ("to_k_ip.1.weight", "to_v_ip.1.weight", "to_v_ip.1.bias", "projection.proj.weight"):
        assert state["model"][side].abs().max() > 0, side
    (samples,) = (trained.runs / "train_user_attention/samples").glob("users-*.png")
    assert samples.stat().st_size


def test_stock_diffusers_paints_with_the_file_what_training_saw(trained):
    adapter = load_adapter(trained.file)
    assert (adapter.header.base_family, adapter.header.tokens, len(adapter.to_k_ip)) == (FLUX, 4, 2)
    base = load_base(load(str(trained.config), []))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 16, 4, 6, generator=generator)
    vectors = torch.randn(2, adapter.header.user_width, generator=generator) * 3
    text, timesteps = base.encode_text(["a hill", "a boat"]), torch.tensor([200, 700])
    plain = base.predict(noisy, timesteps, text)
    branch = install(base.unet)
    with torch.no_grad():
        assert_close(base.predict(noisy, timesteps, text), plain)
        connect(branch, adapter.keys_values(vectors))
        ours = base.predict(noisy, timesteps, text)

        pipeline = diffusers.FluxPipeline.from_pretrained(trained.base)
        put_on(pipeline, trained.file)
        base.unet = pipeline.transformer
        original = base.unet.forward
        images = {"joint_attention_kwargs": {"ip_adapter_image_embeds": user_embeds(vectors, pipeline)}}
        base.unet.forward = lambda **kwargs: original(**kwargs, **images)
        theirs = base.predict(noisy, timesteps, text)
    assert_close(ours, theirs, unlike=plain)


def test_noise_levels_are_the_ones_of_rectified_flow():
    schedule = FlowSchedule()
    clean, noise = torch.randn(2, 3, 1, 4, 4)
    timesteps = torch.tensor([10, 500, 990])
    noisy, target = schedule.add_noise(clean, noise, timesteps)
    level = schedule.levels[timesteps][:, None, None, None]
    assert_close(noisy - level * target, clean)
    assert_close(schedule.levels.logit().mean(), 0.0, scale=1.0)
    assert 0.99 < schedule.levels.logit().std() < 1.01 and schedule.levels.diff().min() > 0


def test_the_configuration_for_flux_is_whole():
    config = load("flux_24gb", [])
    assert (config.base.family, config.base.nf4, config.train_user_attention.tokens) == ("flux", True, 16)
    for changes in (["train_user_attention.tokens=8"], ["train_user_attention.min_snr=5"]):
        with pytest.raises(ConfigError, match="tokens is 4 or 16"):
            load("flux_24gb", changes)


def in_4_bits(module):
    """The module with every linear layer as bitsandbytes' nf4, on the CPU: its kernels run there, while diffusers,
    which would put them in, asks for a card."""
    from bitsandbytes.nn import Linear4bit

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            bias = child.bias is not None
            small = Linear4bit(child.in_features, child.out_features, bias, torch.float32, quant_type="nf4")
            small.load_state_dict(child.state_dict())
            small.support_avx512bf16_for_cpu = False  # a CPU's own packing, for inference with wider layers
            setattr(module, name, small.to("cpu"))
        else:
            in_4_bits(child)
    return module


def test_the_branch_learns_beside_weights_in_4_bits(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    world_ = world(tmp_path, "flux")
    plain = diffusers.FluxTransformer2DModel.from_pretrained.__func__

    def loaded(cls, *arguments, quantization_config, **options):
        assert quantization_config.bnb_4bit_quant_type == "nf4"
        transformer, report = plain(cls, *arguments, **options)
        return in_4_bits(transformer), report

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    transformer = load_unet(load(str(world_.config), ["base.nf4=true"]))
    monkeypatch.undo()
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8
    monkeypatch.setattr(train_user_attention, "load_unet", lambda *_: transformer)
    run(train_alignment, world_, monkeypatch)
    run(train_user_attention, world_, monkeypatch)
    state = last_state(world_.runs / "train_user_attention")["model"]
    for side in ("to_k_ip.1.weight", "to_v_ip.1.weight"):
        assert state[side].abs().max() > 0, side


def test_4_bits_without_a_card_are_a_sentence(trained, one_sentence):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(BaseError) as refused:
        load_unet(load(str(trained.config), ["base.nf4=true"]))
    assert "set base.nf4=false" in one_sentence(refused)
