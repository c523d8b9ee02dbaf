"""Histories at ComfyUI's door: what the combo offers, what is said of a folder that lacks something, what is told."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image


@pytest.fixture
def root(tmp_path, pack):
    """input/prefgen of a ComfyUI with an input folder of its own."""
    import folder_paths

    pack("prefgen.comfy.folders")
    before = folder_paths.get_input_directory()
    folder_paths.set_input_directory(str(tmp_path))
    (tmp_path / "prefgen").mkdir()
    yield tmp_path / "prefgen"
    folder_paths.set_input_directory(before)


def put(file, size=(6, 4)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(file)


def offered(folders):
    return [name for name in folders.histories() if not name.startswith("example: ")]


def test_the_combo_offers_what_works_and_nothing_else(root, pack, tmp_path):
    put(root / "ada" / "liked" / "a.png")
    put(root / "Bea" / "LIKED" / "a.tif")
    put(root / "loose" / "a.gif")
    put(root / ".hidden" / "liked" / "a.png")
    put(root / "__MACOSX" / "liked" / "a.png")
    put(root / "grudges" / "disliked" / "a.png")
    put(root / "only hidden" / "liked" / ".a.png")
    (root / "empty").mkdir()
    (root / "hollow" / "liked").mkdir(parents=True)
    (root / "texts" / "liked").mkdir(parents=True)
    (root / "texts" / "liked" / "a.txt").write_text("a boat")
    put(tmp_path / "elsewhere" / "liked" / "a.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    put(root / "picture.png")
    assert sorted(offered(pack("prefgen.comfy.folders"))) == ["Bea", "ada", "linked", "loose"]


@pytest.mark.parametrize("name", ["empty", "grudges"])
def test_a_folder_that_was_emptied_says_what_it_lacks_and_another_name_says_that_there_is_none(root, pack, name):
    put(root / "grudges" / "disliked" / "a.png")
    (root / "empty").mkdir()
    node = pack("nodes.history").LoadPreferenceHistory
    said = node.validate_inputs(name)
    assert name in said and "no pictures in its `liked`" in said
    for nowhere in ("nobody", "../ada", "", ".", "prefgen"):
        assert "There is no history named" in node.validate_inputs(nowhere)


def test_the_node_reads_what_it_can_and_tells_the_artist_the_rest(root, pack, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext

    for number in range(3):
        put(root / "ada" / "liked" / f"{number}.png", (6 + number, 4))
        os.utime(root / "ada" / "liked" / f"{number}.png", (1_700_000_000 - number,) * 2)
    (root / "ada" / "liked" / "broken.png").write_bytes(b"words")
    messages = []
    instance = SimpleNamespace(send_progress_text=lambda *said: messages.append(said))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    with CurrentNodeContext("prompt", "17"):
        liked, disliked = pack("nodes.history").LoadPreferenceHistory.execute("ada").args[:2]
    assert [image.shape for image in liked] == [(1, 4, 8, 3), (1, 4, 7, 3), (1, 4, 6, 3)] and disliked == []
    ((sentence, node),) = messages
    assert node == "17" and "broken.png" in sentence and "isn't a picture" in sentence


def test_reading_moves_comfyuis_progress_bar_and_stops_at_its_interrupt(root, pack, progress):
    import comfy.model_management

    for number in range(3):
        put(root / "ada" / "liked" / f"{number}.png")
    node = pack("nodes.history").LoadPreferenceHistory
    node.execute("ada")
    assert progress == [(1, 3), (2, 3), (3, 3)]
    try:
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node.execute("ada")
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert len(progress) == 3


def test_a_folder_and_core_load_image_give_the_same_history(root, pack):
    import folder_paths

    from nodes import LoadImage

    pixels = torch.randint(0, 256, (700, 1500, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (root / "ada" / "liked").mkdir(parents=True)
    Image.fromarray(pixels.numpy()).save(root / "ada" / "liked" / "a.png", compress_level=1)
    liked, _ = pack("nodes.history").LoadPreferenceHistory.execute("ada").args[:2]
    assert folder_paths.get_input_directory() == str(root.parent)
    connected, _ = LoadImage().load_image("prefgen/ada/liked/a.png")
    read = pack("prefgen.history").PreferenceHistory.from_images
    assert read(liked).digest == read([connected]).digest


def test_the_fingerprint_of_the_node_follows_the_folder(root, pack):
    put(root / "ada" / "liked" / "a.png")
    node = pack("nodes.history").LoadPreferenceHistory
    before = node.fingerprint_inputs("ada")
    assert node.fingerprint_inputs("ada") == before
    (root / "ada" / "liked" / "a.txt").write_text("a boat")
    assert node.fingerprint_inputs("ada") != before


def test_prompts_go_with_their_pictures_into_what_the_mllm_reads(pack, tmp_path, monkeypatch):
    import torch

    encode = pack("nodes.history").EncodePreferenceHistory
    read = []
    monkeypatch.setattr(pack("prefgen.comfy.encoding"), "encode_history", lambda history, *_: read.append(history))
    liked = [torch.rand(1, 8, 8, 3), torch.rand(2, 8, 8, 3)]
    encode.execute(liked, liked_prompts=["a boat", "", "an owl"], disliked=[torch.rand(1, 8, 8, 3)])
    assert [(item.prompt, item.liked) for item in read[0].items] == [
        ("a boat", True), ("", False), ("", True), ("an owl", True),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="3 pictures and 2 prompts don't go together"):
        encode.execute(liked, liked_prompts=["a boat", "an owl"])
    with pytest.raises(ValueError, match="0 pictures and 1 prompts"):
        encode.execute(liked, disliked_prompts=["a boat"])
    loaded = pack("nodes.history").LoadPreferenceHistory.execute("example: ada").args
    assert [len(part) for part in loaded] == [8, 8, 8, 8] and all(isinstance(text, str) and text for text in loaded[2])
