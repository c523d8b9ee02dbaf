"""What an answer says of its progress, on the embedded MLLM."""

import pytest
import torch

from prefgen.history import PreferenceHistory
from prefgen.mllm import model as model_module
from prefgen.mllm.model import PreferenceMLLM
from tests.prefgen.tiny_mllms import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm"), "SmolVLM2")


def pictures(count, seed):
    return list(torch.rand(count, 20, 20, 3, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("what", ["answer", "encode"])
def test_progress_counts_every_picture_and_ends_with_the_reading(folder, what, monkeypatch):
    monkeypatch.setattr(model_module, "BATCH", 2)
    read = getattr(PreferenceMLLM.load(folder), what)
    calls = []
    read(PreferenceHistory.from_images(pictures(3, 0), pictures(2, 1)), progress=lambda *n: calls.append(n))
    assert calls == [(2, 6), (4, 6), (5, 6), (6, 6)]
    calls.clear()
    # Three of the pictures are known: what is left is counted on from there.
    read(PreferenceHistory.from_images(pictures(3, 0), pictures(3, 2)), progress=lambda *n: calls.append(n))
    assert calls == [(5, 7), (6, 7), (7, 7)]


def test_an_answer_that_is_asked_for_again_ends_at_once(folder):
    mllm = PreferenceMLLM.load(folder)
    history, calls = PreferenceHistory.from_images(pictures(3, 0), []), []
    mllm.answer(history, limit=2)
    mllm.answer(history, limit=2, progress=lambda *n: calls.append(n))
    assert calls == [(4, 4)]
