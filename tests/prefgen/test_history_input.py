"""Histories, the rarer guests: odd sizes, transparency, rotated and damaged files, and what a picture is known by."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.history import MAX_ITEMS, HistoryItem, PreferenceHistory, montage
from tests.closeness import FAR, difference


def picture(height=8, width=8, channels=3, seed=0):
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().numpy()).save(path)


def only(history):
    (item,) = history.items
    return item.image


@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_transparent_becomes_white(channels):
    image = picture(channels=channels)
    image[:4, :, -1] = 0
    image[4:, :, -1] = 1
    cleaned = only(PreferenceHistory.from_images([image]))
    assert torch.equal(cleaned[:4], torch.ones(4, 8, 3))
    assert torch.equal(cleaned[4:], image[4:, :, :-1].expand(-1, -1, 3))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, (1, 1)), (50, 8000, (6, 1024)), (8000, 50, (1024, 6)), (1, 8000, (1, 1024)), (1024, 7, (1024, 7))],
)
def test_shapes_are_kept_up_to_a_long_side_of_1024(height, width, expected):
    image = picture(height, width)
    cleaned = only(PreferenceHistory.from_images([image]))
    assert cleaned.shape == (*expected, 3)
    if expected == (height, width):
        assert torch.equal(cleaned, image)


def test_values_outside_0_to_1_are_cut_and_the_input_stays_as_it_was():
    image = picture() * 3 - 1
    before = image.clone()
    cleaned = only(PreferenceHistory.from_images([image]))
    assert torch.equal(cleaned, before.clamp(0, 1))
    assert torch.equal(image, before)


@pytest.mark.parametrize("count", [1, 40])
def test_one_picture_is_a_history_and_so_are_forty(count):
    history = PreferenceHistory.from_images([torch.rand(count, 4, 4, 3)])
    assert len(history) == len(history.liked) == count


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["liked", "disliked"])
def test_one_value_that_is_not_a_number_names_the_picture(bad, side, one_sentence):
    good, broken = picture(), picture(seed=1)
    broken[3, 3, 1] = bad
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_images(**{"liked": [good], "disliked": []} | {side: [good, broken]})
    assert f"{side} picture 2" in one_sentence(raised)


@pytest.mark.parametrize("disliked", [[], [picture()]])
def test_nothing_liked_is_one_sentence(disliked, one_sentence):
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_images([], disliked)
    assert "`liked`" in one_sentence(raised)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 4, 0), (4, 4, 5)])
def test_what_is_no_picture_is_refused(shape, one_sentence):
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_images([torch.zeros(shape)])
    assert "that of a picture" in one_sentence(raised)


@pytest.mark.parametrize(("liked", "disliked"), [(100, 0), (100, 10), (60, 60), (1, 100)])
def test_of_a_long_history_the_newest_pictures_of_each_side_are_read(liked, disliked, caplog):
    sides = [[torch.full((1, 1, 3), i / 255) for i in range(count)] for count in (liked, disliked)]
    with caplog.at_level(logging.WARNING):
        history = PreferenceHistory.from_images(*sides)
    assert str(MAX_ITEMS) in caplog.text and len(history) == MAX_ITEMS
    for items, count in ((history.liked, liked), (history.disliked, disliked)):
        numbers = [round(item.image[0, 0, 0].item() * 255) for item in items]
        assert numbers == list(range(count - len(items), count))
        assert bool(items) == bool(count)


def test_a_picture_is_known_by_its_8_bit_values_and_size_alone():
    image = (picture() * 255).round() / 255
    digest = HistoryItem(image, True).digest
    assert HistoryItem(image + 1e-4, False, "a boat").digest == digest
    changed = image.clone()
    changed[0, 0, 0] += 1 / 255 if changed[0, 0, 0] < 0.5 else -1 / 255
    assert HistoryItem(changed, True).digest != digest
    assert HistoryItem(image.reshape(4, 16, 3), True).digest != digest


def test_of_a_folder_the_newest_are_read_up_to_the_limit(tmp_path):
    for i in range(5):
        save(tmp_path / "liked" / f"{i}.PNG", torch.full((2, 2, 3), i / 255))
    history = PreferenceHistory.from_folder(tmp_path, limit=2)
    assert [round(item.image[0, 0, 0].item() * 255) for item in history.items] == [3, 4]


def test_transparent_rotated_and_palette_files_look_as_in_a_viewer(tmp_path):
    folder = tmp_path / "liked"
    folder.mkdir()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "a_clear.png")
    Image.new("P", (4, 4), 0).save(folder / "b_palette.png", transparency=0)
    turned = Image.new("RGB", (6, 2), (10, 20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright
    turned.save(folder / "c_turned.png", exif=exif)
    clear, palette, turned = (item.image for item in PreferenceHistory.from_folder(tmp_path).items)
    assert torch.equal(clear, torch.ones(4, 4, 3)) and torch.equal(palette, torch.ones(4, 4, 3))
    assert turned.shape == (6, 2, 3)


def test_16_bit_grey_files_keep_their_tones(tmp_path):
    (tmp_path / "liked").mkdir()
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "liked" / "a.png")
    assert set((only(PreferenceHistory.from_folder(tmp_path)) * 255).round().flatten().tolist()) <= {127.0, 128.0}


def test_a_missing_folder_is_named_without_the_path_of_the_machine(tmp_path, one_sentence):
    with pytest.raises(FileNotFoundError) as raised:
        PreferenceHistory.from_folder(tmp_path / "nobody")
    assert "nobody" in one_sentence(raised) and str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("files", [[], ["liked"], ["disliked/a.png"], [".a.png"]])
def test_a_folder_without_liked_pictures_says_where_to_put_them(tmp_path, files, one_sentence):
    folder = tmp_path / "ada"
    folder.mkdir()
    for name in files:
        if name.endswith(".png"):
            save(folder / name, picture())
        else:
            (folder / name).mkdir()
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_folder(folder)
    assert "ada" in one_sentence(raised) and "`liked`" in str(raised.value)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "folder"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_that_cannot_be_read_is_named_and_the_rest_is_read(tmp_path, damage, suffix, one_sentence):
    save(tmp_path / "ada" / "liked" / "a.png", picture())
    broken = tmp_path / "ada" / "disliked" / f"b.{suffix}"
    save(broken, picture(64, 64))
    content = broken.read_bytes()
    broken.unlink()
    if damage == "folder":
        broken.mkdir()
    else:
        broken.write_bytes({"empty": b"", "text": b"likes boats", "truncated": content[: len(content) // 2]}[damage])
    history = PreferenceHistory.from_folder(tmp_path / "ada")
    assert len(history) == 1 and f"{broken.name} in ada/disliked" in history.left_out
    (tmp_path / "ada" / "liked" / "a.png").unlink()
    broken.rename(tmp_path / "ada" / "liked" / broken.name)
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_folder(tmp_path / "ada")
    assert broken.name in one_sentence(raised) and "ada/liked" in str(raised.value)


def test_the_montage_shows_thin_and_large_pictures_whole():
    sizes = [(1, 1), (1024, 6), (6, 1024), (200, 200)]
    history = PreferenceHistory.from_images([torch.full((*size, 3), 0.5) for size in sizes])
    sheet = montage(history, columns=8, cell=96)
    assert sheet.shape == (1, 96, 4 * 96, 3)
    assert torch.isfinite(sheet).all() and sheet.min() >= 0 and sheet.max() <= 1
    for cell in sheet[0].split(96, 1):
        # Thin pictures are one pixel wide.
        assert difference(cell[46:50, 46:50], torch.full((4, 4, 3), 0.5), dim=-1).min() < FAR
