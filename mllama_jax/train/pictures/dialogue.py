"""Further questions about a picture already drawn, so that one picture teaches several times and chats are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mllama_jax.train.pictures import charts, pairs, scenes, text
from mllama_jax.train.pictures.canvas import coin, pick
from mllama_jax.train.pictures.charts import Chart
from mllama_jax.train.pictures.example import ORDINALS, Asked, Example
from mllama_jax.train.pictures.scenes import PLACES, Scene


def dialogue(example: Example, rng: np.random.Generator) -> list[Example]:
    """Up to five questions about an example's pictures, its own among them; often the last asks for all there is.

    Such a list names every thing with its place: a model learns from it where to look long before single questions
    would teach it. It comes last because whatever follows it could be read off it.
    """
    asked = [_further(example, rng) for _ in range(int(rng.integers(4)))]
    further = [
        dataclasses.replace(example, question=each.question, answer=each.answer, boxes=each.boxes)
        for each in [*asked, everything(example.contents, rng) if coin(rng, 0.6) else None]
        if each is not None
    ]
    return [example, *further]


def _further(example: Example, rng: np.random.Generator) -> Asked | None:
    """A question of a random kind, where the example's pictures allow it."""
    if example.family == "pairs":
        return pairs.KINDS[pick(rng, tuple(pairs.KINDS))](example.contents, rng.random(), rng)
    kinds = {"scenes": scenes.KINDS, "charts": charts.KINDS, "text": text.KINDS}[example.family]
    return kinds[pick(rng, tuple(kinds))](example.contents[0], rng)


def everything(contents: Sequence[object], rng: np.random.Generator) -> Asked | None:
    """Ask for all that a chart, a scene, or one of two scenes shows, in reading order."""
    n = int(rng.integers(len(contents)))
    content = contents[n]
    if isinstance(content, Scene):
        things = sorted(content.things, key=lambda thing: PLACES.index(thing.place))
        answer = ", ".join(f"{thing.colour} {thing.shape} {scenes.at(thing.place)}" for thing in things)
        if len(contents) > 1:
            ask = (f"What is in the {ORDINALS[n]} picture?", f"Describe the {ORDINALS[n]} picture.")
        else:
            ask = ("What is in the picture?", "Describe the picture.", "List all shapes.")
        return Asked(pick(rng, ask), answer, tuple(thing.box for thing in things))
    if isinstance(content, Chart):
        answer = ", ".join(f"{bar.name} {bar.value}" for bar in content.bars)
        ask = ("What does the chart show?", "Describe the chart.", "List all bars.")
        return Asked(pick(rng, ask), answer, tuple(bar.box for bar in content.bars))
    return None
