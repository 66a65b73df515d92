"""What lies at each patch of a picture: labels from which the vision encoder learns to see before it is asked."""

from __future__ import annotations

import string
from functools import singledispatch

import numpy as np

from mllama_jax.config import VisionConfig
from mllama_jax.processing.image import choose_canvas, fit
from mllama_jax.train.batch import IGNORED
from mllama_jax.train.pictures import canvas
from mllama_jax.train.pictures.charts import CATEGORIES, Chart
from mllama_jax.train.pictures.example import Example
from mllama_jax.train.pictures.scenes import COLOURS, PLACES, SHAPES, Scene
from mllama_jax.train.pictures.text import Sign

CHARACTERS = string.digits + string.ascii_letters
# Each aspect and its number of classes, of which 0 is none. A part is a bar of a chart or a word of a sign.
CLASSES = {
    "place": 1 + len(PLACES),
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "part": 1 + 6,  # as many bars as a chart has at most
    "category": 1 + len(CATEGORIES),
    "value": 1 + 100,  # itself: no bar has the value 0
    "character": 1 + len(CHARACTERS),
    "number": 1 + 12,  # of the character in its word, none of which is longer
}
_ASPECTS = {aspect: n for n, aspect in enumerate(CLASSES)}


def patch_labels(example: Example, image: int, vision: VisionConfig) -> np.ndarray:
    """Labels int8 [C, N - 1, aspects] for the centres of the patches of picture number `image`.

    IGNORED where there is no such patch, and where a picture of this kind does not have the aspect.
    """
    picture, side = example.images[image], vision.tile // vision.patch
    rows, columns = choose_canvas(picture.height, picture.width, vision.tile, vision.max_tiles)
    height, width = fit(picture.height, picture.width, rows * vision.tile, columns * vision.tile, vision.tile)
    # The centres, in pixels of the picture.
    y = ((np.arange(rows * side) + 0.5) * vision.patch * picture.height / height)[:, None]
    x = ((np.arange(columns * side) + 0.5) * vision.patch * picture.width / width)[None]
    labels = np.full((len(CLASSES), rows * side, columns * side), IGNORED, np.int8)
    inside = (y < picture.height) & (x < picture.width)
    labels[_ASPECTS["place"]] = inside * (1 + 3 * (3 * y // picture.height) + 3 * x // picture.width)
    _mark(example.contents[image], labels, y, x)
    tiles = labels.reshape(len(CLASSES), rows, side, columns, side).transpose(1, 3, 2, 4, 0)
    tiles = tiles.reshape(rows * columns, side**2, len(CLASSES))
    missing = vision.max_tiles - len(tiles)
    return np.concatenate([tiles, np.full((missing, *tiles.shape[1:]), IGNORED, np.int8)])


@singledispatch
def _mark(content: object, labels: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
    """Write what `content` has at `y` [Y, 1], `x` [1, X] into `labels` [aspects, Y, X]."""
    raise TypeError(f"no labels for {type(content).__name__}")


@_mark.register
def _(scene: Scene, labels: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
    colour, shape = (labels[_ASPECTS[aspect]] for aspect in ("colour", "shape"))
    colour[:] = shape[:] = 0
    for thing in scene.things:
        at = (thing.box.top <= y) & (y < thing.box.bottom) & (thing.box.left <= x) & (x < thing.box.right)
        colour[at] = 1 + list(COLOURS).index(thing.colour)
        shape[at] = 1 + SHAPES.index(thing.shape)


@_mark.register
def _(chart: Chart, labels: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
    """All that is in line with a bar, its name too, knows the bar."""
    part, category, value = (labels[_ASPECTS[aspect]] for aspect in ("part", "category", "value"))
    part[:] = category[:] = value[:] = 0
    for n, bar in enumerate(chart.bars, 1):
        across = (
            (bar.box.top <= y) & (y < bar.box.bottom) if chart.horizontal else (bar.box.left <= x) & (x < bar.box.right)
        )
        at = np.broadcast_to(across, part.shape)
        part[at], category[at], value[at] = n, 1 + CATEGORIES.index(bar.name), bar.value


@_mark.register
def _(sign: Sign, labels: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
    part, character, number = (labels[_ASPECTS[aspect]] for aspect in ("part", "character", "number"))
    part[:] = character[:] = number[:] = 0
    face = canvas.font(sign.font)
    for n, (word, box) in enumerate(zip(sign.words, sign.boxes, strict=True), 1):
        edges = [box.left + face.getlength(word[:i]) for i in range(len(word) + 1)]
        for i, each in enumerate(word):
            at = (box.top <= y) & (y < box.bottom) & (edges[i] <= x) & (x < edges[i + 1])
            part[at], character[at], number[at] = n, 1 + CHARACTERS.index(each), 1 + i
