"""What the combos list below the model folders, beside what core's own `folder_paths` lists there."""

import os
from pathlib import Path

import folder_paths
import pytest


@pytest.fixture
def folders(pack):
    return pack("prefgen.comfy.folders")


@pytest.fixture
def models(folders, tmp_path, monkeypatch):
    """(first, second, far): two roots of prefgen models as extra_model_paths.yaml would add them, and a folder that no
    root holds. They are the only ones."""
    places = [tmp_path / name for name in ("first", "second", "far")]
    for place in (*places, tmp_path / "ipadapter", tmp_path / "LLM"):
        place.mkdir()
    roots = {"prefgen": places[:2], "ipadapter": [tmp_path / "ipadapter"], "LLM": [tmp_path / "LLM"]}
    for kind, paths in roots.items():
        # The second as some packs add theirs, as a Path.
        entry = ([str(paths[0]), *paths[1:]], {".safetensors", ".sft"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
    return places


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listed(folders) -> set[str]:
    return set(folders.adapters()) - {"atelier"}


def core_lists(kind="prefgen") -> set[str]:
    """What core offers, without its cache: folders change faster here than their times."""
    return {Path(name).as_posix() for name in folder_paths.get_filename_list_(kind)[0]}


def test_a_linked_sub_folder_is_listed_and_accepted_as_core_does(folders, models):
    first, _, far = models
    write(far / "deep/taste.safetensors")
    (first / "shelf").symlink_to(far, target_is_directory=True)
    (first / "one.safetensors").symlink_to(far / "deep/taste.safetensors")
    assert listed(folders) == core_lists() == {"shelf/deep/taste.safetensors", "one.safetensors"}
    path = folders.adapter_path("shelf/deep/taste.safetensors")
    assert str(path) == folder_paths.get_full_path_or_raise("prefgen", "shelf/deep/taste.safetensors")


def test_two_links_to_one_folder_are_two_shelves(folders, models):
    first, _, far = models
    write(far / "taste.safetensors")
    for name in ("a", "b"):
        (first / name).symlink_to(far, target_is_directory=True)
    assert listed(folders) == core_lists() == {"a/taste.safetensors", "b/taste.safetensors"}


@pytest.mark.parametrize("shape", ["itself", "the root", "above the root", "each other", "twice"])
def test_links_that_go_in_circles_end(folders, models, shape):
    first, second, _ = models
    write(first / "a/taste.safetensors")
    write(first / "b/other.safetensors")
    links = {
        "itself": [("a/loop", first / "a")],
        "the root": [("a/loop", first)],
        "above the root": [("a/loop", first.parent)],
        "each other": [("a/loop", first / "b"), ("b/loop", first / "a")],
        "twice": [("a/loop", first / "a"), ("a/again", first / "a"), ("a/more", first)],
    }[shape]
    for link, target in links:
        (first / link).symlink_to(target, target_is_directory=True)
    expected = {"a/taste.safetensors", "b/other.safetensors"}
    if shape == "each other":  # each is a shelf of the other, once
        expected |= {"a/loop/other.safetensors", "b/loop/taste.safetensors"}
    assert listed(folders) == expected


def test_a_link_whose_file_or_folder_is_gone_is_passed_over(folders, models):
    first, _, far = models
    write(first / "taste.safetensors")
    (first / "gone.safetensors").symlink_to(far / "gone.safetensors")
    (first / "shelf").symlink_to(far / "gone", target_is_directory=True)
    assert listed(folders) == {"taste.safetensors"}
    assert "There is no adapter named 'gone.safetensors'" in folders_error(folders, "gone.safetensors")


def folders_error(folders, name) -> str:
    with pytest.raises(folders.ChoiceError) as raised:
        folders.adapter_path(name)
    return str(raised.value)


def test_a_name_in_two_roots_is_that_of_the_first_as_in_core(folders, models):
    first, second, _ = models
    write(second / "taste.safetensors", b"second")
    write(first / "taste.safetensors", b"first")
    assert folders.adapter_path("taste.safetensors").read_bytes() == b"first"
    assert folder_paths.get_full_path("prefgen", "taste.safetensors") == str(first / "taste.safetensors")


def test_the_suffix_may_be_written_in_capitals_and_as_sft(folders, models):
    for name in ("A.SAFETENSORS", "b.SafeTensors", "c.sft", "no.ckpt", "no.bin", "safetensors"):
        write(models[0] / name)
    assert listed(folders) == core_lists() == {"A.SAFETENSORS", "b.SafeTensors", "c.sft"}


def test_hidden_files_and_folders_are_no_adapters(folders, models):
    for name in ("._taste.safetensors", ".hidden.safetensors", ".Trash-1000/x.safetensors", "s/._taste.safetensors"):
        write(models[0] / name)
    write(models[0] / "s/taste.safetensors")
    assert listed(folders) == {"s/taste.safetensors"}


def test_folders_of_models_prefgen_for_other_things_are_no_shelves_of_adapters(folders, models, tmp_path):
    for name in ("mllm/smol/model.safetensors", "mllm_lora/taste/adapter_model.safetensors", "users/ada.safetensors"):
        write(models[1] / name)
    write(models[1] / "people/users/taste.safetensors")
    write(tmp_path / "ipadapter/users/plus.safetensors")
    assert listed(folders) == {"people/users/taste.safetensors", "ipadapter/users/plus.safetensors"}


def test_a_folder_that_cannot_be_read_hides_nothing_else(folders, models, monkeypatch):
    """Tests may run as root, whom no mode keeps out: the system's answer is given by hand."""
    write(models[0] / "locked/x.safetensors")
    write(models[0] / "taste.safetensors")
    scandir = os.scandir

    def refusing(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert listed(folders) == {"taste.safetensors"}


def test_a_name_with_the_backslashes_of_windows_is_the_same_name(folders, models):
    path = write(models[0] / "sd15/taste.safetensors")
    assert folders.adapter_path("sd15\\taste.safetensors") == path


@pytest.mark.parametrize("name", ["../far/x.safetensors", "..\\far\\x.safetensors", "/etc/passwd", "", None, ["a"], {}])
def test_what_was_not_offered_is_refused_in_a_sentence(folders, models, pack, name):
    write(models[2] / "x.safetensors")
    for node in (pack("nodes").FuseUserVector, pack("nodes").LoadPreferenceMLLM):
        answer = node.validate_inputs(name)
        assert answer is not True and answer.startswith("There is no ") and "\n" not in answer


def test_linked_mllms_and_loras_are_listed_also_in_sub_folders(folders, models, tmp_path):
    first, _, far = models
    write(far / "Qwen/Qwen3-VL/config.json")
    write(far / "Qwen/Qwen3-VL/vision/config.json")
    write(far / "._smol/config.json")
    write(far / "lora/adapter_config.json")
    (first / "mllm").symlink_to(far, target_is_directory=True)
    (first / "mllm_lora").symlink_to(far, target_is_directory=True)
    (far / "loop").symlink_to(far, target_is_directory=True)
    (tmp_path / "LLM/near").symlink_to(far / "Qwen/Qwen3-VL", target_is_directory=True)
    assert set(folders.mllms()) == {"atelier", "Qwen/Qwen3-VL", "near"}
    assert set(folders.mllm_loras()) == {"none", "lora"}
    assert folders.mllm_path("Qwen/Qwen3-VL") == first / "mllm/Qwen/Qwen3-VL"


def test_the_embedded_names_stand_for_the_embedded_files_whatever_lies_in_the_folders(folders, models, tmp_path):
    from prefgen.atelier.models import MLLM_FOLDER

    write(models[0] / "mllm/atelier/config.json")
    write(models[0] / "mllm/none/config.json")
    write(models[0] / "mllm_lora/none/adapter_config.json")
    write(models[0] / "mllm_lora/atelier/adapter_config.json")
    assert folders.mllm_path("atelier").name == MLLM_FOLDER.name and list(folders.mllms()) == ["atelier", "none"]
    assert folders.mllm_lora_path("none") is None and list(folders.mllm_loras()) == ["none", "atelier"]
