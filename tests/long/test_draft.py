"""A draft model beside the model on a mesh, and how much of its answers the checkpoint that ships guesses unseeing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mllama_jax
from mllama_jax import SamplingParams
from mllama_jax.cli import SHIPPED
from mllama_jax.generate import speculate
from mllama_jax.train.pictures import FAMILIES, conversation, held_out
from tests.test_sharding import run


def test_a_draft_guesses_alike_on_a_mesh(spread_directory: Path) -> None:
    """The same answers, and as many forwards, which are fewer than plain decoding's ten."""
    found = json.loads(run(8, "drafted", str(spread_directory)))
    assert found["tokens"]
    assert found["forwards"] == [6, 6]


def test_the_tokens_a_forward_that_the_readme_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, of lookup and of the model as its own draft, which sees no picture; and answers are equal."""
    model, forwards, dispatch = mllama_jax.load(SHIPPED, dtype="float32"), [], speculate.decode

    def counting(*args: Any, **options: Any) -> Any:
        result = dispatch(*args, **options)
        forwards.append(int(result[4]))
        return result

    monkeypatch.setattr(speculate, "decode", counting)

    def rates(asked: list, **settings: Any) -> list[float]:
        found, answers = [], []
        for draft in (None, model):
            forwards.clear()
            prompts = [model.prompt(messages[:1]) for messages in asked]
            params = [SamplingParams(max_new_tokens=128, seed=i, **settings) for i in range(len(asked))]
            answers.append(
                [model._answers([p], [s], None, 4, draft)[0].tokens for p, s in zip(prompts, params, strict=True)]
            )
            found.append(sum(len(tokens) - 1 for tokens in answers[-1]) / sum(forwards))
        assert answers[0] == answers[1]
        return found

    asked = [conversation(example) for family in FAMILIES for example in held_out(family, 10)]
    found = {"questions": rates(asked)}
    for temperature in (0, 1):
        found[f"at {temperature}"] = rates(asked[::5], temperature=temperature, stop_ids=())
    told = {"questions": (1.01, 1.13), "at 0": (3.89, 4.05), "at 1": (3.68, 3.88)}
    assert found == {name: pytest.approx(pair, rel=0.02) for name, pair in told.items()}
