"""Small real parts for the engine's tests: an adapter from random weights."""

import pytest
import torch

from prefgen.adapter import FORMAT_VERSION, AdapterHeader, UserAdapter
from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.fusion import UserProjection

SEMANTIC, CORE, IMAGE, TEXT, TOKENS = 12, 16, 8, 24, 4
SEM_LAYERS, CORE_LAYER, LAYERS = [2, 3, 4, 5], 3, 6


@pytest.fixture
def new_adapter():
    """A function that makes an adapter with random weights for any blocks; the same seed gives the same weights."""

    def make(block_widths=(32, 48, 32), text_width=TEXT, seed=0, **header) -> UserAdapter:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mllm = {"name": "tiny", "num_layers": LAYERS, "hidden_size": CORE}
            header = {
                "format_version": FORMAT_VERSION,
                "kind": "prefgen",
                "base_family": "sdxl",
                "semantic_width": SEMANTIC,
                "core_width": CORE,
                "image_width": IMAGE,
                "cross_attention_dim": text_width,
                "tokens": TOKENS,
                "block_widths": list(block_widths),
                "mllm": mllm | {"sem_layers": SEM_LAYERS, "core_layer": CORE_LAYER},
                "clip_vision": {"name": "tiny", "width": IMAGE},
                "training": {"steps": 1},
            } | header
            sem_norm, core_norm = LayerStandardiser(len(SEM_LAYERS), CORE), LayerStandardiser(1, CORE)
            sem_norm.fit(torch.randn(32, len(SEM_LAYERS), CORE) * 3 + 1)
            core_norm.fit(torch.randn(32, 1, CORE) * 5 - 2)
            projection = UserProjection(SEMANTIC + CORE + IMAGE, text_width, TOKENS)
            aligner = SemanticAligner(len(SEM_LAYERS), CORE, SEMANTIC, hidden=20)
            adapter = UserAdapter(AdapterHeader(**header), projection, aligner, sem_norm, core_norm, name="tiny")
        return adapter.eval().requires_grad_(False)

    return make
