"""Further questions about a picture already drawn, so that one picture teaches several times and chats are learned."""

from __future__ import annotations

import dataclasses

import numpy as np

from mllama_jax.train.pictures import charts, scenes, text
from mllama_jax.train.pictures.canvas import coin, pick
from mllama_jax.train.pictures.charts import Chart
from mllama_jax.train.pictures.example import Asked, Example
from mllama_jax.train.pictures.scenes import PLACES, Scene


def dialogue(example: Example, rng: np.random.Generator) -> list[Example]:
    """Up to five questions about an example's picture, its own among them; often the last asks for all there is.

    Such a list names every thing with its place: a model learns from it where to look long before single questions
    would teach it. It comes last because whatever follows it could be read off it.
    """
    kinds = {"scenes": scenes.KINDS, "charts": charts.KINDS, "text": text.KINDS}.get(example.family)
    if kinds is None:
        return [example]
    content = example.contents[0]
    asked = [kinds[pick(rng, tuple(kinds))](content, rng) for _ in range(int(rng.integers(4)))]
    further = [
        dataclasses.replace(example, question=each.question, answer=each.answer, boxes=each.boxes)
        for each in [*asked, everything(content, rng) if coin(rng, 0.6) else None]
        if each is not None
    ]
    return [example, *further]


def everything(content: object, rng: np.random.Generator) -> Asked | None:
    """Ask for all that a scene or chart shows, in reading order."""
    if isinstance(content, Scene):
        things = sorted(content.things, key=lambda thing: PLACES.index(thing.place))
        answer = ", ".join(f"{thing.colour} {thing.shape} {scenes.at(thing.place)}" for thing in things)
        ask = ("What is in the picture?", "Describe the picture.", "List all shapes.")
        return Asked(pick(rng, ask), answer, tuple(thing.box for thing in things))
    if isinstance(content, Chart):
        answer = ", ".join(f"{bar.name} {bar.value}" for bar in content.bars)
        ask = ("What does the chart show?", "Describe the chart.", "List all bars.")
        return Asked(pick(rng, ask), answer, tuple(bar.box for bar in content.bars))
    return None
