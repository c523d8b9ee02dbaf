"""Which edition of the embedded models a weights folder holds."""

import json

import pytest
import torch

from prefgen.atelier import editions, models
from prefgen.atelier.editions import FIRST, NOTE, SECOND


def test_a_note_says_which_edition_there_is(tmp_path, monkeypatch, one_sentence):
    assert editions.edition_of(tmp_path) is FIRST
    editions.write_note(tmp_path, SECOND)
    assert editions.edition_of(tmp_path) is SECOND
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    unet = models.load_unet_diffusers(random=True)
    assert unet.config.block_out_channels == (64, 128, 192) and unet.config.sample_size == 32
    assert models.load_vae_diffusers(random=True).config.scaling_factor == 1.0
    (tmp_path / NOTE).write_text(json.dumps({"edition": "third"}))
    with pytest.raises(editions.EditionError) as raised:
        editions.edition_of(tmp_path)
    assert "first or second" in one_sentence(raised)


def test_an_adapter_of_the_first_edition_is_refused_beside_the_second(one_sentence):
    from prefgen.adapter_checks import check_compatible
    from prefgen.adapter_file import load_adapter
    from prefgen.errors import AdapterError
    from training.common.user_branch import own_projections

    header = load_adapter(models.WEIGHTS / "adapter.safetensors").header
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**SECOND.unet)
    widths = [len(to_k) for to_k, _ in own_projections(unet)]
    with pytest.raises(AdapterError) as raised:
        check_compatible(header, widths, SECOND.unet["cross_attention_dim"], "atelier")
    assert "another variant" in one_sentence(raised)
