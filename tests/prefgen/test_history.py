"""Histories: whatever a graph or a folder holds becomes pictures, or one clear sentence."""

import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.history import MAX_ITEMS, PreferenceHistory, montage
from prefgen.pictures import LONG_SIDE, clean_picture
from tests.closeness import assert_close


def picture(height=32, width=32, channels=3, value=0.5):
    return torch.full((height, width, channels), value)


@pytest.mark.parametrize("shape", [(1, 1, 3), (8000, 50, 3), (50, 8000, 3), (33, 47, 1), (20, 30, 4), (20, 30, 2)])
def test_any_size_and_number_of_channels_becomes_a_picture(shape):
    item = PreferenceHistory.from_images([torch.rand(shape)], []).items[0]
    assert item.image.shape[-1] == 3 and max(item.image.shape) <= LONG_SIDE
    assert item.image.dtype == torch.float32 and 0 <= item.image.min() and item.image.max() <= 1


def test_grey_is_repeated_and_alpha_lies_on_white():
    grey = clean_picture(picture(channels=1, value=0.25))
    assert torch.equal(grey, picture(value=0.25))
    half = picture(channels=4, value=0.0)
    half[..., 3] = 0.25
    assert_close(clean_picture(half), picture(value=0.75), ulps=4)


def test_batches_and_single_pictures_mix_and_verdicts_alternate():
    history = PreferenceHistory.from_images([torch.rand(3, 16, 16, 3), picture()], [picture(8, 8)])
    assert [item.liked for item in history.items] == [True, False, True, True, True]
    assert len(history.liked) == 4 and len(history.disliked) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_are_named(value):
    with pytest.raises(ValueError, match="disliked picture 2 holds values that are not numbers"):
        PreferenceHistory.from_images([picture()], [picture(), picture(value=value)])


def test_no_liked_picture_is_refused():
    with pytest.raises(ValueError, match="no liked pictures"):
        PreferenceHistory.from_images([], [picture()])


def test_more_pictures_than_can_be_read_keep_the_newest_of_both_sides(caplog):
    shades = [picture(4, 4, value=i / 200) for i in range(60)]
    with caplog.at_level(logging.WARNING):
        history = PreferenceHistory.from_images(shades, shades)
    assert len(history) == MAX_ITEMS and "newest" in caplog.text
    assert len(history.liked) == len(history.disliked) == MAX_ITEMS // 2
    assert torch.equal(history.liked[-1].image, shades[-1]) and torch.equal(history.disliked[-1].image, shades[-1])


def test_a_history_of_just_as_many_as_are_read_loses_none_and_says_nothing(caplog):
    shades = [picture(4, 4, value=i / 200) for i in range(MAX_ITEMS)]
    with caplog.at_level(logging.WARNING):
        history = PreferenceHistory.from_images(shades[:30], shades[30:])
    assert not caplog.text and [len(history.liked), len(history.disliked)] == [30, MAX_ITEMS - 30]


def test_the_digest_follows_pictures_verdicts_prompts_and_order():
    a, b = picture(value=0.1), picture(value=0.9)
    digests = {
        PreferenceHistory.from_images(*args).digest
        for args in [([a, b], []), ([b, a], []), ([a], [b]), ([b], [a]), ([a, b], [], ["a cat"])]
    }
    assert len(digests) == 5
    assert PreferenceHistory.from_images([a, b], []).digest in digests


def test_prompts_may_be_fewer_than_pictures_or_more_and_hold_half_a_letter():
    for prompts, expected in (
        (["a"], ["a", ""]),
        (["a", "b", "c"], ["a", "b"]),
        (["\udce9", "b"], ["?", "b"]),
        ([], ["", ""]),
    ):
        history = PreferenceHistory.from_images([picture(), picture()], [], prompts)
        assert [item.prompt for item in history.items] == expected and len(history.digest) == 64


def test_a_folder_is_read_oldest_first_with_its_prompts(tmp_path):
    for side, names in (("liked", ["b.png", "a.jpg"]), ("disliked", ["c.webp"])):
        (tmp_path / side).mkdir()
        for name in names:
            Image.new("RGB", (20, 10), (200, 10, 10) if name[0] == "a" else (10, 10, 200)).save(tmp_path / side / name)
    os.utime(tmp_path / "liked" / "b.png", (1_700_000_100, 1_700_000_100))
    os.utime(tmp_path / "liked" / "a.jpg", (1_700_000_000, 1_700_000_000))
    (tmp_path / "liked" / "a.txt").write_text("a red\n cat ")
    (tmp_path / "liked" / "notes.md").write_text("not a picture")
    history = PreferenceHistory.from_folder(tmp_path)
    assert [item.prompt for item in history.liked] == ["a red cat", ""]
    assert history.liked[0].image[0, 0, 0] > 0.7 > history.liked[1].image[0, 0, 0]
    assert len(history.disliked) == 1


def test_every_kind_of_file_an_artist_has_is_read(tmp_path):
    (tmp_path / "liked").mkdir()
    rng = np.random.default_rng(0)
    for i, mode in enumerate(["L", "LA", "P", "RGB", "RGBA", "1"]):
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).convert(mode).save(
            tmp_path / f"liked/{i}.png"
        )
    assert len(PreferenceHistory.from_folder(tmp_path)) == 6


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not there"),
        ({}, "no pictures in its `liked`"),
        ({"liked/notes.txt": b"words"}, "no pictures in its `liked`"),
        ({"disliked/a.txt": b"words"}, "no pictures in its `liked`"),
        ({"liked/a.png": b"words"}, "a.png .* can't be read"),
        ({"liked/a.png": b""}, "a.png .* can't be read"),
    ],
)
def test_a_folder_that_is_no_history_says_so(tmp_path, files, message):
    folder = tmp_path / "mine"
    for name, data in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if files == {}:
        folder.mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PreferenceHistory.from_folder(folder)


def test_a_truncated_picture_is_named_and_the_rest_is_read(tmp_path, caplog):
    (tmp_path / "liked").mkdir()
    sound = tmp_path / "liked" / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(sound)
    (tmp_path / "liked" / "broken.png").write_bytes(sound.read_bytes()[:2000])
    history = PreferenceHistory.from_folder(tmp_path)
    assert len(history) == 1 and "broken.png" in history.left_out and "broken.png" in caplog.text
    sound.unlink()
    with pytest.raises(ValueError, match="broken.png"):
        PreferenceHistory.from_folder(tmp_path)


def test_the_montage_frames_liked_green_and_disliked_red():
    history = PreferenceHistory.from_images([picture(40, 80)] * 9, [picture(1, 1)])
    sheet = montage(history, columns=8, cell=96)
    assert sheet.shape == (1, 192, 768, 3)
    first, last = sheet[0, 3, 20], sheet[0, 99, 96 + 20]
    assert first[1] > first[0] and last[0] > last[1]
