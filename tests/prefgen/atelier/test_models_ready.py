"""The shipped models as they come out of their loaders: with their weights, and not in training mode."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prefgen.atelier import captions, models
from prefgen.atelier.attributes import SUBJECTS
from prefgen.atelier.judge import load_judge
from prefgen.atelier.renderer import random_scene, render
from training.atelier.clip import image_features, text_features, tokenize

LOADERS = [models.load_clip, models.load_vae_diffusers, models.load_unet_diffusers, load_judge]


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_models_come_ready_to_read(load):
    model = load()
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("load", LOADERS[:3], ids=lambda load: load.__name__)
def test_random_ones_have_the_same_shapes_and_other_weights(load):
    shipped, random = load().state_dict(), load(random=True).state_dict()
    assert {k: v.shape for k, v in shipped.items()} == {k: v.shape for k, v in random.items()}
    matrices = [key for key, value in shipped.items() if value.ndim > 1 and "position_ids" not in key]
    assert matrices and not any(torch.equal(shipped[key], random[key]) for key in matrices)


def test_clip_knows_which_words_describe_a_picture():
    clip, tokenizer = models.load_clip(), models.clip_tokenizer()
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng, subject, "none") for subject in SUBJECTS for _ in range(2)]
    pictures = torch.stack([torch.from_numpy(render(scene)).movedim(-1, 0).float() / 127.5 - 1 for scene in scenes])
    texts = [captions.enriched(scene.subject, scene.prop, dict(scene.attributes), rng) for scene in scenes]
    with torch.inference_mode():
        seen = F.normalize(image_features(clip, pictures), dim=1)
        read = F.normalize(text_features(clip, tokenize(tokenizer, texts))[1], dim=1)
    right = (seen @ read.T).argmax(1) == torch.arange(len(scenes))
    assert right.float().mean() > 0.8


def test_the_noise_schedule_is_sd15s_brought_to_zero_terminal_snr():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    # Lin et al., arXiv 2305.08891, algorithm 1: shifted to end at zero, scaled to begin where it began.
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas = models.alphas_cumprod().numpy()
    np.testing.assert_allclose(alphas[:-1], root[:-1] ** 2, rtol=1e-9)
    assert 0 < alphas[-1] < 1e-6
