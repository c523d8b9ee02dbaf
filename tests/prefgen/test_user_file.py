"""Users as files: the same user when it comes back, bound to its adapter, and mixed by weight."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from prefgen import user_file
from prefgen.adapter_file import load_adapter_once, save_adapter
from prefgen.errors import AdapterError
from prefgen.fusion import FusedUser
from prefgen.user_file import blend_users, load_user, read_user, user_bytes
from tests.prefgen import ip_adapter_files


@pytest.fixture
def adapters(new_adapter, tmp_path) -> dict:
    """{combo entry: file} of two adapters with other weights."""
    folder = tmp_path / "models"
    folder.mkdir()
    paths = {}
    for seed, name in enumerate(("one", "two")):
        paths[name] = folder / f"{name}.safetensors"
        save_adapter(new_adapter(seed=seed), paths[name])
    return paths


@pytest.fixture
def user(adapters) -> FusedUser:
    adapter = load_adapter_once(adapters["one"])
    return FusedUser(torch.randn(adapter.header.user_width, generator=torch.Generator().manual_seed(1)), adapter)


def written(user: FusedUser, path, **words):
    path.write_bytes(user_bytes(user, **{"name": "sea"} | words))
    return path


def test_a_user_comes_back_with_the_same_keys_and_values(user, adapters, tmp_path):
    file = written(user, tmp_path / "sea.safetensors", taste="sea@1a2b3c4d")
    back = load_user(file, adapters)
    for ours, theirs in zip(user.keys_values(), back.keys_values(), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    header, _ = read_user(file)
    assert (header.name, header.adapter, header.taste) == ("sea", "one.safetensors", "sea@1a2b3c4d")
    assert user_bytes(user, "sea") == user_bytes(user, "sea"), "the same user, the same bytes"


def test_disliked_pictures_of_the_other_half_come_back_as_well(user, adapters, tmp_path):
    negative = FusedUser(user.vector, user.adapter, torch.full_like(user.vector, 0.5), negative=True)
    back = load_user(written(negative, tmp_path / "n.safetensors"), adapters)
    assert back.negative and torch.equal(back.no_user, negative.no_user)


def test_the_adapter_is_found_by_its_checksum_whatever_it_is_called_now(user, adapters, tmp_path):
    file = written(user, tmp_path / "sea.safetensors")
    os.rename(adapters["one"], adapters["one"].with_name("renamed.safetensors"))
    moved = {"two": adapters["two"], "renamed": adapters["one"].with_name("renamed.safetensors")}
    assert load_user(file, moved).adapter.name == "renamed.safetensors"


def test_another_adapter_of_the_same_name_is_not_taken(user, adapters, tmp_path, one_sentence):
    file = written(user, tmp_path / "sea.safetensors", taste="sea@1a2b3c4d")
    adapters["one"].write_bytes(adapters["two"].read_bytes())
    with pytest.raises(AdapterError) as raised:
        load_user(file, adapters)
    text = one_sentence(raised)
    assert "for the adapter one.safetensors" in text and "sea@1a2b3c4d" in text


@pytest.mark.parametrize(
    "harm",
    ["empty", "no safetensors", "an adapter", "no header", "newer", "mangled", "endless", "a number", "a word"]
    + ["no numbers", "nan", "other shape", "whole numbers", "eight bits"],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(user, adapters, tmp_path, harm, one_sentence):
    file = tmp_path / "sea.safetensors"
    header = json.loads(json.dumps(read_user(written(user, file))[0].__dict__))
    tensors = {"user": user.vector}
    if harm == "empty":
        file.write_bytes(b"")
    elif harm == "no safetensors":
        file.write_bytes(b"{" * 100)
    elif harm == "an adapter":
        file.write_bytes(adapters["one"].read_bytes())
    elif harm == "no header":
        save_file(tensors, file)
    else:
        changes = {"newer": {"format_version": 99}, "mangled": {"format_version": "x"}}
        changes |= {"endless": {"format_version": float("inf")}, "a number": {"taste": 7}, "a word": {"negative": "no"}}
        changed = changes.get(harm, {})
        odd = {"no numbers": {"other": user.vector}, "nan": {"user": user.vector * float("nan")}}
        odd["other shape"] = {"user": torch.zeros(3)}
        odd["whole numbers"] = {"user": torch.ones(user.vector.shape, dtype=torch.int64)}
        odd["eight bits"] = {"user": torch.full_like(user.vector, float("nan")).to(torch.float8_e4m3fn)}
        save_file(odd.get(harm, tensors), file, metadata={"prefgen_user": json.dumps(header | changed)})
    with pytest.raises(AdapterError) as raised:
        load_user(file, adapters)
    assert "sea.safetensors" in one_sentence(raised)


def test_a_user_whose_adapter_came_from_no_file_is_not_saved(new_adapter):
    adapter = new_adapter()
    with pytest.raises(AdapterError, match="not read from a file"):
        user_bytes(FusedUser(torch.zeros(adapter.header.user_width), adapter), "sea")


@pytest.mark.parametrize("part", ["vector", "no_user"])
def test_a_user_that_no_file_would_be_read_with_is_not_saved(user, part, one_sentence):
    broken = replace(user, **{part: torch.full_like(user.vector, float("inf"))})
    with pytest.raises(AdapterError) as raised:
        user_bytes(broken, "sea")
    assert "not finite" in one_sentence(raised)


def test_numbers_of_eight_bits_are_read(user, adapters, tmp_path):
    file = written(user, tmp_path / "sea.safetensors")
    header = read_user(file)[0].__dict__
    small = user.vector.to(torch.float8_e4m3fn)
    save_file({"user": small}, file, metadata={"prefgen_user": json.dumps(header)})
    assert torch.equal(load_user(file, adapters).vector, small.float())


def test_a_blend_goes_from_one_user_to_the_other_in_a_straight_line(user):
    other = FusedUser(-2 * user.vector, user.adapter, torch.ones_like(user.vector), negative=True)
    ends = [blend_users([user, other], weights) for weights in ((1, 0), (0, 5))]
    assert torch.equal(ends[0].vector, user.vector) and torch.equal(ends[1].vector, other.vector)
    middle = blend_users([user, other], (3, 1))
    assert torch.allclose(middle.vector, 0.75 * user.vector + 0.25 * other.vector)
    assert torch.allclose(middle.no_user, torch.full_like(user.vector, 0.25)) and middle.negative
    assert blend_users([user], [2.0]).no_user is None


def test_what_cannot_be_blended_is_said(user, adapters, one_sentence):
    stranger = load_adapter_once(adapters["two"])
    for others, weights, words in (
        ([FusedUser(user.vector, stranger)], (1, 1), "for different adapters"),
        ([FusedUser(user.vector[:4], user.adapter)], (1, 1), "different numbers of pictures"),
        ([user], (0, 0), "0 or more"),
        ([user], (2, -1), "0 or more"),
    ):
        with pytest.raises(AdapterError) as raised:
            blend_users([user, *others], weights)
        assert words in one_sentence(raised)


def test_an_adapter_is_read_for_its_checksum_once(user, adapters, tmp_path, monkeypatch):
    file = written(user, tmp_path / "sea.safetensors")
    user_file._digests.clear()
    read = []
    real = user_file.AdapterFile.digest.func
    monkeypatch.setattr(user_file.AdapterFile.digest, "func", lambda self: read.append(self.path.name) or real(self))
    for _ in range(3):
        load_user(file, adapters)
    assert read == ["one.safetensors"]


def test_a_blend_is_named_by_its_parts_and_a_user_by_its_numbers(user):
    one = replace(user, taste="sea@1a2b3c4d")
    other = replace(user, vector=user.vector + 1)
    assert blend_users([one, other], [3, 1]).taste == "0.75 sea@1a2b3c4d + 0.25 unnamed"
    assert blend_users([user, other], [1, 1]).taste == ""
    assert one.digest == user.digest != other.digest
    assert replace(user, negative=True).digest != user.digest


def test_an_adapter_that_is_listed_and_gone_is_passed_over(user, adapters, tmp_path):
    file = written(user, tmp_path / "sea.safetensors")
    gone = {"gone": tmp_path / "one.safetensors"} | adapters
    assert torch.equal(load_user(file, gone).vector, user.vector)


def test_an_adapter_that_cannot_be_read_keeps_no_other_from_being_used(
    user, adapters, tmp_path, monkeypatch, one_sentence
):
    """Another program's half copied file beside it, or one that ComfyUI may not read."""
    file = written(user, tmp_path / "sea.safetensors")
    closed = tmp_path / "closed.safetensors"
    closed.write_bytes(b"{}")
    real = user_file.AdapterFile.digest.func

    def digest(adapter):
        if adapter.path == closed:
            raise AdapterError("closed.safetensors has changed since it was read: queue again.")
        return real(adapter)

    monkeypatch.setattr(user_file.AdapterFile.digest, "func", digest)
    user_file._digests.clear()
    assert torch.equal(load_user(file, {"closed": closed} | adapters).vector, user.vector)
    with pytest.raises(AdapterError) as raised:
        load_user(file, {"closed": closed, "two": adapters["two"]})
    assert "closed.safetensors could not be read" in one_sentence(raised)


def test_a_users_vector_has_its_adapters_shape(new_adapter):
    adapter = new_adapter()
    width = adapter.header.user_width
    assert user_file.fits(torch.zeros(width), adapter)
    assert not user_file.fits(torch.zeros(width + 1), adapter) and not user_file.fits(torch.zeros(1, width), adapter)


def test_a_picture_embedding_has_an_ip_adapters_width_as_one_or_as_states(tmp_path):
    adapter = load_adapter_once(ip_adapter_files.write(tmp_path, "ip-adapter_sd15"))
    width = adapter.header.image_width
    assert user_file.fits(torch.zeros(1, width), adapter) and user_file.fits(torch.zeros(1, 5, width), adapter)
    assert not user_file.fits(torch.zeros(width), adapter) and not user_file.fits(torch.zeros(1, width + 1), adapter)
