"""Settings of single rows: penalties, bias, stops, log-probabilities; text that streams without half a stop text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mllama_jax import Completion, Mllama, SamplingParams
from mllama_jax.errors import InputError
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.decode import Made
from mllama_jax.generate.sampling import Settings, adjusted, kept
from mllama_jax.processing.tokenizer import Tokenizer

Draw = Callable[..., Image.Image]


def settings(params: SamplingParams, prompt: list[int], stops: tuple[int, ...] = (), vocab: int = 5) -> Settings:
    return Settings.of([params], [prompt], stops, vocab)


def test_penalties_and_bias() -> None:
    logits = np.array([[2.0, -1.0, 0.5, 1.0, -2.0]], np.float32)
    counts = np.array([[0, 2, 1, 0, 0]])
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: 1.5, 4: -1.0}
    )
    ours = adjusted(jnp.asarray(logits), settings(params, [0]), jnp.zeros(1, jnp.int32), jnp.asarray(counts))
    expected = logits + np.array([[0, 0, 0, 1.5, -1]])
    for token in (0, 1, 2):  # in prompt or answer
        expected[0, token] *= 0.5 if expected[0, token] > 0 else 2.0
    expected -= 0.25 * (counts > 0) + 0.5 * counts
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-6)


def test_no_stop_token_before_its_time() -> None:
    params, logits = SamplingParams(min_new_tokens=3), jnp.zeros((1, 5))
    for made, banned in ((0, True), (2, True), (3, False)):
        ours = adjusted(logits, settings(params, [], stops=(1, 4)), jnp.array([made]), None)
        assert (np.isneginf(np.asarray(ours))[0] == [False, banned, False, False, banned]).all()


def test_by_default_all_tokens_are_kept() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128256)), jnp.float32)
    assert bool(kept(logits, settings(SamplingParams(temperature=1.0), [])).all())


def test_numbers_of_numpy_are_numbers() -> None:
    assert SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5)).top_k == 5  # pyright: ignore[reportArgumentType]


def test_min_p_keeps_what_is_likely_beside_the_likeliest() -> None:
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.04, 0.26]]))
    for min_p, expected in ((0.0, [1, 1, 1, 1]), (0.5, [0, 1, 0, 1]), (0.3, [1, 1, 0, 1]), (1.0, [0, 1, 0, 0])):
        chosen = kept(logits, settings(SamplingParams(temperature=1.0, min_p=min_p), []))
        assert chosen.astype(int).tolist() == [expected]


def question(picture: Image.Image | None, text: str) -> list[dict[str, Any]]:
    image = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def test_settings_are_each_rows_own(small: Mllama, picture: Draw) -> None:
    conversations = [question(None, "Hello"), question(picture(1), "What is it?"), question(picture(2), "And this?")]
    params = [
        SamplingParams(max_new_tokens=20, temperature=1.0, top_k=5, seed=3, logprobs=2),
        SamplingParams(max_new_tokens=9, repetition_penalty=1.3, logit_bias={7: 2.0}),
        SamplingParams(max_new_tokens=14, temperature=0.8, top_p=0.9, frequency_penalty=0.5, seed=1),
    ]
    together = small.generate(conversations, params)
    for conversation, each, completion in zip(conversations, params, together, strict=True):
        (alone,) = small.generate([conversation], [each])
        assert_same(completion, alone)


def assert_same(a: Completion, b: Completion) -> None:
    assert (a.text, a.tokens, a.finish_reason, a.prompt_tokens) == (b.text, b.tokens, b.finish_reason, b.prompt_tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    for top, other in zip(a.top_logprobs, b.top_logprobs, strict=True):
        assert list(top) == list(other)
        np.testing.assert_allclose(list(top.values()), list(other.values()), atol=1e-5)


def test_several_answers_are_those_of_following_seeds(small: Mllama, picture: Draw) -> None:
    conversation, values = question(picture(1), "What is it?"), {"max_new_tokens": 10, "temperature": 2.0}
    several = small.generate([conversation], n=3, seed=5, **values)
    alone = [small.generate([conversation], seed=seed, **values)[0] for seed in (5, 6, 7)]
    assert [each.tokens for each in several] == [each.tokens for each in alone]
    assert len({each.text for each in several}) == 3


def test_a_picture_of_several_rows_is_encoded_once(
    small: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllama_jax.generate import decode

    encoded, encode = [], decode.encode
    monkeypatch.setattr(decode, "encode", lambda *args: encoded.append(len(args[2])) or encode(*args))
    small.generate([question(picture(1), "What is it?")], n=5, temperature=1.0, max_new_tokens=4)
    assert encoded == [1]


def test_log_probabilities_are_the_models(small: Mllama, picture: Draw) -> None:
    conversation = question(picture(1), "What is it?")
    prompt = small.prompt(conversation)
    (answer,) = small.generate([conversation], max_new_tokens=6, logprobs=3, temperature=1.0)
    logits = small.logits([prompt.tokens + answer.tokens], [prompt.images])[0, len(prompt.tokens) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, token in enumerate(answer.tokens):
        assert math.isclose(answer.logprobs[i], expected[i, token], abs_tol=1e-4)
        assert list(answer.top_logprobs[i]) == np.argsort(-expected[i])[:3].tolist()


def answer(tokenizer: Tokenizer, text: str, **values: Any) -> tuple[Answer, list[str]]:
    """An answer fed `text` byte by byte, so that every border between tokens occurs; and its pieces."""
    fed = Answer(SamplingParams(max_new_tokens=1000, **values), (), tokenizer)
    pieces = []
    for token in (tokenizer.encode(chr(byte), specials=False) for byte in text.encode() if byte < 128):
        column = np.array([[token[0]]])
        pieces.append(fed.push(Made(column, column * 0.0, np.zeros((1, 1, 0)), np.zeros((1, 1, 0))), 0, 1))  # pyright: ignore[reportArgumentType]
    return fed, pieces


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two th"), "one "),
        ("aaab", ("aab",), "a"),
        ("one tw", ("two",), "one tw"),
        ("STOP", ("STOP",), ""),
        ("no end", (), "no end"),
    ],
)
def test_stop_texts(small: Mllama, text: str, stop: tuple[str, ...], expected: str) -> None:
    assert small.tokenizer is not None
    fed, pieces = answer(small.tokenizer, text, stop=stop)
    seen = "".join(pieces)
    assert expected.startswith(seen)  # nothing was shown that had to be taken back
    if fed.finish_reason is None:
        fed._end("length")
    assert fed.text == expected
    assert fed.finish_reason == ("length" if text == expected else "stop")


def test_stop_texts_in_generation(small: Mllama, picture: Draw) -> None:
    conversation = question(picture(1), "What is it?")
    (free,) = small.generate([conversation], max_new_tokens=60)
    stop = free.text[10:13]
    (cut,) = small.generate([conversation], max_new_tokens=60, stop=(stop,))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert "".join(small.stream(conversation, max_new_tokens=60, stop=(stop,))) == cut.text


def test_closing_a_stream_ends_the_work(small: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllama_jax.generate import decode

    blocks, original = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *args, **kwargs: blocks.append(1) or original(*args, **kwargs))
    stream = small.stream(question(picture(1), "What is it?"), max_new_tokens=200, stop_ids=())
    next(stream)
    assert len(blocks) <= 1  # the first piece comes with the prefill or the first block
    stream.close()
    assert len(blocks) <= 1


@pytest.mark.parametrize(("at_once", "begun"), [(True, [0, 2, 3]), (False, [0, 1, 2, 3])])
def test_a_block_is_told_while_the_next_is_made(
    at_once: bool, begun: list[int], small: Mllama, picture: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its dispatch keeps nobody waiting; and none is begun that nobody wants."""
    from mllama_jax.generate import decode

    blocks, told, original = [], [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda *args, **kwargs: blocks.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(decode, "returns_at_once", lambda model, block: at_once)
    limit = 1 + 3 * decode.STEPS
    for _ in small.stream(question(picture(1), "What is it?"), max_new_tokens=limit, stop_ids=()):
        told.append(len(blocks))
    assert sorted(set(told)) == begun
    assert len(blocks) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop": "end"}, "stop must be a list of texts, got 'end'"),
        ({"stop": ("",)}, "stop must have no empty text"),
        ({"stop": ("x",) * 17}, "stop must be at most 16 texts, got 17"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must have token ids for keys, got -1"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\] must be a finite number, got nan"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens must be at most max_new_tokens, got 9 and 8"),
        ({"stop": 5}, "stop must be a list of texts, got 5"),
        ({"stop_ids": 5}, "stop_ids must be a list of token ids, got 5"),
        ({"stop_ids": (2**40,)}, "stop_ids must be a list of token ids"),
        ({"top_k": 99999999999}, "top_k must be at most 2147483647"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"logit_bias": {1: 1e39}}, r"logit_bias\[1\] must be a finite number"),
        ({"n": 2}, "n=2 answers at temperature 0 would all be the same"),
        ({"n": 0}, "n must be at least 1"),
        ({"logprobs": 21}, "logprobs must be at most 20"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": 3.0}, "presence_penalty must be at most 2"),
        ({"min_p": 1.5}, "min_p must be at most 1"),
        ({"stop_ids": (-1,)}, "stop_ids must be a list of token ids"),
    ],
)
def test_contradictory_or_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**values)


def test_half_a_character_at_the_limit_is_left_out(small: Mllama) -> None:
    tokenizer = small.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode("abc👩", specials=False)[:-1]
    cut = Answer(SamplingParams(max_new_tokens=len(tokens)), (), tokenizer)
    column, nothing = np.array([tokens]), np.zeros((1, len(tokens), 0))
    cut.push(Made(column, column * 0.0, nothing, nothing), 0, len(tokens))  # pyright: ignore[reportArgumentType]
    assert (cut.text, cut.finish_reason) == ("abc", "length")


def test_params_or_settings(small: Mllama) -> None:
    with pytest.raises(InputError, match="max_tokens is not a setting; known are max_new_tokens"):
        small.generate([question(None, "Hi")], max_tokens=3)
    with pytest.raises(InputError, match="give params or seed, not both"):
        small.generate([question(None, "Hi")], [SamplingParams()], seed=1)
    with pytest.raises(InputError, match="params must be as many as conversations, got 2 and 1"):
        small.generate([question(None, "Hi")], [SamplingParams()] * 2)
    with pytest.raises(InputError, match="logit_bias must name ids below 768, got 5000"):
        small.generate([question(None, "Hi")], logit_bias={5000: 1.0})
