"""Two scenes and a question that takes both, or that says which of the two it is about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllama_jax.train.pictures import canvas, scenes
from mllama_jax.train.pictures.canvas import pick
from mllama_jax.train.pictures.example import ORDINALS, Asked, Box, Example
from mllama_jax.train.pictures.scenes import COLOURS, SHAPES, Scene, Way, a, boxes, noun

_RATIOS = ((1, 1), (1, 2), (2, 1), (2, 2))
_WAYS = [(colour, shape) for colour in (None, *COLOURS) for shape in (None, *SHAPES)]


def _found(pair: Sequence[Scene], way: Way) -> tuple[Box, ...]:
    return tuple(box for scene in pair for box in boxes(scene.find(*way)))


def _more(pair: Sequence[Scene], lot: float, rng: np.random.Generator) -> Asked | None:
    answer = (*ORDINALS[:2], "the same")[int(3 * lot)]
    ways = []
    for way in _WAYS:
        first, second = (len(scene.find(*way)) for scene in pair)
        if (first or second) and answer == ("first" if first > second else "second" if second > first else "the same"):
            ways.append(way)
    if not ways:
        return None
    way = pick(rng, ways)
    ask = pick(rng, ("Which picture has more {}, the first or the second?", "Which of the pictures shows more {}?"))
    return Asked(ask.format(noun(*way, many=True)), answer, _found(pair, way))


def _both(pair: Sequence[Scene], lot: float, rng: np.random.Generator) -> Asked | None:
    """Where the answer is no, one of the pictures does have the thing."""
    yes = lot < 0.5
    ways = [way for way in _WAYS[1:] if sum(bool(scene.find(*way)) for scene in pair) == (2 if yes else 1)]
    if not ways:
        return None
    way = pick(rng, ways)
    ask = pick(rng, ("Do both pictures have {}?", "Is there {} in both pictures?"))
    return Asked(ask.format(a(noun(*way))), "yes" if yes else "no", _found(pair, way))


def _one(pair: Sequence[Scene], lot: float, rng: np.random.Generator) -> Asked | None:
    """A question about a scene, asked of one of the two."""
    n = int(2 * lot)
    asked = scenes.KINDS[pick(rng, ("shape", "colour", "place", "count"))](pair[n], rng)
    if asked is None:
        return None
    question = asked.question[0].lower() + asked.question[1:]
    return asked._replace(question=f"In the {ORDINALS[n]} picture, {question}")


KINDS = {"more": _more, "both": _both, "one": _one}


def sample(rng: np.random.Generator) -> Example:
    """A question of a random kind about two random scenes."""
    kind = pick(rng, tuple(KINDS))
    lot = rng.random()  # decides the answer where it can: drawn once, or those would be rarer that few scenes allow
    while True:
        pair = [scenes.compose(rng, size=canvas.size(rng, _RATIOS), image=n) for n in range(2)]
        asked = KINDS[kind](pair, lot, rng)
        if asked is not None:
            images = tuple(scenes.render(scene, rng) for scene in pair)
            return Example(images, asked.question, asked.answer, f"pairs/{kind}", asked.boxes, tuple(pair))
