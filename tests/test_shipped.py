"""The checkpoint that ships: its size and files, and that it answers by looking."""

from __future__ import annotations

import pytest

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import SHIPPED
from mllama_jax.train.pictures import held_out, shuffled
from mllama_jax.train.pictures.evaluate import mean, scores

N = 200


@pytest.fixture(scope="module")
def shipped() -> Mllama:
    return mllama_jax.load(SHIPPED, dtype="float32")


def test_files_and_size() -> None:
    files = {path.name: path.stat().st_size for path in SHIPPED.iterdir()}
    assert files.keys() >= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert sum(files.values()) <= 8_000_000


def test_scenes_are_answered_by_looking(shipped: Mllama) -> None:
    examples = list(held_out("scenes", N))
    looking, blind = mean(scores(shipped, examples)), mean(scores(shipped, shuffled(examples)))
    # Blind, the likeliest answer to each question scores 0.21.
    assert looking >= 0.95
    assert blind <= 0.3
