"""`mllama serve` in two processes is one server, whose answers are those of one process and whose end is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

import mllama_jax
from mllama_jax.processes import LOST
from tests.served import metric
from tests.served_together import Server, check_answers, endless, serving
from tests.test_processes import children


@pytest.fixture(scope="module")
def server(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_directory, tmp_path_factory.mktemp("server"), 2) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_answers_are_those_of_one_process(server: Server, client: openai.OpenAI, tiny_directory: Path) -> None:
    """Beside others that are given up in the middle."""
    leaving = [endless(client, tiny_directory.name, stream=True) for _ in range(3)]
    for each in leaving:
        next(each)
        each.close()
    check_answers(client, mllama_jax.load(tiny_directory, dtype="float32"))
    assert metric(server[1], "mllama_num_requests_running") == 0


def test_clients_are_told_of_a_lost_process(server: Server, client: openai.OpenAI, tiny_directory: Path) -> None:
    """Whether they hear a stream or wait; then the server leaves. The last test here, for they share the server."""
    first, second = server[0]
    told = "a process of this server failed; it starts again"
    stream = endless(client, tiny_directory.name, stream=True)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(endless, client, tiny_directory.name, stream=False)
        time.sleep(0.3)
        (lost,) = children(second)
        began = time.monotonic()
        os.kill(lost, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=told):
            list(stream)
        with pytest.raises(openai.InternalServerError, match=told):
            whole.result()
    assert first.wait(30) == LOST
    print(f"the server left {time.monotonic() - began:.1f} s after one of its processes was killed")
