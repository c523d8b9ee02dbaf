"""The sheet that shows what was read: every pixel of it."""

import numpy as np
import torch

from prefgen.history import DISLIKED_BORDER, LIKED_BORDER, PreferenceHistory, montage

GROUND, CELL, GAP, FRAME = 0.13, 96, 2, 4  # px: of a cell, around its frame, of the frame


def test_each_picture_stands_in_the_middle_of_its_frame_liked_ones_first():
    """Of the pictures' own size, so that nothing is resampled: 84 px within the frame."""
    sizes = [(84, 84), (42, 84), (84, 20)]
    liked = [torch.full((*size, 3), 0.5) for size in sizes]
    disliked = [torch.rand(84, 60, 3, generator=torch.Generator().manual_seed(0))]
    sheet = montage(PreferenceHistory.from_images(liked, disliked), columns=3, cell=CELL)

    expected = np.full((2 * CELL, 3 * CELL, 3), GROUND, np.float32)
    for number, picture in enumerate([*liked, *disliked]):
        row, column = divmod(number, 3)
        cell = expected[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell[GAP:-GAP, GAP:-GAP] = LIKED_BORDER if number < 3 else DISLIKED_BORDER
        cell[GAP + FRAME : -GAP - FRAME, GAP + FRAME : -GAP - FRAME] = GROUND
        height, width = picture.shape[:2]
        top, left = (CELL - height) // 2, (CELL - width) // 2
        cell[top : top + height, left : left + width] = picture.numpy()
    assert sheet.shape == (1, *expected.shape)
    # Pictures are kept in 8 bits.
    np.testing.assert_allclose(sheet[0].numpy(), expected, atol=0.5 / 255 + 1e-6)


def test_liked_is_green_and_disliked_is_red():
    assert LIKED_BORDER[1] == max(LIKED_BORDER) and DISLIKED_BORDER[0] == max(DISLIKED_BORDER)


def test_a_large_picture_fills_its_frame_and_few_pictures_make_few_columns():
    sheet = montage(PreferenceHistory.from_images([torch.ones(300, 600, 3)] * 2))
    assert sheet.shape == (1, 96, 192, 3)
    white = (sheet[0, :, :96] > 0.99).all(-1)
    assert white.any(1).sum() == 42 and white.any(0).sum() == 84
