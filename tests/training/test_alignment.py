"""Alignment learns what users like in words: planted states, the embedded CLIP's own text, figures checked by hand."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.atelier import captions
from prefgen.atelier.attributes import FAMILIES
from training import train_alignment
from training.common.atelier_clip import text_features, tokenize
from training.common.checkpoints import last_state
from training.common.config.command import load
from training.common.stage_outputs import first_heldout
from training.data.atelier_users import users_of
from training.train_alignment import user_bank

USERS, EACH, LAYERS, WIDTH, SEM = 240, 3, 6, 48, [2, 3, 4, 5]
NOISE = 3.5  # in units of a state's own spread


def texts_of(person):
    return [", ".join(captions.taste_phrases(dict(taste.liked))) for taste in person.tastes]


@pytest.fixture(scope="module")
def bank():
    """Unit text embeddings [users, 128], without the stage's code: the mean of a user's tastes."""
    from prefgen.atelier import models

    clip, tokenizer = models.load_clip(), models.clip_tokenizer()
    rows = []
    with torch.inference_mode():
        for person in users_of("train", USERS):
            embeds = F.normalize(text_features(clip, tokenize(tokenizer, texts_of(person)))[1], dim=1)
            rows.append(F.normalize(embeds.mean(0), dim=0))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def runs(bank, tmp_path_factory):
    """What the stages before leave: states in which a user's taste lies, mixed by a fixed matrix, with noise."""
    folder = tmp_path_factory.mktemp("alignment")
    generator = torch.Generator().manual_seed(0)
    centred = (bank - bank.mean(0)) / bank.std(0)
    mixed = (centred @ torch.randn(128, LAYERS * WIDTH, generator=generator) / 128**0.5).view(USERS, 1, LAYERS, WIDTH)
    states = mixed + NOISE * torch.randn(USERS, EACH, LAYERS, WIDTH, generator=generator)
    for name in ("extract", "probe_layers", "atelier.pool"):
        (folder / name).mkdir()
        (folder / name / "done").write_text("{}")
    np.save(folder / "extract/hidden.npy", states.flatten(0, 1).half().numpy() * 5 + 1)
    np.save(folder / "extract/images.npy", np.zeros((USERS * EACH, 8), np.float16))
    np.save(folder / "extract/owners.npy", np.repeat([person.id for person in users_of("train", USERS)], EACH))
    (folder / "extract/index.json").write_text(json.dumps({"world": "atelier", "mllm": {}, "clip_vision": {}}))
    (folder / "probe_layers/layers.json").write_text(json.dumps({"sem_layers": SEM, "core_layer": 3}))
    np.save(folder / "atelier.pool/pictures.npy", np.zeros((4, 1, 1, 3), np.uint8))
    np.save(folder / "atelier.pool/labels.npy", np.zeros((4, 2 + len(FAMILIES)), np.int8))
    return folder


def trained(runs, folder, **changes):
    """The figures and the last state of `train_alignment`, run beside links to the stages before it."""
    folder.mkdir()
    for name in ("extract", "probe_layers", "atelier.pool"):
        (folder / name).symlink_to(runs / name)
    options = {"steps": 60, "batch": 256, "bank": 256, "hidden": 128, "warmup": 10} | changes
    words = [word for key, value in options.items() for word in ("--set", f"train_alignment.{key}={value}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_alignment", "--runs", str(folder), "--threads", "1", *words])
        train_alignment.main()
    stage = folder / "train_alignment"
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return json.loads((stage / "done").read_text()), last_state(stage), lines


@pytest.fixture(scope="module")
def both(runs):
    """As the configurations train it: both terms."""
    return trained(runs, runs / "both")


@pytest.fixture(scope="module")
def aligned(both, runs):
    """Every history's unit vector [users, EACH, 128] from the state that a run left."""
    _, state, _ = both
    norm, aligner = LayerStandardiser(len(SEM), WIDTH), SemanticAligner(len(SEM), WIDTH, 128, 128)
    norm.load_state_dict(state["norm"])
    aligner.load_state_dict(state["model"])
    states = torch.from_numpy(np.load(runs / "extract/hidden.npy"))[:, SEM]
    with torch.inference_mode():
        return F.normalize(aligner.eval()(norm(states)), dim=1).view(USERS, EACH, 128)


def test_the_stages_bank_is_the_users_tastes_in_words(bank, runs):
    from training.common.bases import load_base
    from training.data.worlds import AtelierWorld

    people = users_of("train", USERS)
    assert 20 < sum(len(person.tastes) == 2 for person in people) < USERS / 2
    histories = AtelierWorld(runs)
    rows = user_bank(load_base(load("atelier"), "cpu", without=("unet", "vae")), histories, [p.id for p in people])
    torch.testing.assert_close(rows, bank, rtol=0, atol=1e-4)


