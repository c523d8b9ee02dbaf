"""Save, load and blend users on the graph, with the atelier's own adapter."""

import errno

import pytest
import torch


@pytest.fixture
def models(tmp_path, monkeypatch, pack):
    """An empty models/prefgen."""
    import folder_paths

    pack("prefgen.comfy.folders")  # which makes the entry that is replaced here
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "prefgen", ([str(tmp_path / "prefgen")], set()))
    return tmp_path / "prefgen"


@pytest.fixture
def user(pack):
    from_file = pack("prefgen.adapter_file").load_adapter_once(
        pack("prefgen.atelier.models").WEIGHTS / "adapter.safetensors"
    )
    width = from_file.header.user_width
    return pack("prefgen.fusion").FusedUser(torch.randn(width, generator=torch.Generator().manual_seed(3)), from_file)


def test_a_saved_user_is_offered_and_comes_back_the_same(pack, models, user):
    nodes = pack("nodes.users")
    assert nodes.SaveUser.execute(user, "my taste", "sea@1a2b3c4d").result[0] is user
    assert list(pack("prefgen.comfy.folders").users_saved()) == ["my taste.safetensors"]
    assert "my taste.safetensors" not in pack("prefgen.comfy.folders").adapters()
    back = nodes.LoadUser.execute("my taste.safetensors").result[0]
    assert torch.equal(back.vector, user.vector)
    assert nodes.LoadUser.validate_inputs("my taste.safetensors") is True
    for wrong in ("nobody", "../adapter.safetensors", ""):
        assert "There is no user named" in nodes.LoadUser.validate_inputs(wrong)


def test_the_same_user_is_saved_once_and_another_one_of_its_name_gets_a_number(pack, models, user):
    save = pack("nodes.users").SaveUser.execute
    save(user, "sea")
    save(user, "sea")
    save(pack("prefgen.fusion").FusedUser(user.vector + 1, user.adapter), "sea")
    assert sorted(path.name for path in (models / "users").iterdir()) == ["sea (2).safetensors", "sea.safetensors"]
    for name in ("", "a/b", "CON", "../x"):
        with pytest.raises(ValueError):
            save(user, name)


def test_what_lies_beside_a_saved_user_does_not_stop_it(pack, models, user):
    folder = models / "users"
    folder.mkdir(parents=True)
    (folder / "nowhere.safetensors").symlink_to(folder / "gone.safetensors")
    (folder / "folder.safetensors").mkdir()
    pack("nodes.users").SaveUser.execute(user, "sea")
    assert (folder / "sea.safetensors").is_file()


@pytest.mark.parametrize("trouble", ["full", "a file in place of the folder"])
def test_a_user_that_cannot_be_written_is_a_sentence(pack, models, user, trouble, monkeypatch):
    if trouble == "full":

        def full(path, data):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(pack("prefgen.comfy.folders"), "write_atomic", full)
    else:
        models.mkdir()
        (models / "users").write_bytes(b"")
    with pytest.raises(ValueError) as raised:
        pack("nodes.users").SaveUser.execute(user, "sea")
    words = str(raised.value)
    assert words.startswith("The user sea was not saved into models/prefgen/users: ") and str(models) not in words
    assert ("the disk is full" in words) == (trouble == "full")


def test_up_to_four_users_blend(pack, user):
    blend = pack("nodes.users").BlendUsers.execute
    fused = pack("prefgen.fusion").FusedUser
    others = {f"user_{n}": fused(user.vector * n, user.adapter) for n in (2, 3, 4)}
    weights = {f"weight_{n}": 1.0 for n in (2, 3, 4)}
    mixed = blend(user, 1.0, **others, **weights).result[0]
    assert torch.allclose(mixed.vector, user.vector * 2.5)
    assert torch.equal(blend(user).result[0].vector, user.vector)
