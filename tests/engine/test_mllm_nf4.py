"""4-bit weights, where bitsandbytes is installed (its CPU code is enough)."""

import pytest
import torch

from prefgen.atelier import users
from prefgen.atelier.models import MLLM_FOLDER
from prefgen.atelier.renderer import render
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from tests.engine import tiny_mllms

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nf4 is optional")
# bitsandbytes' CPU kernels want widths that 32 divides.
WIDE = {
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4},
    "vision": {"hidden_size": 64, "intermediate_size": 128},
}


@pytest.fixture(scope="module")
def history():
    examples = users.history(users.user(users.EXAMPLE_USERS["ada"]), 8, 8, 1)
    sides = [[torch.from_numpy(render(e.scene)).float() / 255 for e in examples if e.liked == v] for v in (True, False)]
    return PreferenceHistory.from_images(*sides)


def test_the_embedded_mllm_says_the_same_in_four_bits(history):
    plain, packed = PreferenceMLLM.load(MLLM_FOLDER), PreferenceMLLM.load(MLLM_FOLDER, nf4=True)
    assert packed.fingerprint["precision"] == "nf4" and packed.memory_bytes < plain.memory_bytes / 4
    alike = torch.nn.functional.cosine_similarity(plain.encode(history), packed.encode(history), dim=1)
    assert (alike > 0.98).all()
    assert packed.answer(history) == plain.answer(history)


@pytest.mark.parametrize("family", ["SmolVLM2", "Idefics3", "LLaVA-OneVision"])
def test_other_families_are_packed_and_read(family, tmp_path, history):
    folder = tiny_mllms.write_folder(tmp_path / "mllm", family, **WIDE)
    mllm = PreferenceMLLM.load(folder, nf4=True)
    assert any(type(module).__name__ == "Linear4bit" for module in mllm.family.text.modules())
    assert torch.isfinite(mllm.encode(history)).all()
