"""Adapters that were trained with some of e_u's parts: the others have width 0 and no place in the file."""

import pytest
import torch
from safetensors import safe_open

from prefgen.adapter_checks import check_encoded
from prefgen.adapter_file import load_adapter, save_adapter
from prefgen.encoded import EncodedPreference
from prefgen.errors import AdapterError
from prefgen.fusion import fuse_user
from tests.prefgen.adapters import CORE, IMAGE, LAYERS, SEMANTIC, header_of, rewrite

PARTS = {
    "image": (0, 0, IMAGE),
    "core": (0, CORE, 0),
    "semantic": (SEMANTIC, 0, 0),
    "core and image": (0, CORE, IMAGE),
    "semantic and image": (SEMANTIC, 0, IMAGE),
    "all": (SEMANTIC, CORE, IMAGE),
}


def encoded(**changes):
    draw = torch.Generator().manual_seed(0)
    read = {
        "hidden": torch.randn(LAYERS, CORE, generator=draw),
        "image_embed_liked": torch.randn(3, IMAGE, generator=draw),
        "image_embed_disliked": None,
        "mllm": {"num_layers": LAYERS, "hidden_size": CORE},
        "clip_vision": {"width": IMAGE},
    }
    return EncodedPreference(**read | changes)


@pytest.fixture(params=PARTS)
def adapter(request, new_adapter, tmp_path):
    """(widths, as it was, as it comes back from its file)"""
    widths = PARTS[request.param]
    original = new_adapter(widths=widths)
    save_adapter(original, tmp_path / "taste.safetensors")
    return widths, original, load_adapter(tmp_path / "taste.safetensors")


def test_the_file_has_nothing_of_a_part_that_was_not_trained(adapter, tmp_path):
    widths, original, loaded = adapter
    assert loaded.header == original.header and loaded.header.user_width == sum(widths)
    with safe_open(str(tmp_path / "taste.safetensors"), "pt") as file:
        names = {name.split(".")[1] for name in file.keys() if name.startswith("prefgen.")}
    expected = {"aligner": widths[0], "sem_norm": widths[0], "core_norm": widths[1]}
    assert names == {name for name, width in expected.items() if width}


def test_a_user_is_fused_of_the_parts_that_there_are(adapter):
    widths, original, loaded = adapter
    check_encoded(loaded.header, encoded())
    user = fuse_user(loaded, encoded())
    assert user.vector.shape == (sum(widths),)
    for part, width in zip(user.vector.split(list(widths)), widths, strict=True):
        assert 0.1 < part.norm() < 10 if width else not part.numel()
    ours = fuse_user(original, encoded()).keys_values()
    for pair, other in zip(user.keys_values(), ours, strict=True):
        assert all(map(torch.equal, pair, other))
    # A weight of a part that there isn't changes nothing.
    absent = {name: 0.0 for name, width in zip(("semantic", "core", "image"), widths, strict=True) if not width}
    assert torch.equal(fuse_user(loaded, encoded(), **absent).vector, user.vector)


def test_a_history_that_lacks_what_the_only_part_reads_is_refused(new_adapter):
    with pytest.raises(AdapterError, match="through CLIP vision alone: connect tiny to clip_vision"):
        check_encoded(new_adapter(widths=PARTS["image"]).header, encoded(image_embed_liked=None))
    with pytest.raises(AdapterError, match="through its MLLM alone"):
        check_encoded(new_adapter(widths=PARTS["core"]).header, encoded(hidden=None))
    # Another encoder's embeddings have no place in it either way.
    check_encoded(new_adapter(widths=PARTS["core"]).header, encoded(clip_vision={"width": 5}))


def test_a_header_that_promises_a_part_whose_layers_it_does_not_name_is_refused(new_adapter, tmp_path):
    path = tmp_path / "taste.safetensors"
    save_adapter(new_adapter(widths=PARTS["core and image"]), path)
    for header in ({"semantic_width": SEMANTIC}, {"mllm": header_of(path)["mllm"] | {"core_layer": None}}):
        rewrite(path, header=header)
        with pytest.raises(AdapterError, match="taste.safetensors"):
            load_adapter(path)
        save_adapter(new_adapter(widths=PARTS["core and image"]), path)
