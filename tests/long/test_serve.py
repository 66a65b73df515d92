"""`mllama serve` where it takes long: clients that leave by the thousand, many at once, and a guard in front."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mllama_jax.cli import SHIPPED
from tests.served import Start, metric, post, starting
from tests.steered import write_guard

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starting(tmp_path_factory) as start:
        yield start


def test_a_thousand_clients_leave_and_every_slot_is_free(start: Start) -> None:
    _, url = start("--slots", "4", "--context", "512")
    body = json.dumps(HELLO | {"stream": True, "max_tokens": 400, "ignore_eos": True})

    def leave(_: int) -> int:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        answer.read(10)
        connection.close()
        return answer.status

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(leave, range(1000))) == {200}
    end = time.monotonic() + 30
    while metric(url, "mllama_num_requests_running") + metric(url, "mllama_num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert post(url, "/v1/chat/completions", HELLO)[0] == 200


def test_many_clients_at_once_get_what_is_asked_for() -> None:
    """Of 200 clients, in a tenth of the requests by which memory is judged."""
    done = run("mllama_jax.serve.measure", "--requests", "500")
    report = json.loads(done.stdout)
    assert (done.returncode, report["requests"], report["clients"], report["failed"]) == (0, 500, 200, 0)
    assert len(report["megabytes"]) == 20


def test_a_guard_in_front(start: Start, tmp_path: Path) -> None:
    guard = str(write_guard(tmp_path / "guard"))
    process, url = start("--slots", "1", "--context", "512", "--guard", guard)
    assert post(url, "/v1/chat/completions", HELLO)[0] == 200
    said = {"messages": [{"role": "user", "content": "Hello!"}]}
    status, told = post(url, "/v1/chat/completions", said)
    assert (status, told["error"]["code"]) == (400, "content_filter")
    process.terminate()
    assert process.wait(60) == 0


def test_what_is_no_guard_is_told_at_the_start() -> None:
    done = run("mllama_jax.cli", "serve", "--port", "0", "--guard", str(SHIPPED))
    assert done.returncode == 2
    assert "is the model Llama Guard 3?" in done.stderr.splitlines()[-1]
