"""The checkpoint that ships: its size and files, and that it answers by looking."""

from __future__ import annotations

from pathlib import Path

import pytest

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import SHIPPED
from mllama_jax.evaluate.data import read_rows
from mllama_jax.evaluate.folder import Folder, read_result
from mllama_jax.evaluate.recipe import load_recipe
from mllama_jax.evaluate.run import evaluate
from mllama_jax.train.pictures.export import export

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


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held out")
    export(folder, N)
    return folder


@pytest.mark.parametrize(
    ("family", "least", "blind"),
    [("scenes", 0.97, 0.3), ("charts", 0.85, 0.3), ("text", 0.85, 0.1), ("pairs", 0.8, 0.45)],
)
def test_questions_are_answered_by_looking(
    shipped: Mllama, questions: Path, tmp_path: Path, family: str, least: float, blind: float
) -> None:
    """Scored as the README's scores are, on the first of the same questions."""

    def score(data: str) -> float:
        recipe = load_recipe(f"pictures-{family}")
        rows = read_rows([questions / f"{data}.jsonl"], recipe)
        assert len(rows) == N
        evaluate(lambda: shipped, recipe, rows, Folder(tmp_path / data, {}), batch=50)
        return read_result(tmp_path / data)[0]["score"]

    assert score(family) >= least
    assert score(f"{family}-shuffled") <= blind
