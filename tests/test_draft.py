"""A draft model: the answers of plain decoding, token for token, in as many forwards fewer as its guesses are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama, MllamaConfig, SamplingParams, cli
from mllama_jax.config import TextConfig
from mllama_jax.convert.export import write_hf
from mllama_jax.errors import InputError
from mllama_jax.generate import speculate
from mllama_jax.model.mllama import init_parameters
from mllama_jax.processing.chat import Prompt
from tests.conftest import TINY
from tests.test_lookup import IMAGE, SETTINGS

Draw = Callable[..., Image.Image]
K = 4
NO_LOOKUP = "draft: lookup says how many tokens it guesses at once, got 0; give one from 1 to 32"


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Mllama:
    return mllama_jax.load(tiny_directory, dtype="float32")


def text_only(directory: Path, vocab: int) -> Mllama:
    """A random Llama without tokenizer files, whose table has no row for the image token."""
    text = TextConfig(
        vocab=vocab, extra_embeddings=0, width=32, layers=2, cross_layers=(), heads=4, kv_heads=2, head_dim=8,
        hidden=48, context=512, tied=True,
    )  # fmt: skip
    config = MllamaConfig(text, None, bos=TINY.bos, pad=TINY.pad, stops=TINY.stops)
    params = jax.tree.map(np.array, init_parameters(config, jax.random.key(2)))
    params["text"]["embedding"] *= np.float32(100)  # the head too: it is sure of what it says
    write_hf(directory, params, config, np.dtype("float32"))
    return mllama_jax.load(directory, dtype="float32")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Mllama:
    return text_only(tmp_path_factory.mktemp("stranger"), TINY.text.vocab)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many forwards of the model each dispatch took."""
    seen, dispatch = [], speculate.decode

    def counting(*args: Any, **options: Any) -> Any:
        result = dispatch(*args, **options)
        seen.append(int(result[4]))
        return result

    monkeypatch.setattr(speculate, "decode", counting)
    return seen


def test_of_a_model_that_guesses_for_itself_all_is_right(tiny: Mllama, forwards: list[int]) -> None:
    """Over more than one dispatch, in ragged rows of different settings that end at different places."""
    prompts = [Prompt([512, *range(3, 3 + n)], []) for n in (40, 1, 7)]
    params = [
        SamplingParams(max_new_tokens=n, seed=n, stop_ids=(), **settings)
        for n, settings in zip((48, 5, 61), SETTINGS.values(), strict=True)
    ]
    plain = tiny._answers(prompts, params)
    quick = tiny._answers(prompts, params, lookup=K, draft=tiny)
    assert [answer.tokens for answer in plain] == [answer.tokens for answer in quick]
    assert sum(forwards) == 60 / (K + 1)


def test_who_guesses_nothing_right_changes_nothing(
    tiny: Mllama, stranger: Mllama, picture: Draw, forwards: list[int]
) -> None:
    """A text-only draft beside pictures: before the text, within it, at its end and alone."""
    a, b = picture(1), picture(2, 56, 130)
    prompts = [
        Prompt([512, *range(3, 40)], []),
        Prompt([512, IMAGE, 5, 6, 5], [a]),
        Prompt([512, *range(3, 20), IMAGE, 9, IMAGE], [b, a]),
        Prompt([IMAGE, IMAGE], [a, b]),
    ]
    how = [SETTINGS["greedy"], SETTINGS["sampled"], SETTINGS["penalised"], SETTINGS["greedy"]]
    params = [SamplingParams(max_new_tokens=40, seed=i, stop_ids=(), logprobs=2, **how[i]) for i in range(4)]
    plain = tiny._answers(prompts, params)
    params[1] = dataclasses.replace(params[1], stop_ids=(plain[1].tokens[9],))
    params[2] = dataclasses.replace(params[2], max_new_tokens=20)
    plain, checked = tiny._answers(prompts, params), tiny._answers(prompts, params, lookup=K, draft=stranger)
    for one, other in zip(plain, checked, strict=True):
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert [list(tops) for tops in one.top_logprobs] == [list(tops) for tops in other.top_logprobs]
    assert {answer.finish_reason for answer in plain} == {"stop", "length"}
    assert sum(forwards) > 0.9 * 39


def test_a_draft_guesses_as_it_would_answer(tiny: Mllama, picture: Draw, forwards: list[int]) -> None:
    """Right or wrong before, it goes on from what was accepted, without the picture: forwards are as many as when it
    reads all anew."""
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * x.std() * rng.standard_normal(x.shape).astype(x.dtype), tiny.params)
    draft, prompt = dataclasses.replace(tiny, params=noisy), rng.integers(0, 512, 130).tolist()
    settings: dict[str, Any] = {"stop_ids": ()}
    shown = Prompt([*prompt[:9], IMAGE, *prompt[9:]], [picture(1)])
    (answer,) = tiny._answers([shown], [SamplingParams(max_new_tokens=60, **settings)], None, K, draft)
    made, told, right, position = answer.tokens, sum(forwards), [], 1
    while position < len(made):
        (guessed,) = draft.generate_tokens([prompt + made[:position]], [[]], max_new_tokens=K, **settings)
        right.append(next((i for i in range(K) if guessed[i : i + 1] != made[position + i : position + i + 1]), K))
        position += right[-1] + 1
    assert told == len(right)
    assert {0, 1, 2, 3, K} == set(right)


def test_commands_and_streams_give_what_they_give_without(
    tiny: Mllama,
    stranger: Mllama,
    forwards: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    command = ["generate", "one two", "--model", str(tiny.directory), "--dtype", "float32", "--max-new-tokens", "30"]
    outputs = []
    for more in ((), ("--draft", str(stranger.directory), "--lookup", str(K))):
        assert cli.main([*command, *more]) == 0
        outputs.append(capsys.readouterr().out)
    (answer,) = tiny.generate([[{"role": "user", "content": "one two"}]], max_new_tokens=30, lookup=K, draft=stranger)
    assert forwards
    assert outputs == [answer.text + "\n"] * 2
    assert cli.main([*command, "--draft", str(stranger.directory)]) == 2
    assert capsys.readouterr().err == f"mllama generate: {NO_LOOKUP}\n"


def test_who_cannot_guess_is_refused(tiny: Mllama, stranger: Mllama, tmp_path: Path) -> None:
    hi = [{"role": "user", "content": "hi"}]

    def refused(draft: Any, lookup: int, message: str) -> None:
        for ask in (
            lambda: tiny.generate([hi], lookup=lookup, draft=draft),
            lambda: tiny.stream(hi, lookup=lookup, draft=draft),
        ):
            with pytest.raises(InputError) as error:
                ask()
            assert str(error.value) == message

    other = text_only(tmp_path, 767)
    refused(other, K, "draft: expected a vocabulary of 768 ids like the model's, got 767; take one of its family")
    refused(stranger, 0, NO_LOOKUP)
    refused(tmp_path, K, "draft: expected a loaded model, got PosixPath; load it first")
