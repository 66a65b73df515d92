"""Servers in processes of their own, of the checkpoint that ships, and what to ask them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from mllama_jax.train.pictures import FAMILIES, conversation, held_out

Start = Callable[..., tuple[subprocess.Popen[str], str]]
logs: dict[str, Path] = {}  # what the server at a URL said
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}


@contextmanager
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts `mllama serve` with options and gives its process and URL once it is ready."""
    started: list[subprocess.Popen[str]] = []
    home = tmp_path_factory.mktemp("cache")

    def start(*options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "mllama_jax.cli", "serve", "--port", "0", "--dtype", "float32", *options]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home), **environment}
        log = tmp_path_factory.mktemp("log") / "stderr"
        with log.open("w") as file:
            process = subprocess.Popen(command, stderr=file, text=True, env=env)
        started.append(process)
        while '"ready"' not in (told := log.read_text()):
            assert process.poll() is None, told
            time.sleep(0.1)
        (url,) = re.findall(r'"url": "([^"]+)"', told)
        logs[url] = log
        return process, url

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()


def compiled(url: str) -> list[str]:
    """The programs that a server with JAX_LOG_COMPILES=1 compiled after it was ready."""
    _, _, after = logs[url].read_text().partition('"ready"')
    return re.findall(r"Finished XLA compilation of (\S+)", after)


def post(url: str, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, headers)
    answer = connection.getresponse()
    told = answer.read()
    connection.close()
    return answer.status, json.loads(told) if told else None


def metric(url: str, name: str) -> float:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    (value,) = re.findall(rf"^{name} (\S+)$", text, re.M)
    return float(value)


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
