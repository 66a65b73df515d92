"""`mllama serve` on loopback: through OpenAI's client, by hand, and with whatever may go wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import signal
import socket
import subprocess
import time
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
from mllama_jax.generate import slots
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Request
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.processing.chat import Prompt
from mllama_jax.serve import patience
from mllama_jax.serve.app import Limits, Service
from mllama_jax.serve.throughput import listening
from mllama_jax.serve.worker import EngineFault, Worker
from mllama_jax.train.pictures import FAMILIES, conversation, held_out
from tests.served import Start, compiled, logs, metric, post, starting

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


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def asked(question: list[dict[str, Any]]) -> list[Any]:
    """One of our conversations as OpenAI's messages."""

    def part(each: dict[str, Any]) -> dict[str, Any]:
        if each["type"] == "text":
            return each
        return {"type": "image_url", "image_url": {"url": data_url(each["image"])}}

    return [{**message, "content": [part(each) for each in message["content"]]} for message in question]


def questions(n: int) -> list[list[dict[str, Any]]]:
    return [conversation(example)[:1] for family in FAMILIES for example in held_out(family, n)]


HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


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
    assert metric(url, "mllama_generation_tokens_total") > 0


def test_curl_streams(url: str) -> None:
    done = subprocess.run(
        ["curl", "-sN", f"{url}/v1/chat/completions", "-d", json.dumps(HELLO | {"stream": True})],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(each)["object"] == "chat.completion.chunk" for each in events[:-1])


GIF = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
BOMB = Image.new("1", (15000, 15000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: not supported; known are "),
        ({"best_of": 2}, "best_of: not supported"),
        ({"response_format": {"type": "yaml"}}, "response_format.type: expected text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: expected an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "number", "minimum": "x"}}}},
            "response_format: ",
        ),
        ({"messages": "Hello"}, "messages: expected a list, got str"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "role: expected system, user"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected a part of type 'text'"),
        ({"messages": []}, "expected at least one message"),
        ({"n": 10**9, "temperature": 1}, "n must be at most 128"),
        ({"max_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        ({"max_tokens": "many"}, "max_new_tokens must be an integer"),
        ({"max_tokens": CONTEXT}, f"exceed the {CONTEXT} positions of a slot"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"top_p": 7}, "top_p must be at most 1"),
        ({"logit_bias": {"99999999": 1}}, "99999999"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected token ids for names, got '-1'"),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs true"),
        ({"stream": "yes"}, "stream: expected bool, got str"),
        ({"stop": [""]}, "stop must have no empty text"),
        ({"stop_token_ids": [*range(17)]}, "stop_ids must be at most 16 token ids, got 20"),  # with the model's
        ({"image": data_url(Image.new("RGB", (9, 9)))}, "3 pictures exceed the 2 of a slot; show fewer"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]}, "tool_calls: expected list, got int"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "expected a function"),
        ({"tool_choice": "required"}, "tool_choice: expected 'auto' or 'none'"),
        ({"image": "data:image/png;base64,%%%"}, "image_url: not base64"),
        ({"image": GIF}, "image_url: expected data:image/jpeg|png|webp;base64"),
        ({"image": GIF.replace("gif", "png")}, "image_url: expected a JPEG, PNG or WebP picture"),
        ({"image": data_url(BOMB)}, "expected a picture of at most"),
        ({"image": "file:///etc/passwd"}, "image_url: expected a data URL or http(s)"),
        ({"image": "http://127.0.0.1/a.png"}, "pictures are not fetched from '127.0.0.1'; allowed are: none"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_named(url: str, change: dict[str, Any], message: str) -> None:
    if "image" in change:
        part = {"type": "image_url", "image_url": {"url": change["image"]}}
        change = {"messages": [{"role": "user", "content": [part] * 3}]}
    status, told = post(url, "/v1/chat/completions", HELLO | change)
    assert status == 400
    assert message in told["error"]["message"]
    assert "\n" not in told["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "body: expected JSON"),
        (b"[" * 5000, 400, "body: expected JSON"),
        (b"[]", 400, "body: expected a JSON object, got list"),
        (b'{"temperature": NaN}', 400, "body: NaN is not JSON"),
        (b'{"prompt": "\xff"}', 400, "body: expected JSON"),
        (b"x" * (33 * 2**20), 413, "body: at most 33554432 bytes"),
        (json.dumps(HELLO | {"model": "gpt-9"}).encode(), 404, "model: 'gpt-9' is not served here"),
    ],
    ids=["cut", "deep", "list", "nan", "latin-1", "large", "model"],
)
def test_bodies_that_are_refused(url: str, body: bytes, status: int, message: str) -> None:
    found, told = post(url, "/v1/chat/completions", body)
    assert (found, message in told["error"]["message"]) == (status, True)


def test_headers_without_end_are_refused(client: openai.OpenAI, url: str) -> None:
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port or 80), timeout=60) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-More: ")
        with contextlib.suppress(ConnectionError):  # it may hang up on the way
            raw.sendall(b"x" * 2**20)
        with contextlib.suppress(ConnectionError):
            assert raw.recv(12) in (b"", b"HTTP/1.1 400")
    assert client.models.list().data


