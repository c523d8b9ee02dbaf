"""The atelier in ComfyUI's own classes equals the atelier in diffusers and transformers."""

import pytest
import torch

from tests.closeness import assert_close
from training.atelier.clip import image_features, text_features, tokenize


@pytest.fixture(scope="module")
def atelier(pack):
    return pack("prefgen.comfy.atelier_models")


@pytest.fixture(scope="module")
def models(atelier):
    return atelier.models


def test_one_noise_prediction_of_the_unet_is_the_same(atelier, models):
    theirs = models.load_unet_diffusers()
    ours = atelier.build_unet(models.load_weights("unet"), 1.0).model.diffusion_model
    torch.manual_seed(0)
    size, channels = models.edition().unet["sample_size"], models.edition().unet["in_channels"]
    x = torch.randn(3, channels, size, size)
    t, states = torch.tensor([1.0, 400.0, 999.0]), torch.randn(3, 48, models.edition().unet["cross_attention_dim"])
    with torch.no_grad():
        assert_close(ours(x, t, states), theirs(x, t, states).sample)


def test_unet_and_vae_of_the_second_edition_are_the_same(atelier, models, tmp_path, monkeypatch):
    (tmp_path / "edition.json").write_text('{"edition": "second"}')
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    torch.manual_seed(0)
    unet, vae = models.load_unet_diffusers(random=True), models.load_vae_diffusers(random=True)
    x, t, states = torch.randn(1, 8, 32, 32), torch.tensor([400.0]), torch.randn(1, 64, 128)
    picture = torch.rand(1, 256, 256, 3)
    with torch.no_grad():
        assert_close(
            atelier.build_unet(unet.state_dict(), 1.0).model.diffusion_model(x, t, states), unet(x, t, states)[0]
        )
        latents = vae.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mean
    assert_close(atelier.build_vae(vae.state_dict()).encode(picture), latents)


def test_the_vae_encodes_and_decodes_the_same(atelier, models):
    theirs, ours = models.load_vae_diffusers(), atelier.build_vae(models.load_weights("vae"))
    picture = torch.rand(2, 128, 128, 3)
    with torch.no_grad():
        latents = theirs.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mean
        decoded = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert_close(ours.encode(picture), latents)
    assert_close(ours.decode(latents), decoded)


@pytest.mark.parametrize(
    "text",
    ["", "a sailing boat and a moon", "A Cat, pastel palette,thick outline", "zeppelin! (naive)", "an owl " * 40],
)
def test_the_text_encoder_gives_the_same_states(atelier, models, text):
    theirs, ours = models.load_clip(), atelier.build_clip(models.load_weights("clip"))
    if text.startswith("zeppelin"):
        text = "zeppelin naive"  # brackets are ComfyUI's own syntax for weights
    ids = tokenize(models.clip_tokenizer(), [text])
    with torch.no_grad():
        states, pooled = text_features(theirs, ids)
    got, got_pooled = ours.encode_from_tokens(ours.tokenize(text), return_pooled=True)
    if "owl" in text:  # longer than one window: ComfyUI goes on in another one
        assert got.shape[1] == 2 * models.edition().max_tokens or got.shape[1] == 3 * models.edition().max_tokens
        return
    assert_close(got, states)
    assert_close(got_pooled, pooled)


def test_clip_vision_gives_the_same_embedding(atelier, models):
    theirs, ours = models.load_clip(), atelier.build_clip_vision(models.load_weights("clip"))
    pictures = (torch.rand(2, 128, 128, 3) * 255).round() / 255
    with torch.no_grad():
        expected = image_features(theirs, pictures.movedim(-1, 1) * 2 - 1)
    assert_close(ours.encode_image(pictures)["image_embeds"], expected)


def test_the_noise_schedule_is_that_of_training(atelier, models):
    sampling = atelier.build_unet(models.load_weights("unet"), 1.0).model.model_sampling
    alphas = models.alphas_cumprod()
    expected = ((1 - alphas) / alphas).sqrt().float()
    assert ((sampling.sigmas / expected - 1).abs() < 1e-3).all()  # small ones as well as large ones
