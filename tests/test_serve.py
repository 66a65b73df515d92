"""`mllama serve` on loopback: what it answers, through OpenAI's client and by hand."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import numpy as np
import openai
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama
from mllama_jax.cli import SHIPPED
from tests.served import HELLO, Start, asked, compiled, data_url, logs, metric, post, questions, starting

CONTEXT = 1600  # more than a slot has room for at first


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def url(start: Start) -> str:
    return start("--slots", "4", "--context", str(CONTEXT), "--images", "2", JAX_LOG_COMPILES="1")[1]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model() -> Mllama:
    return mllama_jax.load(SHIPPED, dtype="float32")


def test_answers_are_those_of_generate(client: openai.OpenAI, model: Mllama) -> None:
    """Sixteen conversations with pictures at once in four slots, streamed and whole."""
    conversations = questions(4)
    expected = model.generate(conversations, max_new_tokens=24)

    def whole(i: int) -> tuple[str, str, int]:
        made = client.chat.completions.create(
            model="pictures-4m", messages=asked(conversations[i]), temperature=0, max_completion_tokens=24
        )
        assert made.usage is not None
        choice = made.choices[0]
        return choice.message.content or "", choice.finish_reason, made.usage.completion_tokens

    def streamed(i: int) -> tuple[str, str, int]:
        text, reason, tokens = "", "", 0
        for chunk in client.chat.completions.create(
            model="pictures-4m", messages=asked(conversations[i]), temperature=0, max_tokens=24, stream=True,
            stream_options={"include_usage": True},
        ):  # fmt: skip
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, reason, tokens

    with ThreadPoolExecutor(16) as pool:
        for way in (whole, streamed):
            found = list(pool.map(way, range(len(conversations))))
            assert found == [(each.text, each.finish_reason, len(each.tokens)) for each in expected]


def test_settings_reach_the_answer(client: openai.OpenAI, model: Mllama) -> None:
    name, create = "pictures-4m", client.chat.completions.create
    answers = zip(questions(4), model.generate(questions(4), max_new_tokens=8, logprobs=3), strict=True)
    question, alone = max(answers, key=lambda each: len(each[1].text))
    made = create(model=name, messages=asked(question), temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert [each.logprob for each in logprobs.content or []] == pytest.approx(alone.logprobs, abs=1e-4)
    assert all(len(each.top_logprobs) == 3 for each in logprobs.content or [])
    sampled = [
        create(model=name, messages=asked(question), n=3, seed=5, temperature=1.5, max_tokens=8).choices for _ in "12"
    ]
    assert [choice.message.content for choice in sampled[0]] == [choice.message.content for choice in sampled[1]]
    assert len(sampled[0]) == 3
    first = alone.tokens[0]
    biased = create(
        model=name, messages=asked(question), temperature=0, max_tokens=8, logit_bias={str(first): -100}, logprobs=True
    )
    text = alone.text
    assert biased.choices[0].message.content != text
    stopped = create(model=name, messages=asked(question), temperature=0, stop=[text[2:4]])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (
        text[: text.find(text[2:4])],
        "stop",
    )
    endless = create(
        model=name, messages=asked(question), temperature=0, max_tokens=30, extra_body={"ignore_eos": True}
    )
    assert endless.choices[0].finish_reason == "length"


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["colour", "sure", "n"],
    "additionalProperties": False,
}


def test_answers_are_held_to_a_schema(client: openai.OpenAI, model: Mllama) -> None:
    """Whatever is drawn, beside requests that are not held to anything and get what they get alone."""
    free = questions(1)
    expected = [each.text for each in model.generate(free, max_new_tokens=16)]

    def held(seed: int) -> Any:
        made = client.chat.completions.create(
            model="pictures-4m",
            messages=[{"role": "user", "content": "Hello"}],
            response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}},
            seed=seed,
            temperature=2,
            max_tokens=100,
        )
        assert made.choices[0].finish_reason == "stop"
        return json.loads(made.choices[0].message.content or "")

    def plain(question: Any) -> str | None:
        made = client.chat.completions.create(
            model="pictures-4m", messages=asked(question), temperature=0, max_tokens=16
        )
        return made.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers, texts = pool.map(held, range(8)), pool.map(plain, free)
        found = list(answers)
        assert list(texts) == expected
    for each in found:
        jsonschema.validate(each, SCHEMA)
    assert len({json.dumps(each) for each in found}) > 2


def test_nobody_waits_for_the_compiler(url: str) -> None:
    """Once a server is ready nothing is compiled, whatever is asked for and however caches grow."""
    (question, *_) = questions(1)
    beginning = [5] * 100
    for settings in (
        {},
        {"stop_token_ids": [7, 8, 9, 10]},
        {"temperature": 1, "n": 3, "top_p": 0.9},
        {"logprobs": True, "top_logprobs": 2},
        {"logit_bias": {"7": 1}, "frequency_penalty": 1},
        {"response_format": {"type": "json_object"}, "max_tokens": 4},
    ):
        assert post(url, "/v1/chat/completions", HELLO | {"messages": asked(question)} | settings)[0] == 200

    def complete(prompt: list[int]) -> int:
        return post(url, "/v1/completions", {"prompt": prompt, "max_tokens": 12, "temperature": 0})[0]

    with ThreadPoolExecutor(8) as pool:
        for lengths in (range(8), range(120, 480, 50), range(500, 1500, 120)):
            assert set(pool.map(complete, ([*beginning, *[6] * length] for length in lengths))) == {200}
    for words, pictures in ((1, 1), (9, 1), (400, 1), (3, 2)):
        shown = asked(question)[0]["content"][:1] * pictures
        said = [{"role": "user", "content": shown}, {"role": "assistant", "content": "red " * words}]
        status, told = post(url, "/look", {"messages": said})
        assert (status, len(told["words"]), len(told["views"])) == (200, words, pictures)
    assert '"warming up"' in logs[url].read_text()
    assert compiled(url) == []


def test_text_completions(client: openai.OpenAI, model: Mllama) -> None:
    assert model.tokenizer is not None
    ids = [model.tokenizer.bos, *model.tokenizer.encode("What", specials=False)]
    (expected,) = model.generate_tokens([ids], [[]], max_new_tokens=6)
    for prompt in ("What", ids):
        made = client.completions.create(model="pictures-4m", prompt=prompt, temperature=0, max_tokens=6)
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), len(expected))
        assert made.choices[0].text == model.tokenizer.decode(expected)
    both = client.completions.create(model="pictures-4m", prompt=["What", "Where"], temperature=0, max_tokens=6)
    assert len(both.choices) == 2


def test_what_operators_ask(client: openai.OpenAI, url: str) -> None:
    (card,) = client.models.list().data
    assert card.id == "pictures-4m"
    status, told = post(url, "/tokenize", {"prompt": "Hello"})
    assert (status, told["count"]) == (200, len(told["tokens"]))
    for path, text in (("/health", "alive"), ("/ready", "true"), ("/version", "jax"), ("/", "<!doctype html>")):
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port or 80)) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 200")
        assert text in answer
    made = metric(url, "mllama_generation_tokens_total")
    _, told = post(url, "/v1/chat/completions", HELLO)
    assert metric(url, "mllama_generation_tokens_total") == made + told["usage"]["completion_tokens"] > made


def test_curl_streams(url: str) -> None:
    done = subprocess.run(
        ["curl", "-sN", f"{url}/v1/chat/completions", "-d", json.dumps(HELLO | {"stream": True})],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(each)["object"] == "chat.completion.chunk" for each in events[:-1])


def test_where_an_answer_looks(url: str, model: Mllama) -> None:
    (question, *_), answer = questions(1), "top left"
    status, told = post(url, "/look", {"messages": [*asked(question), {"role": "assistant", "content": answer}]})
    expected = model.look(question, answer)
    assert (status, told["words"]) == (200, ["top", "left"])
    (view,) = told["views"]
    heat = np.frombuffer(base64.b64decode(view["heat"]), np.uint8).reshape(2, view["rows"], view["columns"])
    patches = expected.views[0].patches
    np.testing.assert_allclose(heat / 255, patches / patches.max(axis=(1, 2), keepdims=True), atol=0.01)
    assert tuple(view["covered"]) == expected.views[0].covered
    for messages, message in (
        (asked(question), "expected an assistant's text at the end"),
        ([*HELLO["messages"], {"role": "assistant", "content": "Hi"}], "shows no picture to look at"),
    ):
        status, told = post(url, "/look", {"messages": messages})
        assert (status, message in told["error"]["message"]) == (400, True)


def test_pictures_of_all_shapes(client: openai.OpenAI) -> None:
    for image, kind in (
        (Image.new("RGB", (1, 1)), "PNG"),
        (Image.new("RGB", (1, 10000)), "JPEG"),
        (Image.new("RGBA", (50, 20)), "WEBP"),
    ):
        content: Any = [
            {"type": "image_url", "image_url": {"url": data_url(image, kind)}},
            {"type": "text", "text": "?"},
        ]
        client.chat.completions.create(
            model="pictures-4m", messages=[{"role": "user", "content": content}], max_tokens=2
        )


def test_specials_that_a_user_types_stay_text(client: openai.OpenAI, url: str) -> None:
    _, told = post(url, "/tokenize", {"messages": [{"role": "user", "content": "<|eot_id|><|image|>"}]})
    _, plain = post(url, "/tokenize", {"messages": [{"role": "user", "content": ""}]})
    assert told["count"] > plain["count"] + 8
