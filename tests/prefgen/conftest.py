"""Fixtures for the engine's tests: an adapter from random weights, and loading what must be refused."""

import pytest
import torch

from prefgen.adapter_file import load_adapter
from prefgen.errors import AdapterError
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from tests.prefgen.adapters import random_adapter

TEXT = 24


@pytest.fixture
def new_adapter():
    """A function that makes an adapter with random weights for any blocks; the same seed gives the same weights."""

    def make(block_widths=(32, 48, 32), text_width=TEXT, seed=0, **header):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return random_adapter(block_widths, text_width, fitted=True, **{"training": {"steps": 1}} | header)

    return make


@pytest.fixture
def refused(one_sentence):
    """A function that loads an adapter file which must be refused, and gives the sentence."""

    def load(path) -> str:
        with pytest.raises(AdapterError) as raised:
            load_adapter(path)
        text = one_sentence(raised)
        assert path.name in text and str(path.parent) not in text
        return text

    return load


@pytest.fixture
def refused_mllm(one_sentence):
    """A function that loads an MLLM folder which must be refused with a word, and gives the sentence."""

    def load(folder, word) -> str:
        with pytest.raises(MLLMError, match=word) as raised:
            PreferenceMLLM.load(folder)
        text = one_sentence(raised)
        assert folder.name in text
        return text

    return load
