"""The checkpoint that ships: its size and files, and that it answers by looking."""

from __future__ import annotations

import pytest

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import SHIPPED
from mllama_jax.train.pictures import held_out, shuffled
from mllama_jax.train.pictures.evaluate import mean, scores

N = 100  # of each family


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


@pytest.mark.parametrize(
    ("family", "least", "blind"),
    [("scenes", 0.97, 0.3), ("charts", 0.85, 0.3), ("text", 0.85, 0.1), ("pairs", 0.8, 0.45)],
)
def test_questions_are_answered_by_looking(shipped: Mllama, family: str, least: float, blind: float) -> None:
    examples = list(held_out(family, N))
    assert mean(scores(shipped, examples)) >= least
    assert mean(scores(shipped, shuffled(examples))) <= blind