def test_a_user_whose_taste_nobody_knows_has_no_row_in_the_bank():
    class Words:
        def texts(self, user):
            return [["a cat"], [], ["a cat", "", "a fish"]][user]

    class Text:
        def text_bank(self, texts):
            return torch.eye(4)[[["a cat", "a fish"].index(text) for text in texts]]

    rows = user_bank(Text(), Words(), [0, 1, 2])
    torch.testing.assert_close(rows, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0.5**0.5, 0.5**0.5, 0, 0]]))


def test_held_out_users_are_found_by_their_own_words(both):
    figures, _, log = both
    candidates = figures["candidates"]
    assert candidates == USERS - first_heldout(USERS) == 12
    # By chance 1 and 5 of the 12.
    assert figures["retrieval_top1"] > 3 / candidates and figures["retrieval_top5"] > 7.5 / candidates
    assert figures["retrieval_top5"] > figures["retrieval_top1"]
    assert log[-1]["paired"] < 0.75 * log[0]["paired"] and log[-1]["mmd"] < 0.5 * log[0]["mmd"]


def test_each_figure_is_what_its_name_says(both, aligned, bank):
    figures, _, _ = both
    border = first_heldout(USERS)
    heldout, own = aligned[border:], bank[border:]
    cosine = np.mean([float(heldout[u, k] @ own[u]) for u in range(len(own)) for k in range(EACH)])
    assert figures["heldout_cosine"] == pytest.approx(cosine, abs=1e-3)

    places = [
        sorted(range(len(own)), key=lambda other: -float(heldout[u, k] @ own[other])).index(u)
        for u in range(len(own))
        for k in range(EACH)
    ]
    assert figures["retrieval_top1"] == pytest.approx(np.mean([place < 1 for place in places]), abs=1e-6)
    assert figures["retrieval_top5"] == pytest.approx(np.mean([place < 5 for place in places]), abs=1e-6)

    seen = [float(aligned[u, k] @ bank[u]) for u in range(border) for k in range(EACH)]
    # Of the seen histories as many are read as of the held-out ones, evenly drawn.
    some = seen[:: len(seen) // heldout.flatten(0, 1).shape[0]]
    assert figures["seen_cosine"] == pytest.approx(np.mean(some), abs=1e-3)
    assert figures["seen_cosine"] > figures["heldout_cosine"] > np.mean([float(a @ b) for a in own for b in bank[:50]])


def test_the_held_out_distance_is_smaller_than_that_of_other_vectors(both, aligned, bank):
    from training.common.mmd import median_bandwidths, mmd2

    border = first_heldout(USERS)
    # The stage's kernel: octaves of the median distance between texts of users that it learns from.
    bandwidths = median_bandwidths(bank[:border], bank[:0])
    texts = bank[border:]
    distance = mmd2(aligned[border:].flatten(0, 1), texts, bandwidths).item()
    assert both[0]["heldout_mmd"] == pytest.approx(distance, abs=5e-4)
    assert distance < 0.2 * mmd2(texts[:1].expand(36, -1), texts, bandwidths).item(), "one text for everybody"


def test_the_paired_term_alone_brings_users_to_their_own_words(runs, both):
    figures, _, log = trained(runs, runs / "paired", mmd=0, paired=1)
    assert figures["retrieval_top1"] > 3 / 12 and figures["heldout_cosine"] > both[0]["heldout_cosine"] - 0.05
    assert log[0]["loss"] == pytest.approx(log[0]["paired"], rel=1e-5), "the loss is that term alone"


def test_the_distance_alone_leaves_nobody_with_their_own_words(runs, both):
    """Marginal MMD is content with any permutation of users: retrieval is at chance, the distance is small."""
    figures, _, log = trained(runs, runs / "mmd", mmd=1, paired=0)
    assert figures["retrieval_top1"] < both[0]["retrieval_top1"] / 2
    assert log[-1]["mmd"] < 0.5 * log[0]["mmd"]
    assert log[0]["loss"] == pytest.approx(log[0]["mmd"], rel=1e-5)


@pytest.mark.parametrize(("seen", "heldout"), [(1, 2), (2, 1), (0, 5)])
def test_too_few_tastes_in_words_on_either_side_are_refused(runs, bank, tmp_path, monkeypatch, seen, heldout):
    in_words, border = torch.zeros(USERS, 1), first_heldout(USERS)
    in_words[border - seen : border + heldout] = 1
    monkeypatch.setattr(train_alignment, "user_bank", lambda *_: bank * in_words)
    with pytest.raises(SystemExit, match=f"of {USERS} users of atelier only {seen + heldout} have a taste in words"):
        trained(runs, tmp_path / "runs", steps=1)
