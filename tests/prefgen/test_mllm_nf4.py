"""4-bit weights for real, on the CPU that bitsandbytes packs for as well."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from prefgen.compat import has_nf4, transformers_knows
from prefgen.history import PreferenceHistory
from prefgen.mllm.files import weight_bytes
from prefgen.mllm.model import PreferenceMLLM
from tests.prefgen.tiny_mllms import FAMILIES, write_nf4_folder

pytestmark = pytest.mark.skipif(not has_nf4(), reason="packing into 4 bits needs bitsandbytes and accelerate")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    if not transformers_knows(FAMILIES[request.param][0]):
        pytest.skip("the installed transformers doesn't have this family")
    return write_nf4_folder(tmp_path_factory.mktemp("mllm") / request.param, request.param)


@pytest.fixture
def history():
    pictures = torch.rand(5, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    return PreferenceHistory.from_images(list(pictures[:3]), list(pictures[3:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_reads_in_nf4(folder, history, dtype):
    unpacked, packed = PreferenceMLLM.load(folder), PreferenceMLLM.load(folder, dtype, nf4=True)
    expected, actual = unpacked.encode(history), packed.encode(history)
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert cosine_similarity(actual, expected, dim=-1).min() > 0.8  # random weights round worst
    assert not torch.equal(actual, expected)
    assert packed.fingerprint["precision"] == "nf4"


def test_the_decoder_is_packed_and_what_sees_is_not(folder, history):
    unpacked, packed = PreferenceMLLM.load(folder), PreferenceMLLM.load(folder, nf4=True)
    small = {name for name, weight in packed.model.named_parameters() if weight.dtype == torch.uint8}
    layers = [name for name, module in unpacked.family.text.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(small) == len(layers) and all("layers." in name for name in small)
    seen, expected = packed.image_features(history.items), unpacked.image_features(history.items)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_the_estimate_is_what_the_packed_weights_take(folder):
    packed = PreferenceMLLM.load(folder, nf4=True)
    parameters = sum(weight.nbytes for weight in packed.model.parameters())
    # The estimate counts the scales, which the parameters don't.
    assert 0.9 * parameters < weight_bytes(folder, 4, nf4=True) < 1.25 * parameters
