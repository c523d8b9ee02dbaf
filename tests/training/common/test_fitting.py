"""What fits a card: counted on the meta device, halved when it didn't fit, read ahead of its use."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training.common import base as base_room
from training.common import fitting
from training.common.ahead import Ahead, Spans
from training.common.fitting import Pieces, peak_bytes, pieces_that_fit

# As published: the VAE of SDXL, and CLIP ViT-L and OpenCLIP bigG, which read its prompts.
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SDXL_TEXT = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
)
GB = 1e9


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory")


def weight_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def sdxl():
    """(VAE, its text encoders) of SDXL's shapes, fp32, on the meta device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        vae = AutoencoderKL(**SDXL_VAE)
        first, second = (CLIPTextConfig(**sizes, projection_dim=1280) for sizes in SDXL_TEXT)
        return vae, [CLIPTextModel(first), CLIPTextModelWithProjection(second)]


def test_the_cache_step_of_sdxl_fits_8_gb():
    """What stays on the card while pictures and prompts are encoded, with the activations on top: 1,024 pixels."""
    vae, encoders = sdxl()
    weights = weight_bytes(vae) + sum(map(weight_bytes, encoders))
    assert 83.6e6 < weight_bytes(vae) / 4 < 83.7e6, "its published number of weights"
    picture = base_room.encoding_bytes(type(vae), vae.config, 1024)
    assert weights + picture < 8 * GB
    tokens = torch.zeros(64, 77, dtype=torch.long, device="meta")
    texts = max(peak_bytes(lambda m=model: m(input_ids=tokens, output_hidden_states=True)) for model in encoders)
    assert weights + texts < 8 * GB
    # The control: what the step once took, sixteen pictures at a time.
    assert 16 * picture > 40 * GB
    # A card with 8 GB that holds the weights has room for one picture at a time, one with 80 GB for many.
    for card, size in ((8 * GB, 1), (80 * GB, 16)):
        room = int(card - weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "free_bytes", lambda _, room=room: room)
            assert pieces_that_fit(picture, base_room.PICTURES_AT_ONCE, torch.device("cuda")).size == size


def test_live_tensors_are_counted_until_their_last_use():
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
        inputs = torch.empty(5, 8)
    # The first layer's output and what GELU makes of it; the input was there before.
    assert peak_bytes(lambda: layers(inputs)) == 2 * 5 * 16 * 4
    assert peak_bytes(lambda: layers(inputs).view(2, 10)[:1]) == 2 * 5 * 16 * 4, "a view takes no memory"

    def retained():
        rows = [layers[0](inputs) for _ in range(3)]
        return sum(row.sum() for row in rows)

    assert 3 * 5 * 16 * 4 <= peak_bytes(retained) < 4 * 5 * 16 * 4


def test_pieces_are_powers_of_two_of_what_is_free(monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda _: 1000)
    device = torch.device("cpu")
    assert pieces_that_fit(100, 16, device).size == 4  # six would fit
    assert pieces_that_fit(1, 16, device).size == 16 and pieces_that_fit(10_000, 16, device).size == 1
    monkeypatch.setattr(fitting, "free_bytes", lambda _: None)
    assert pieces_that_fit(100, 16, device).size == 16, "where it can't be asked, halving has to do"


def test_a_piece_that_does_not_fit_is_halved_and_no_row_is_lost():
    asked = []

    def function(rows):
        asked.append(len(rows))
        if len(rows) > 2:
            raise out_of_memory()
        return list(rows)

    pieces = Pieces(16)
    assert sum(pieces(function, range(7)), []) == list(range(7))
    assert asked == [7, 7, 4, 2, 2, 2, 1] and pieces.size == 2
    assert pieces(function, range(2)) == [range(2)] or pieces.size == 2
    with pytest.raises(torch.OutOfMemoryError):
        Pieces(4)(lambda rows: (_ for _ in ()).throw(out_of_memory()), range(3))
    with pytest.raises(KeyError):
        Pieces(4)(lambda rows: {}["no memory fault"], range(3))


def test_latents_are_the_same_in_pieces(monkeypatch):
    import numpy as np
    from diffusers import AutoencoderKL, DDIMScheduler

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pictures = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8) for i in range(5)]

    def base():
        return base_room.Base("sd15", None, vae, [], DDIMScheduler(), 32, torch.float32, "cpu")

    once, _ = base().latents(pictures)
    halved, encode = base(), base_room.Base._encode_pictures

    def small_card(self, squares):
        if len(squares) > 1:
            raise out_of_memory()
        return encode(self, squares)

    monkeypatch.setattr(base_room.Base, "_encode_pictures", small_card)
    latents, sizes = halved.latents(pictures)
    torch.testing.assert_close(latents, once, rtol=1e-5, atol=1e-6)
    assert sizes.shape == (5, 4) and latents.shape == (5, 4, 32, 32)


# Ahead


def test_the_next_value_is_computed_while_the_last_is_used():
    computed, main = [], threading.get_ident()

    def function(number):
        computed.append((number, threading.get_ident() == main))
        return number * number

    spans = Spans(10, 4)
    ahead = Ahead(function, spans.following)
    assert ahead(0) == 0
    for _ in range(200):
        if len(computed) == 2:
            break
        time.sleep(0.01)
    assert computed == [(0, True), (4, False)], "the second is there before it is asked for"
    assert [ahead(start) for start in (4, 8)] == [16, 64]
    assert [number for number, _ in computed] == [0, 4, 8], "each once"
    assert ahead(0) == 0, "another number than foreseen is computed when asked for"


def test_what_the_thread_raises_is_raised_where_it_is_asked_for():
    ahead = Ahead(lambda number: 1 // (4 - number), lambda number: number + 4)
    assert ahead(0) == 0
    with pytest.raises(ZeroDivisionError):
        ahead(4)


def test_chunks_go_to_processes_by_turns():
    spans = Spans(10, 2, 2)
    assert [spans.following(start) for start in (0, 2, 4, 6, 8)] == [4, 6, 8, None, None]
    assert spans.rows(8) == slice(8, 10)


# Advice


@pytest.mark.parametrize(
    ("during", "words"),
    [
        ("caches", "one picture alone doesn't fit: free the device, or take a smaller base.pixels;"),
        ("pictures", "set train_user_attention.pictures_every=0;"),
        ("optimiser", "set train_user_attention.optimiser=adamw8bit;"),
        ("forward", "set base.gradient_checkpointing=true, or take a smaller batch (now 48) or resolution;"),
    ],
)
def test_what_is_advised_is_what_helps(during, words):
    from training.common.config.command import load
    from training.common.run import Run

    config = load("atelier")
    run = SimpleNamespace(
        args=SimpleNamespace(stage="train_user_attention", section=config.train_user_attention, config=config),
        updater=SimpleNamespace(uses_micro_batches=False),
        step=0,
        _last_saved=lambda: "There is no checkpoint yet.",
    )
    for name in ("_smaller_pieces", "_checkpointing"):
        setattr(run, name, getattr(Run, name).__get__(run))
    said = Run._memory_advice(run, during)
    assert words in said and said.endswith("There is no checkpoint yet.")
