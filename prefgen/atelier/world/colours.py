"""Palettes, and how the continuous traits hue and saturation move a whole palette in OKLab.

OKLab: Björn Ottosson, "A perceptual color space for image processing" (2020); the matrices are from there.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# ground, ground2: the background; floor: what stands under a setting; main, second, accent, light, ink, wood, leaf,
# skin, glow: what drawings are made of.
ROLES = ("ground", "ground2", "floor", "main", "second", "accent", "light", "ink", "wood", "leaf", "skin", "glow")

_HEX = {
    "sunset": "ffba78 f47860 c44e5c 962c68 ec565c ffd662 fff3da 3a1038 7a3e46 748048 facca8 ffec96",
    "ocean": "96d6ec 58aad6 dece9e 145c9c 2698ba ffa07a eefaff 0a2248 70788c 34a08c f4d6be dcfaff",
    "forest": "c4daa0 8cb66c 70824a 2c683c a45a34 dea442 f4f6dc 162a1c 704c30 548e46 eecea8 faf0aa",
    "pastel": "fce0ea d4e2fc e2d4f0 baa4e8 fab2be 9edec6 fffcf2 68588e ceb0a6 aadab0 fce0ce fff6c8",
    "neon": "1c0e38 42166e 2c1054 ff2caa ff8c28 28fad6 f8ffc4 7a5cff c846c8 3ce678 ffbea0 f6ff54",
    "monochrome": "e0e0e0 b8b8b8 969696 606060 8a8a8a b4b4b4 fcfcfc 141414 6c6c6c 7e7e7e dcdcdc f4f4f4",
    "earth": "e8d0a8 cca87a ac8058 a05030 6e6c3e de963e faf0da 3e2618 70482e 7c7c40 e8c096 f8e2a0",
    "candy": "96ece4 ffe882 ffaac8 ff4e8c 8258e8 ffce3c ffffff 621468 ce6e5a 56ce78 ffd6b8 fff696",
}
PALETTES: dict[str, np.ndarray] = {
    name: np.array([[int(word[i : i + 2], 16) for i in (0, 2, 4)] for word in words.split()], float)
    for name, words in _HEX.items()
}

_TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] of 0..255 -> OKLab (lightness 0..1, a, b)."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """The inverse of `to_oklab`; what sRGB can't show is clipped."""
    linear = (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    linear = np.clip(linear, 0, 1)
    share = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return share * 255


@lru_cache(maxsize=256)
def palette(name: str, hue: float, saturation: float) -> dict[str, tuple[int, int, int]]:
    """{role: colour} of a palette, turned by `hue` degrees and its chroma scaled by `saturation`."""
    lab = to_oklab(PALETTES[name])
    angle = np.deg2rad(hue)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    lab[:, 1:] = lab[:, 1:] @ turn * saturation
    rounded = np.round(from_oklab(lab)).astype(int)
    return {role: tuple(colour) for role, colour in zip(ROLES, rounded.tolist(), strict=True)}


def mixed(one: tuple[int, int, int], two: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """`share` of the way from one colour to the other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, two, strict=True))
    return red, green, blue
