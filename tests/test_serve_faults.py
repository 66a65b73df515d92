"""`mllama serve` on loopback: what it refuses, and who drips, leaves, floods or breaks."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

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
from mllama_jax.serve import patience, service
from mllama_jax.serve.app import App, EventStream
from mllama_jax.serve.service import Limits, Service
from mllama_jax.serve.throughput import listening
from mllama_jax.serve.worker import EngineFault, Worker
from tests.served import HELLO, Start, data_url, metric, post, starting

CONTEXT = 512


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="module")
def url(start: Start) -> str:
    return start("--slots", "4", "--context", str(CONTEXT), "--images", "2", "--queue", "16")[1]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model() -> Mllama:
    return mllama_jax.load(SHIPPED, dtype="float32")


GIF = "data:image/gif;base64,R0lGODlhAQABAAAAACw="

BOMB = Image.new("1", (15000, 15000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: not supported; known are "),
        ({"best_of": 2}, "best_of: not supported"),
        ({"response_format": {"type": "yaml"}}, "response_format.type: expected text, json_object or json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": 5}},
            "response_format.json_schema.schema: expected an object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "number", "minimum": "x"}}}},
            "response_format: ",
        ),
        ({"messages": "Hello"}, "messages: expected a list, got str"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "messages[0].role: expected system, user"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected a part of type 'text'"),
        ({"messages": []}, "messages: expected at least one message"),
        ({"n": 10**9, "temperature": 1}, "n: must be at most 128"),
        ({"max_tokens": -1}, "max_tokens: must be at least 1, got -1"),
        ({"max_tokens": "many"}, "max_tokens: must be an integer"),
        ({"max_tokens": CONTEXT}, f"exceed the {CONTEXT} positions of a slot"),
        ({"temperature": "hot"}, "temperature: must be a finite number, got"),
        ({"top_p": 7}, "top_p: must be at most 1"),
        ({"logit_bias": {"99999999": 1}}, "99999999"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected token ids for names, got '-1'"),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs true"),
        ({"stream": "yes"}, "stream: expected bool, got str"),
        ({"stop": [""]}, "stop: must have no empty text"),
        ({"stop_token_ids": [*range(17)]}, "stop_token_ids: must be at most 16 token ids, got 17"),
        ({"stop_token_ids": [*range(14)]}, "stop_token_ids: at most 13 beside the model's own, got 14"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids: must be a list of token ids, got ['a']"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: must be at most 20, got 21"),
        ({"n": 100, "temperature": 1}, "n: 1 times 100 answers exceed the 20 that may wait"),
        ({"image": data_url(Image.new("RGB", (9, 9)))}, "messages: 3 pictures exceed the 2 of a slot; show fewer"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]}, "tool_calls: expected list, got int"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "expected a function"),
        ({"tool_choice": "required"}, "tool_choice: expected 'auto' or 'none'"),
        ({"image": "data:image/png;base64,%%%"}, "image_url: not base64"),
        ({"image": GIF}, "image_url: expected data:image/jpeg|png|webp;base64"),
        ({"image": GIF.replace("gif", "png")}, "image_url: expected a JPEG, PNG or WebP picture"),
        ({"image": data_url(BOMB)}, "messages[0].content[0].image_url: picture of"),
        ({"image": data_url(BOMB)}, "expected a picture of at most"),
        ({"image": data_url(Image.new("RGB", (9, 9)))[:-40]}, "messages[0].content[0].image_url: picture of"),
        ({"image": "file:///etc/passwd"}, "image_url: expected a data URL or http(s)"),
        ({"image": "http://127.0.0.1/a.png"}, "pictures are not fetched from '127.0.0.1'; allowed are: none"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_named(url: str, change: dict[str, Any], message: str) -> None:
    if "image" in change:
        part = {"type": "image_url", "image_url": {"url": change["image"]}}
        change = {"messages": [{"role": "user", "content": [part] * (3 if "exceed" in message else 1)}]}
    status, told = post(url, "/v1/chat/completions", HELLO | change)
    assert status == 400
    assert message in told["error"]["message"]
    assert "\n" not in told["error"]["message"]
    assert not any(
        ours in told["error"]["message"] for ours in ("conversation", "max_new_tokens must", "stop_ids must")
    )


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
    asyncio.run(App(service).starlette()(scope, receive, send))
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


def test_a_prompt_as_long_as_a_slot_is_refused(url: str) -> None:
    status, told = post(url, "/v1/completions", {"prompt": [5] * CONTEXT})
    assert status == 400
    assert told["error"]["message"].startswith(f"{CONTEXT} prompt tokens ")
    assert post(url, "/v1/completions", {"prompt": [5] * (CONTEXT - 1), "max_tokens": 1})[0] == 200


def test_more_answers_than_may_wait_are_refused_before_any_is_made(url: str) -> None:
    began = time.monotonic()
    body = {"prompt": ["a"] * 50_000, "max_tokens": 1, "n": 100, "temperature": 1}
    status, told = post(url, "/v1/completions", body)
    assert (status, told["error"]["param"]) == (400, "n")
    assert time.monotonic() - began < 5


def test_hosts_of_pictures_that_say_nothing_stop_nobody_else(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Service(model, "it", slots=1, context=512, limits=Limits())
    answers = threading.Event()
    monkeypatch.setattr(service, "read_picture", lambda url, hosts=(): answers.wait(60) and b"")

    def asked(content: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}]}

    async def prepare() -> None:
        part = {"type": "image_url", "image_url": {"url": "http://silent/a.png"}}
        waiting = [
            asyncio.ensure_future(served.aside(served.understood, asked([part]))) for _ in range(2 * service.PREPARING)
        ]
        try:
            await asyncio.wait_for(served.aside(served.read_chat, asked("Hello"), 0.0), 30)
            assert not any(each.done() for each in waiting)
        finally:
            answers.set()
        await asyncio.gather(*waiting)

    asyncio.run(prepare())


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


@pytest.mark.parametrize("leaves", [False, True])
def test_events_end_by_their_own_fault_or_when_the_client_leaves(leaves: bool) -> None:
    ended: list[str] = []

    async def events() -> AsyncIterator[str]:
        try:
            yield "one"
            if not leaves:
                raise EngineFault("lost")
            await asyncio.Event().wait()
        finally:
            ended.append("events")

    async def receive() -> Any:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    async def respond() -> None:
        await asyncio.wait_for(EventStream(events())({"type": "http"}, receive, send), 10)

    if leaves:
        asyncio.run(respond())
    else:
        with pytest.raises(EngineFault, match="lost"):
            asyncio.run(respond())
    assert ended == ["events"]


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
        async for _ in worker.answer([Request.of(model.config, Prompt(row, []), answer)]):
            pass
        return answer.tokens

    async def everyone() -> list[Any]:
        return await asyncio.gather(*map(ask, rows), return_exceptions=True)

    *fine, fault = asyncio.run(everyone())
    worker.stop()
    assert fine == expected[:2]
    assert isinstance(fault, EngineFault)
