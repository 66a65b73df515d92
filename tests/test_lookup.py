"""Prompt lookup: the answers of plain decoding, token for token, in fewer forwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama, SamplingParams
from mllama_jax.errors import InputError
from mllama_jax.generate import lookup, speculate
from mllama_jax.processing.chat import Prompt

Draw = Callable[..., Image.Image]
IMAGE = 768
FEW: dict[int, float] = {5: 30, 6: 30, 7: 30}  # of which answers are made, so that many guesses are right


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Mllama:
    return mllama_jax.load(tiny_directory, dtype="float32")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Of each dispatch the tokens of each row, and how many forwards they took."""
    seen, dispatch = [], speculate.decode

    def counting(*args: Any, **options: Any) -> Any:
        result = dispatch(*args, **options)
        seen.append((result[3].tolist(), int(result[4])))
        return result

    monkeypatch.setattr(speculate, "decode", counting)
    return seen


def test_a_guess_is_what_followed_the_longest_match_last() -> None:
    def guess(tokens: list[int], k: int = 4) -> list[int]:
        padded = jnp.asarray([[*tokens, *[9] * 20]])  # what stands behind means nothing, though it matches
        return lookup.guess(padded, jnp.asarray([len(tokens) - 1]), k)[0].tolist()

    assert guess([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6, 1]
    assert guess([7, 2, 3, 4, 8, 2, 3, 5, 6, 2, 3]) == [5, 6, 2, 3]  # two as long: the later
    assert guess([1, 2, 3, 4, 8, 9, 3, 5, 6, 1, 2, 3], 2) == [4, 8]  # the longer before the later
    assert guess([1, 2, 3, 2, 3]) == [2, 3, 2, 3]  # a text that runs out goes round
    assert len(guess([1])) == len(guess([1, 2, 3])) == 4


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.95},
    "penalised": {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_new_tokens": 5},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_answers_are_those_of_plain_decoding(
    tiny: Mllama, picture: Draw, kind: str, forwards: list[tuple[list[int], int]]
) -> None:
    """Ragged rows with and without pictures, each with its own limit, seed and stop token."""
    a, b = picture(1), picture(2, 56, 130)
    prompts = [
        Prompt([512, *range(3, 40), 5, 6, 7, 5, 6], []),
        Prompt([512, IMAGE, 5, 6, 5], [a]),
        Prompt([512, *range(3, 20), IMAGE, IMAGE, 9, 10], [b, a]),
        Prompt([512, 7], []),
    ]
    params = [
        SamplingParams(max_new_tokens=n, seed=n, stop_ids=(stop,), logit_bias=FEW, logprobs=2, **SETTINGS[kind])
        for n, stop in ((60, 100), (7, 100), (33, 6), (48, 100))
    ]
    plain = tiny._answers(prompts, params)
    assert not forwards
    quick = tiny._answers(prompts, params, lookup=4)
    for one, other in zip(plain, quick, strict=True):
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert [list(tops) for tops in one.top_logprobs] == [list(tops) for tops in other.top_logprobs]
    made = max(len(answer.tokens) for answer in plain)
    assert sum(count for _, count in forwards) < 0.8 * made


def test_sampled_tokens_are_as_likely_as_the_model_says(tiny: Mllama, forwards: list[tuple[list[int], int]]) -> None:
    """Chi-square of the first three tokens of 600 answers against the model's own probabilities."""
    prompt, few, n = [512, 5, 6, 5, 6, 7, 5, 5, 6, 5, 7], list(FEW), 600
    params = [SamplingParams(max_new_tokens=3, temperature=1.0, seed=i, logit_bias=FEW, stop_ids=()) for i in range(n)]
    made = [answer.tokens for answer in tiny._answers([Prompt(prompt, [])] * n, params, lookup=4)]
    first = [[*prompt, one, other] for one in few for other in few]
    logits = tiny.logits(first, [[]] * len(first))[:, len(prompt) - 1 :][..., few]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)  # of each pair of tokens, and of a third one
    pairs = [p[i, 0, i // 3] * p[i, 1, i % 3] for i in range(9)]
    expected = n * np.array([pair * p[i, 2] for i, pair in enumerate(pairs)])  # 9 3
    found = np.zeros((9, 3))
    for one, other, third in made:
        found[3 * few.index(one) + few.index(other), few.index(third)] += 1
    assert forwards
    assert ((found - expected) ** 2 / expected).sum() < 54.05  # 26 degrees of freedom, one chance in a thousand


def test_what_cannot_be_guessed_is_refused(tiny: Mllama) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    for wrong in (-1, 33, 1.5, True):
        with pytest.raises(InputError, match=r"lookup must be an integer from 0 to 32, got"):
            tiny.generate([conversation], lookup=wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InputError, match="lookup must be an integer"):
            tiny.stream(conversation, lookup=wrong)  # pyright: ignore[reportArgumentType]


def test_a_stream_is_what_generate_gives(tiny: Mllama) -> None:
    conversation = [{"role": "user", "content": "one two one two one"}]
    settings: dict[str, Any] = {"max_new_tokens": 40, "logit_bias": FEW, "stop_ids": ()}
    (whole,) = tiny.generate([conversation], lookup=4, **settings)
    assert "".join(tiny.stream(conversation, lookup=4, **settings)) == whole.text
