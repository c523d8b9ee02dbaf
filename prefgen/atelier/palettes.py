"""The colours of each palette, RGB 0..255."""

from __future__ import annotations

Colour = tuple[int, int, int]

# ground, ground2: background; main, accent, light: the subject; ink: lines and pupils.
PALETTES: dict[str, dict[str, Colour]] = {
    "sunset": {
        "ground": (255, 170, 92),
        "ground2": (240, 104, 86),
        "main": (128, 38, 96),
        "accent": (255, 218, 96),
        "light": (255, 240, 212),
        "ink": (62, 14, 54),
    },
    "ocean": {
        "ground": (128, 206, 232),
        "ground2": (62, 156, 206),
        "main": (18, 84, 150),
        "accent": (52, 212, 200),
        "light": (232, 250, 255),
        "ink": (6, 30, 70),
    },
    "forest": {
        "ground": (172, 206, 136),
        "ground2": (104, 158, 84),
        "main": (36, 94, 50),
        "accent": (204, 150, 58),
        "light": (242, 246, 212),
        "ink": (14, 40, 22),
    },
    "pastel": {
        "ground": (252, 220, 232),
        "ground2": (208, 222, 252),
        "main": (184, 162, 232),
        "accent": (158, 226, 198),
        "light": (255, 252, 238),
        "ink": (118, 98, 152),
    },
    "neon": {
        "ground": (26, 12, 52),
        "ground2": (70, 20, 116),
        "main": (255, 36, 176),
        "accent": (36, 255, 216),
        "light": (246, 255, 84),
        "ink": (116, 84, 255),
    },
    "monochrome": {
        "ground": (224, 224, 224),
        "ground2": (178, 178, 178),
        "main": (96, 96, 96),
        "accent": (146, 146, 146),
        "light": (252, 252, 252),
        "ink": (16, 16, 16),
    },
    "earth": {
        "ground": (228, 202, 160),
        "ground2": (194, 154, 108),
        "main": (152, 72, 42),
        "accent": (104, 104, 56),
        "light": (250, 238, 214),
        "ink": (58, 34, 20),
    },
    "candy": {
        "ground": (140, 238, 226),
        "ground2": (255, 238, 116),
        "main": (255, 66, 132),
        "accent": (126, 82, 232),
        "light": (255, 255, 255),
        "ink": (108, 14, 110),
    },
}
