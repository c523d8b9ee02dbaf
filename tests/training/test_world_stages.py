"""The second world's stages: each runs from nothing at a tiny size, and what they rest on holds."""

import json
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from prefgen.atelier import models
from prefgen.atelier.editions import SECOND
from prefgen.atelier.models import PREDICTION, alphas_cumprod
from prefgen.atelier.world.judge import Judge
from prefgen.atelier.world.labels import CLASSES, class_labels, scene_of, value_labels
from prefgen.atelier.world.models import as_read
from prefgen.atelier.world.prompts import phrases
from prefgen.atelier.world.render import render
from prefgen.atelier.world.scenes import random_scene
from prefgen.atelier.world.traits import CONTINUOUS, NAMED
from tests.closeness import assert_close
from tests.training import warm
from training.atelier.world import unet, vae
from training.atelier.world.captions import named_classes, random_caption
from training.atelier.world.obedience import heldout_requests
from training.atelier.world.people import People, make
from training.common.files import save_weights
from training.common.sampling import NoiseSchedule
from training.data.check import check
from training.data.trait_tokens import TRAITS, TraitTokens, random_said
from training.data.world_pool import WorldPool, as_tensor, pool_scene, prompt_of
from training.data.worlds import DataSetWorld

SIZES = {
    "tokenizers": [],
    "pool": ["count=48", "large=16", "processes=1"],
    "vae": ["steps=5", "batch=4", "heldout=2"],
    "vae_decoder": ["steps=3", "batch=2", "heldout=2"],
    "judge_a": ["steps=3", "batch=8", "heldout=40"],
    "judge_b": ["steps=3", "batch=8", "heldout=40"],
    "clip": ["steps=3", "batch=8"],
    "clip_vision": ["steps=3", "batch=8"],
    "mllm_vision": ["steps=3", "batch=8"],
    "captioning": ["steps=3", "batch=8"],
    "unet": ["steps=4", "batch=4", "pictures=2", "measure_every=3"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PREFGEN_ATELIER_WEIGHTS": str(folder / "weights")}
    for name, sizes in SIZES.items():
        options = [word for size in sizes for word in ("--set", f"atelier.world.{name}.{size}")]
        runs = [] if name == "tokenizers" else ["--runs", folder / "runs"]
        line = [sys.executable, "-m", f"training.atelier.world.{name}", *options, *runs]
        ran = warm.run(line, env=environment)
        assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_every_stage_leaves_weights_and_figures(trained):
    weights = {path.stem for path in (trained / "weights").glob("*.safetensors")}
    assert weights == {"vae", "judge_a", "judge_b", "clip", "unet", "trait_tokens"}
    for name in ("vae", "vae_decoder", "judge_a", "clip", "clip_vision", "unet"):
        assert json.loads((trained / f"runs/atelier.world.{name}/done").read_text())
        assert (trained / f"runs/atelier.world.{name}/log.jsonl").read_text()
    obeyed = json.loads((trained / "runs/atelier.world.unet/done").read_text())
    assert {"subject", "number", "setting", "companion", "trait tokens"} <= set(obeyed)
    stored = load_file(trained / "weights/unet.safetensors")
    in_eight_bits = any(value.dtype == torch.int8 for value in stored.values())
    assert in_eight_bits == (obeyed["int8_psnr"] >= unet.INT8_PSNR)


def test_every_picture_has_noise_of_its_own_strength_in_units_of_its_channels():
    torch.manual_seed(0)
    latents = torch.randn(64, 8, 16, 16) * torch.arange(1, 9)[:, None, None]
    added = (vae.disturbed(latents, 0.25) - latents).std((2, 3)) / torch.arange(1, 9)
    # 256 cells of a channel say its strength to a twentieth.
    assert (added.std(1) < 0.1 * added.mean(1)).all()
    assert added.mean(1).min() < 0.05 and 0.2 < added.mean(1).max() < 0.27
    assert torch.equal(vae.disturbed(latents, 0), latents)


@pytest.mark.slow
def test_a_vae_that_loses_what_pictures_show_ends_the_night_in_a_sentence(trained):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PREFGEN_ATELIER_WEIGHTS": str(trained / "weights")}
    line = [sys.executable, "-m", "training.atelier.world.gate_vae", "--runs", trained / "runs"]
    ran = warm.run([*line, "--set", "atelier.world.vae.heldout=20"], env=environment)
    assert ran.returncode == 1 and "The VAE loses what pictures show: psnr " in ran.stderr
    measured = json.loads((trained / "runs/gate_vae.json").read_text())
    assert measured["there"]["renders"] == measured["there_and_back"]["renders"] == 20


@pytest.mark.slow
def test_the_pool_is_what_its_scenes_show_and_holds_no_pair_of_the_tests(trained):
    pool = WorldPool(trained / "runs")
    for i in (0, 17, 40):
        scene = pool_scene(0, i)
        assert pool.classes[i].tolist() == class_labels(scene)
        drawn = as_tensor(render(scene)[None])
        # Averaged in whole numbers there, in floats here.
        assert (as_read(drawn) - pool.batch(slice(i, i + 1))).abs().max() <= 1.01 / 127.5
    assert np.array_equal(pool.large[5], render(pool_scene(0, 5)))
    assert not any(prompt_of(pool_scene(0, i)).heldout for i in range(300))
    assert all(request.prompt.heldout for request in heldout_requests(20))


def test_a_scene_comes_back_from_its_labels():
    for n in range(20):
        scene = random_scene(np.random.default_rng(n))
        back = scene_of(class_labels(scene), value_labels(scene))
        assert back.with_traits(seed=scene.seed).named == scene.named and back.subject == scene.subject
        assert_close(torch.tensor(back.values), torch.tensor(scene.values))


def test_latents_get_unit_variance_and_pictures_stay():
    torch.manual_seed(0)
    model = AutoencoderKL(**SECOND.vae).eval()
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        before = model.decode(model.encode(pictures).latent_dist.mean).sample
        variances = model.encode(pictures).latent_dist.logvar
    mean, std = vae.channel_statistics(model, pictures)
    assert (std - 1).abs().max() > 0.1
    vae.fold_scale(model, mean, std)
    with torch.inference_mode():
        posterior = model.encode(pictures).latent_dist
        assert_close(model.decode(posterior.mean).sample, before)
    folded_mean, folded_std = vae.channel_statistics(model, pictures)
    assert folded_mean.abs().max() < 1e-3 and (folded_std - 1).abs().max() < 1e-3
    assert_close(posterior.logvar + 2 * std.log()[:, None, None], variances)


def test_a_judge_reads_pictures_of_any_size_the_same():
    torch.manual_seed(0)
    judge = Judge(8).eval()
    scene = random_scene(np.random.default_rng(3))
    picture = as_tensor(render(scene)[None])
    for one, other in zip(judge.read(picture), judge.read(as_read(picture)), strict=True):
        assert one.scene == other.scene and one.errors == other.errors
    assert set(CLASSES["subject"]) >= {judge.read(picture)[0].scene.subject}


def test_shifted_timesteps_are_noisier_by_the_shift():
    schedule = NoiseSchedule(alphas_cumprod(), PREDICTION)
    shifted = unet.shifted_timesteps(schedule)
    assert (shifted >= torch.arange(1000)).all() and (shifted.diff() >= 0).all()
    ratios = schedule.snr.log()
    inside = torch.arange(10, 850)
    # One timestep is the finest there is: at most 0.2 of a unit apart there.
    assert (ratios[inside] - ratios[shifted[inside]] - unet.SHIFT).abs().max() < 0.2
    torch.manual_seed(0)
    assert unet.random_timesteps(shifted, 500, fine=True).max() < unet.FINE


def test_trait_tokens_hear_what_is_said_and_nothing_else():
    torch.manual_seed(0)
    module = TraitTokens(32)
    scenes = [random_scene(np.random.default_rng(n)) for n in range(6)]
    classes = torch.tensor([class_labels(scene) for scene in scenes])
    values = torch.tensor([value_labels(scene) for scene in scenes])
    nothing = module(classes, values, torch.zeros(6, TRAITS, dtype=torch.bool))
    assert_close(nothing, nothing[:1].expand_as(nothing))
    said = torch.zeros(6, TRAITS, dtype=torch.bool)
    said[:, len(CLASSES) + list(CONTINUOUS).index("tilt")] = True
    tilt = list(CONTINUOUS).index("tilt")
    same_tilt = values.clone()
    same_tilt[:, tilt] = 0.25
    assert_close(module(classes, same_tilt, said), module(classes[:1], same_tilt[:1], said[:1]).expand(6, -1, -1))
    assert (module(classes, values, said)[0] - module(classes, same_tilt, said)[0]).abs().max() > 1e-3
    seen = torch.rand(200, len(CONTINUOUS)) < 0.5
    drawn = random_said(seen, torch.full((200,), 0.5))
    assert not (drawn[:, len(CLASSES) :] & ~seen).any() and 0.4 < drawn[:, : len(CLASSES)].float().mean() < 0.6
    assert random_said(seen, torch.ones(200))[:, len(CLASSES) :].equal(seen)


def test_captions_name_what_they_say():
    rng = np.random.default_rng(0)
    for n in range(200):
        scene = random_scene(np.random.default_rng(n))
        bare = random_caption(scene, rng, neutral=0.0, bare=1.0)
        assert bare.text and not bare.names & {"subject", "number", "setting", "companion"}
        neutral = random_caption(scene, rng, neutral=1.0)
        assert ", " not in neutral.text
        complete = random_caption(scene, rng, neutral=0.0)
        look = phrases(scene)
        assert sorted(complete.text.split(", ")[1:]) == sorted(look[name] for name in complete.names if name in look)
    assert not named_classes([neutral])[0, list(CLASSES).index("palette")]


def test_the_worlds_users_are_a_data_set_whose_users_like_what_they_say(tmp_path):
    make(People(users=5, seed=1, shard_users=3), tmp_path / "people", processes=1)
    assert not [fault for _, faults in check(tmp_path / "people") for fault in faults]
    world = DataSetWorld(tmp_path / "people")
    likes = Counter()
    for user in world.users("train"):
        wanted = {world.attributes[a] for a in world.tastes(user)[0]}
        avoided = {world.attributes[a] for a in world.dislikes(user)}
        history = world.history(user, np.random.default_rng(0), 12, 8)
        shown = [set(world.index["attributes"][int(i)].as_py()) for i in history.pictures]
        liked = [one for one, like in zip(shown, history.liked, strict=True) if like]
        likes["shown"] += sum(len(wanted & one) for one in liked)
        likes["asked"] += len(wanted) * len(liked)
        target = world.target(user, np.random.default_rng(1))
        said = set(target.enriched.split(", ")) - {target.prompt}
        assert said in [{world.phrase(a) for a in taste} for taste in world.tastes(user)]
        assert not any(avoided & one & {a for a in avoided if a.split("/")[0] in NAMED} for one in liked)
    # Favourites and company show only where a prompt leaves them open.
    assert likes["shown"] / likes["asked"] > 0.5


def test_weights_come_back_from_int8_within_half_a_step(tmp_path, monkeypatch):
    torch.manual_seed(0)
    weights = {
        "kernel": torch.randn(8, 4, 3, 3) * torch.logspace(-1.5, 2, 8)[:, None, None, None],
        "bias": torch.randn(8),
    }
    weights["nothing"] = torch.zeros(3, 5)
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    save_weights(models.as_int8(weights), tmp_path / "unet.safetensors")
    back = models.load_weights("unet")
    assert set(back) == set(weights) and not back["nothing"].any()
    steps = weights["kernel"].flatten(1).abs().amax(1) / 127
    # A scale is an fp16 number, known to 1 part in 2,000: it moves the largest weight by a sixteenth of a step.
    assert ((back["kernel"] - weights["kernel"]).flatten(1).abs().amax(1) <= 0.57 * steps).all()
    assert_close(back["bias"], weights["bias"].half().float())
    assert (tmp_path / "unet.safetensors").stat().st_size < 1000
