"""What all pictures share: sizes that fill the model's tiles, backgrounds, grain, fonts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageFont

from mllama_jax.config import ASPECT_RATIOS

T = TypeVar("T")
Colour = tuple[int, int, int]

TILE = 112  # pixels a side of a tile of the model that ships
_SHARES = dict(zip(ASPECT_RATIOS, (0.30, 0.12, 0.07, 0.06, 0.12, 0.20, 0.07, 0.06), strict=True))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, all equally likely (`rng.choice` would make an array of them first)."""
    return choices[int(rng.integers(len(choices)))]


def coin(rng: np.random.Generator, chance: float = 0.5) -> bool:
    return bool(rng.random() < chance)


def size(rng: np.random.Generator, ratios: Sequence[tuple[int, int]] = ASPECT_RATIOS) -> tuple[int, int]:
    """Width and height in pixels of a picture that takes one of `ratios` (height, width in tiles).

    Half of them fill the tiles, half are up to 15% smaller: never so small that fewer tiles would do.
    """
    shares = np.cumsum([_SHARES[ratio] for ratio in ratios])
    h, w = ratios[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
    fill = (1.0, 1.0) if coin(rng) else rng.uniform(0.85, 1.0, 2)
    return int(TILE * w * fill[0]), int(TILE * h * fill[1])


def ground(size: tuple[int, int], dark: bool, rng: np.random.Generator) -> Image.Image:
    """A plain light or dark background, a little tinted and shaded from corner to corner."""
    base = rng.integers(24, 52) if dark else rng.integers(228, 250)
    corners = base + rng.integers(-3, 4, (1, 1, 3)) + rng.integers(-8, 6, (2, 2, 1))
    return Image.fromarray(corners.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


@cache
def _grains() -> list[Image.Image]:
    """Noise around 128 of a standard deviation of 1, 2, 3 and 4 grey levels, larger than any picture."""
    noise = np.random.default_rng(0).normal(size=(640, 640, 3))
    return [Image.fromarray((128.5 + level * noise).clip(0, 255).astype(np.uint8)) for level in (1, 2, 3, 4)]


def grain(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """`image` clean or with mild noise, cut from a fixed sheet because drawing it anew takes longer than all shapes."""
    sheet = pick(rng, [None, *_grains()])
    if sheet is None:
        return image
    left, top = (int(rng.integers(640 - side + 1)) for side in image.size)
    noise = sheet.crop((left, top, left + image.width, top + image.height))
    return ImageChops.add(image, noise, offset=-128)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own typeface at `size` pixels an em."""
    found = ImageFont.load_default(size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so it cannot scale its font; install a regular wheel")
    return found
