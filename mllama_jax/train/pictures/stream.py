"""Streams of examples: endless ones to train on, and a fixed held-out split that they never meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from mllama_jax.errors import InputError
from mllama_jax.train.pictures import charts, pairs, scenes, text
from mllama_jax.train.pictures.example import Example

FAMILIES: dict[str, Callable[[np.random.Generator], Example]] = {
    "scenes": scenes.sample,
    "charts": charts.sample,
    "text": text.sample,
    "pairs": pairs.sample,
}
_TRAINING, _HELD_OUT = 0, 1  # the first word of every seed


def sample(family: str, rng: np.random.Generator) -> Example:
    """An example of `family`, one of FAMILIES; InputError for any other."""
    if family not in FAMILIES:
        raise InputError(f"picture family {family!r} is not known; expected {' or '.join(FAMILIES)}")
    return FAMILIES[family](rng)


def training_seed(seed: int, number: int) -> list[int]:
    """What the random numbers of a training stream, or of one of its dialogues, begin from."""
    return [_TRAINING, seed, number]


def training(seed: int, worker: int, shares: Mapping[str, float] | None = None) -> Iterator[Example]:
    """The endless stream of one worker: families mixed by `shares` (of any sum), in equal parts where not given."""
    shares = shares or dict.fromkeys(FAMILIES, 1.0)
    families, bounds = list(shares), np.cumsum(list(shares.values()))
    rng = np.random.default_rng(training_seed(seed, worker))
    while True:
        yield sample(families[int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))], rng)


def held_out(family: str, n: int) -> Iterator[Example]:
    """The first `n` examples of the family's held-out split: always the same ones, each seeded by itself."""
    for i in range(n):
        yield sample(family, np.random.default_rng([_HELD_OUT, *family.encode(), i]))


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """Each question with the next example's pictures: what a model scores here it scores without looking."""
    if len(examples) < 2:
        raise InputError(f"shuffling pictures takes at least 2 examples, got {len(examples)}")
    others = [*examples[1:], examples[0]]
    return [
        dataclasses.replace(example, images=other.images, contents=other.contents, boxes=())
        for example, other in zip(examples, others, strict=True)
    ]