def test_a_body_that_drips_is_given_up(model: Mllama) -> None:
    """A letter every tenth of a second, for ever."""
    service = Service(model, "it", slots=1, context=256, limits=Limits(seconds=0.5))
    service.ready = True
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    asyncio.run(service.app()(scope, receive, send))
    assert sent[0]["status"] == 408
    assert "did not come within" in json.loads(sent[1]["body"])["error"]["message"]


@pytest.mark.parametrize(
    "beginning",
    [
        "GET /",
        "GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /no HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n",
    ],
    ids=["headers", "those of another request", "a body that nobody reads"],
)
def test_connections_that_drip_are_cut(model: Mllama, monkeypatch: pytest.MonkeyPatch, beginning: str) -> None:
    """A letter every twentieth of a second, for ever; who sends whole requests keeps the connection."""
    monkeypatch.setattr(patience, "SECONDS", 0.5)
    service = Service(model, "it", slots=1, context=256, limits=Limits())
    with listening(service) as port, contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as other:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(beginning.encode())
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < began + 10:
                    raw.sendall(b"x")
                    time.sleep(0.05)
            assert time.monotonic() - began < 5
        for _ in range(3):
            other.request("GET", "/health")
            assert other.getresponse().read() == b'{"status":"alive"}'
            time.sleep(0.3)


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


def test_a_prompt_as_long_as_a_slot_is_refused(url: str) -> None:
    status, told = post(url, "/v1/completions", {"prompt": [5] * CONTEXT})
    assert (status, told["error"]["message"][:19]) == (400, f"{CONTEXT} prompt tokens ")
    assert post(url, "/v1/completions", {"prompt": [5] * (CONTEXT - 1), "max_tokens": 1})[0] == 200


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


def test_clients_that_leave_free_their_slots(url: str) -> None:
    body = json.dumps(HELLO | {"stream": True, "max_tokens": 400, "ignore_eos": True})
    for _ in range(40):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("POST", "/v1/chat/completions", body)
        connection.getresponse().read(10)
        connection.close()
    end = time.monotonic() + 30
    while metric(url, "mllama_num_requests_running") + metric(url, "mllama_num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_keys_a_full_queue_and_a_sigterm(start: Start) -> None:
    """Without a key only /health and the page answer; one slot and a queue of one take two; SIGTERM lets these end."""
    process, url = start("--slots", "1", "--queue", "1", "--context", "512", MLLAMA_API_KEYS="other,secret")
    for path, status in (("/", 200), ("/health", 200), ("/ready", 200), ("/metrics", 401), ("/v1/models", 401)):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().status == status
        connection.close()
    assert post(url, "/v1/chat/completions", HELLO)[0] == 401
    assert post(url, "/v1/chat/completions", HELLO, Authorization="Bearer wrong")[0] == 401
    assert post(url, "/v1/chat/completions", HELLO, Authorization="Bearer secret")[0] == 200
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=120)

    def stream() -> Any:
        return client.chat.completions.create(
            model="pictures-4m", messages=[{"role": "user", "content": "Hello"}], max_tokens=400, stream=True,
            extra_body={"ignore_eos": True, "stream_options": {"include_usage": True}},
        )  # fmt: skip

    live = [stream(), stream()]
    with pytest.raises(openai.RateLimitError) as error:
        stream()
    assert error.value.response.headers["retry-after"] == "2"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        stream()
    for each in live:
        chunks = list(each)
        assert chunks[-1].usage.completion_tokens == 400
    assert process.wait(30) == 0


def test_a_request_that_breaks_the_engine_ends_alone(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told so; those beside it get what they get alone."""
    rows = [[model.config.text.vocab - 3 - i, 5, 6, 7] for i in range(3)]
    expected = model.generate_tokens(rows, [[]] * 3, max_new_tokens=40, stop_ids=())
    read = slots.read

    def broken(*args: Any, **options: Any) -> Any:
        if rows[2][0] in args[5][:, 0]:
            raise RuntimeError("broken")
        return read(*args, **options)

    monkeypatch.setattr(slots, "read", broken)
    worker = Worker(Engine(model.model, model.params, slots=3, context=256))
    worker.start()

    async def ask(row: list[int]) -> list[int]:
        answer = Answer(SamplingParams(max_new_tokens=40, stop_ids=()), (), None)
        async for _ in worker.answer(Request.of(model.config, Prompt(row, []), answer)):
            pass
        return answer.tokens

    async def everyone() -> list[Any]:
        return await asyncio.gather(*map(ask, rows), return_exceptions=True)

    *fine, fault = asyncio.run(everyone())
    worker.stop()
    assert fine == expected[:2]
    assert isinstance(fault, EngineFault)
