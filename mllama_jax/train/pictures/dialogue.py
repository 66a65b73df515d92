"""Further questions about a picture already drawn, so that one picture teaches several times and chats are learned."""

from __future__ import annotations

import dataclasses

import numpy as np

from mllama_jax.train.pictures import charts, scenes, text
from mllama_jax.train.pictures.canvas import pick
from mllama_jax.train.pictures.example import Example


def follow_ups(example: Example, count: int, rng: np.random.Generator) -> list[Example]:
    """Up to `count` more questions about a single picture; none about pairs."""
    kinds = {"scenes": scenes.KINDS, "charts": charts.KINDS, "text": text.KINDS}.get(example.family)
    if kinds is None:
        return []
    asked = [kinds[pick(rng, tuple(kinds))](example.contents[0], rng) for _ in range(count)]
    return [
        dataclasses.replace(example, question=each.question, answer=each.answer, boxes=each.boxes)
        for each in asked
        if each is not None
    ]
