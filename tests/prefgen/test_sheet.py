"""The labelled sheet: every picture in its place with its own pixels, labels where there is room for them."""

import pytest
import torch

from prefgen.sheet import MAX_SIDE, labelled_sheet, lines


def test_every_picture_keeps_its_pixels_in_rows_and_columns():
    rows = [torch.rand(count, 48, 64, 3).mul(255).round() / 255 for count in (3, 2)]
    sheet = labelled_sheet(rows, ["ada", "bruno"], ["none", "half", "full"])
    assert sheet.shape[0] == 1 and sheet.dtype == torch.float32
    gap = 6
    left = sheet.shape[2] - 3 * (64 + gap)
    top = sheet.shape[1] - 2 * (48 + gap)
    assert left > gap and top > gap, "room for the labels"
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            y = top + number * (48 + gap)
            x = left + column * (64 + gap)
            assert torch.allclose(sheet[0, y : y + 48, x : x + 64], picture)
    assert (sheet[0, :top] < 0.5).any() and (sheet[0, :, : left - gap] < 0.5).any(), "the labels are drawn"


def test_without_labels_there_is_no_room_for_them():
    sheet = labelled_sheet([torch.ones(1, 48, 48, 3), None])
    assert sheet.shape == (1, 48 + 12, 48 + 12, 3)


def test_grey_is_repeated_and_what_is_clear_is_white_as_in_a_history():
    grey, clear = torch.full((1, 48, 48, 1), 0.2), torch.zeros(1, 48, 48, 4)
    sheet = labelled_sheet([grey, clear])
    assert torch.allclose(sheet[0, 6:54, 6:54], torch.tensor(0.2)) and (sheet[0, 60:108, 6:54] == 1).all()


@pytest.mark.parametrize("picture", [torch.full((1, 48, 48, 3), float("nan")), torch.ones(1, 48, 48, 5)])
def test_what_is_no_picture_is_named(picture, one_sentence):
    with pytest.raises(ValueError) as raised:
        labelled_sheet([torch.ones(1, 48, 48, 3), picture])
    assert "picture 1 of row 2" in one_sentence(raised)


def test_no_picture_and_too_many_are_refused_in_one_sentence(one_sentence):
    with pytest.raises(ValueError, match="connect at least one to row_1") as raised:
        labelled_sheet([None, torch.ones(0, 8, 8, 3)])
    one_sentence(raised)
    with pytest.raises(ValueError, match=f"more than {MAX_SIDE} a side") as raised:
        labelled_sheet([torch.ones(1, 1, 1, 3).expand(300, 64, 64, 3)])
    one_sentence(raised)


def test_labels_are_lines():
    assert lines("ada\n\n bruno \n\n") == ["ada", "", "bruno"] and lines("") == []
