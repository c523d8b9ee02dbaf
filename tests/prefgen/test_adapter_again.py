"""An adapter that was read before: not read again, unless its file is another one by now."""

import os
import shutil

import pytest
import torch

import prefgen.adapter_file
from prefgen.adapter_file import load_adapter, load_adapter_once, save_adapter
from prefgen.errors import AdapterError
from prefgen.files import file_state
from tests.prefgen import ip_adapter_files as files


@pytest.fixture
def path(tmp_path, new_adapter):
    save_adapter(new_adapter(), tmp_path / "taste.safetensors")
    return tmp_path / "taste.safetensors"


def in_place(path, new):
    path.write_bytes(new.read_bytes())


def renamed(path, new):
    os.replace(new, path)


def linked(path, new):
    path.unlink()
    path.symlink_to(new)


def test_the_same_file_is_read_once(path, tmp_path, monkeypatch):
    read = []
    reading = prefgen.adapter_file.read_weights
    monkeypatch.setattr(
        prefgen.adapter_file, "read_weights", lambda *arguments: read.append(arguments) or reading(*arguments)
    )
    first = load_adapter_once(path)
    assert load_adapter_once(path) is first and load_adapter_once(str(path)) is first and len(read) == 1


@pytest.mark.parametrize("how", [in_place, renamed, linked])
def test_a_file_replaced_by_one_of_equal_size_and_time_is_read_again(path, tmp_path, new_adapter, how):
    before, state = load_adapter_once(path), file_state(path)
    new = tmp_path / "new.safetensors"
    save_adapter(new_adapter(seed=1), new)
    times = path.stat()
    how(path, new)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    again = load_adapter_once(path)
    assert file_state(path) != state
    assert not torch.equal(before.to_k_ip[0].weight, again.to_k_ip[0].weight)
    assert torch.equal(again.to_k_ip[0].weight, load_adapter(path).to_k_ip[0].weight)


def test_only_the_last_file_stays_in_memory(path, tmp_path):
    first = load_adapter_once(path)
    shutil.copy(path, tmp_path / "other.safetensors")
    assert load_adapter_once(tmp_path / "other.safetensors").name == "other.safetensors"
    assert load_adapter_once(path) is not first


def test_a_file_that_is_gone_or_broken_is_refused_and_nothing_old_is_given_instead(path):
    load_adapter_once(path)
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter_once(path)
    path.unlink()
    with pytest.raises(AdapterError, match="not there any more"):
        load_adapter_once(path)
    path.write_bytes(content)
    load_adapter_once(path)


@pytest.mark.parametrize("public", [False, True])
def test_the_digest_is_that_of_the_file_that_was_read_or_none(path, tmp_path, new_adapter, public):
    if public:
        path = files.write(tmp_path, "ip-adapter_sd15")
    adapter = load_adapter(path)
    assert len(adapter.digest) == 64 and adapter.digest == load_adapter(path).digest
    late = load_adapter(path)
    save_adapter(new_adapter(seed=1), path)
    with pytest.raises(AdapterError, match="has changed since it was read"):
        late.digest  # noqa: B018
    assert load_adapter(path).digest != adapter.digest
    assert new_adapter().digest == ""
