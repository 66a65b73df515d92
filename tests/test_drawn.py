"""Dialogues that `mllama train` draws: what they hold, and recipes that ask for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mllama_jax import Mllama
from mllama_jax.errors import InputError
from mllama_jax.train.batch import IGNORED, Shape
from mllama_jax.train.chats import Reader
from mllama_jax.train.loader import Order
from mllama_jax.train.pictures import FAMILIES, held_out
from mllama_jax.train.pictures.drawn import Drawings
from mllama_jax.train.pictures.recipe import STAGES
from mllama_jax.train.recipe import Pictures, Recipe, read_recipe

STEPS = Path(__file__).parents[1] / "mllama_jax/train/pictures"


def draw(model: Mllama, pictures: Pictures, seed: int = 0, length: int = 128) -> Drawings:
    assert model.tokenizer is not None
    return Drawings(pictures, 40, seed, Reader(model.tokenizer, model.template, model.config, 1, length, "drop"))


def test_a_dialogue_is_a_function_of_seed_and_number(small: Mllama) -> None:
    every = Pictures(scenes=1, charts=1, text=1, pairs=1)
    one, again, other = (draw(small, every, seed) for seed in (0, 0, 1))
    for i in (0, 1, 2, 3, 39):
        (row, example), (same, twin), (_, stranger) = one[i], again[i], other[i]
        assert (row, example.family) == (same, FAMILIES_IN_TURN[i % 4])
        assert [each.tobytes() for each in example.images] == [each.tobytes() for each in twin.images]
        assert example.images[0].tobytes() != stranger.images[0].tobytes()
    drawn = {one[i][1].images[0].tobytes() for i in range(40)}
    kept = {example.images[0].tobytes() for family in FAMILIES for example in held_out(family, 10)}
    assert len(drawn | kept) == 80


FAMILIES_IN_TURN = ("scenes", "charts", "text", "pairs")


def test_a_batch_has_its_dialogues_answers_and_the_labels_of_its_patches(small: Mllama) -> None:
    drawings = draw(small, Pictures(scenes=1, pairs=1))
    (shape,) = Order(drawings, 3, 0).groups
    assert shape == Shape(128, 2)
    batch = drawings.batch([0, 1], 3, shape)
    assert small.tokenizer is not None
    for b in (0, 1):
        row, example = drawings[b]
        said = small.tokenizer.decode([label for label in batch.labels[b].tolist() if label != IGNORED])
        assert said.startswith(example.answer)
        assert batch.tokens[b, : len(row.tokens)].tolist() == row.tokens
    assert batch.ratio_ids[[1, 4, 5]].tolist() == [0, 0, 0]
    assert (batch.labels[2] == IGNORED).all()
    shown = (batch.patches != IGNORED).any(axis=(1, 2, 3))
    assert shown.tolist() == [True, False, True, True, False, False]
    assert batch.patches.shape == (6, 4, 16, 8)


def test_questions_that_do_not_fit_are_left_out(small: Mllama) -> None:
    long, short = (draw(small, Pictures(scenes=1), length=length) for length in (128, 64))
    lengths = [(len(long[i][0].tokens), len(short[i][0].tokens)) for i in range(40)]
    assert all(b <= 64 and b <= a for a, b in lengths)
    assert any(b < a for a, b in lengths)
    with pytest.raises(InputError, match="length: expected room for a question, 128 tokens, got 8"):
        draw(small, Pictures(scenes=1), length=8)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data: missing; a recipe has to say it, or have a table [pictures]"),
        (
            {"data": "chats.jsonl", "pictures": {"scenes": 1}},
            "pictures: drawn in place of data; expected one of the two",
        ),
        ({"pictures": {}}, "pictures: expected some of scenes, charts, text, pairs, got none"),
        ({"pictures": {"scenes": -1}}, "pictures.scenes: expected at least 0, got -1"),
        ({"pictures": {"maps": 1}}, "pictures.maps: not known; known are scenes, charts, text, pairs, patches"),
        ({"pictures": {"text": 1}, "loss": "preference"}, "pictures: dialogues with one answer; expected loss 'superv"),
        ({"pictures": {"text": 1}, "too_long": "cut"}, "too_long: does nothing where all chats are drawn"),
        (
            {"data": "chats.jsonl", "lora": {"rank": 16}},
            "lora: does nothing beside part 'full'; leave it out, or choose ",
        ),
        ({"data": "chats.jsonl", "beta": 0.1}, "beta: does nothing beside loss 'supervised'; leave it out, or choose "),
        ({"data": "chats.jsonl", "beta": 0.0, "loss": "preference"}, "beta: expected more than 0, got 0.0"),
        ({"data": "chats.jsonl", "workers": -1}, "workers: expected at least 0, got -1"),
        ({"data": "chats.jsonl", "seed": -1}, "seed: expected at least 0, got -1"),
        ({"data": "chats.jsonl", "b2": 1.0}, "b2: expected a part between 0 and 1, got 1.0"),
    ],
)
def test_what_no_recipe_can_say(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    lines = ['model = "m"', 'part = "full"', "steps = 1"]
    lines += [f"{name} = {value!r}" for name, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {value}" for key, value in table.items())]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        read_recipe(tmp_path / "recipe.toml")
    assert str(error.value).startswith(f"{tmp_path / 'recipe.toml'}: {message}")


def test_the_stages_begin_where_the_one_before_ended() -> None:
    recipes: list[Recipe] = [read_recipe(STEPS / f"{stage}.toml") for stage in STAGES]
    begun = [Path(recipe.model).relative_to(STEPS).as_posix() for recipe in recipes]
    assert begun == ["start", "first/model", "second/model"]
    for recipe in recipes:
        assert recipe.pictures is not None
        assert recipe.samples % len(recipe.pictures.families()) == 0
    same = [
        dataclasses.replace(r, model="", held_out="", steps=1, samples=1, seed=0, pictures=Pictures(text=1))
        for r in recipes
    ]
    assert same[0] == same[1] == same[2]
