"""What lies at each patch of a scene: labels from which the vision encoder learns to see before it is asked."""

from __future__ import annotations

import numpy as np

from mllama_jax.config import VisionConfig
from mllama_jax.processing.image import choose_canvas, fit
from mllama_jax.train.pictures.example import Example
from mllama_jax.train.pictures.scenes import COLOURS, PLACES, SHAPES, Scene
from mllama_jax.train.step import IGNORED

CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(PLACES))  # colour, shape, place; 0 is none


def patch_labels(example: Example, image: int, vision: VisionConfig) -> np.ndarray:
    """Labels int8 [C, N - 1, 3] for the centres of the patches of picture number `image`; all three only of scenes."""
    picture, side = example.images[image], vision.tile // vision.patch
    rows, columns = choose_canvas(picture.height, picture.width, vision.tile, vision.max_tiles)
    height, width = fit(picture.height, picture.width, rows * vision.tile, columns * vision.tile, vision.tile)
    y = (np.arange(rows * side) + 0.5) * vision.patch * picture.height / height  # in pixels of the picture
    x = (np.arange(columns * side) + 0.5) * vision.patch * picture.width / width
    labels = np.zeros((3, len(y), len(x)), np.int8)
    inside = (y < picture.height)[:, None] & (x < picture.width)
    labels[2] = inside * (1 + 3 * (3 * y // picture.height)[:, None] + 3 * x // picture.width)
    scene = example.contents[image] if len(example.contents) > image else None
    if isinstance(scene, Scene):
        for thing in scene.things:
            box = thing.box
            at = ((box.top <= y) & (y < box.bottom))[:, None] & ((box.left <= x) & (x < box.right))
            labels[0][at] = 1 + list(COLOURS).index(thing.colour)
            labels[1][at] = 1 + SHAPES.index(thing.shape)
    else:
        labels[:2] = IGNORED
    tiles = labels.reshape(3, rows, side, columns, side).transpose(1, 3, 2, 4, 0).reshape(rows * columns, side**2, 3)
    return np.concatenate([tiles, np.full((vision.max_tiles - len(tiles), side**2, 3), IGNORED, np.int8)])
