"""A guard whose weights are written by hand: what it reads is unsafe by S9 where there is an exclamation mark in it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np

from mllama_jax.convert.export import write_hf
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.train.pictures import recipe, tokenizer
from tests.conftest import TINY

CONFIG = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, layers=2, context=2048))
ANSWERS = ("safe", "unsafe\nS9")  # no letter has two successors but where the mark decides
NEXT, DOUBT, MARK, SEEN = 1e4, 1 - 1e-4, 40, 41  # sizes, and two places in the width


def write_guard(directory: Path) -> Path:
    """Write the guard as a Hugging Face checkpoint.

    A token's embedding says which it is, and the head what follows it. The first layer's attention, which looks
    everywhere alike, tells how much of what was read is the mark: of two tokens that may follow, the likelier loses.
    """
    tokenizer.write(directory)
    words = Tokenizer.from_directory(directory)
    shapes = jax.eval_shape(lambda: recipe.start(jax.random.key(0), CONFIG))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    text = params["text"]
    for name in ("attention_norm", "mlp_norm"):
        text["layers_0"][name]["scale"] += 1
    text["final_norm"]["scale"] += 1
    text["embedding"][:, MARK - 1] = 1
    text["embedding"][words.encode("!", specials=False)] = np.eye(1, 64, MARK)
    text["layers_0"]["attention"]["kv"]["kernel"][1, 0, 0, MARK] = 1
    text["layers_0"]["attention"]["out"]["kernel"][SEEN, 0] = 1e3
    safe, unsafe = (
        [words.special("<|end_header_id|>"), *words.encode(answer, specials=False), words.special("<|eot_id|>")]
        for answer in ANSWERS
    )
    places = {token: place for place, token in enumerate(dict.fromkeys([*safe, *unsafe]))}
    for token, place in places.items():
        text["embedding"][token] = NEXT * np.eye(1, 64, place)
    head = text["head"]["kernel"]
    for before, token in itertools.pairwise(safe):
        head[token, places[before]] = 1
    for before, token in itertools.pairwise(unsafe):
        if head[token, places[before]] == 0:
            doubtful = before in (safe[0], safe[-2])
            head[token, places[before]] = DOUBT if doubtful else 1
            head[token, SEEN] = doubtful
    write_hf(directory, params, CONFIG, np.dtype("float32"))
    return directory
