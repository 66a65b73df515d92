"""`mllama serve` in several real processes on loopback, and what is asked of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from mllama_jax import Mllama
from tests.served import asked
from tests.test_processes import children, free_port

Server = tuple[list[subprocess.Popen[str]], str]  # its processes and its URL
ROOT = Path(__file__).parents[1]
HELLO: Any = [{"role": "user", "content": "Hello"}]


@contextmanager
def serving(directory: Path, logs: Path, processes: int, *options: str) -> Iterator[Server]:
    """The processes that serve a checkpoint, and their URL once it is ready; none is left behind."""
    coordinator, everyone = f"127.0.0.1:{free_port()}", []
    # The programs are run for moments only: compiled fast, not well.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "mllama_jax.cli", "serve", "--model", str(directory), "--port", "0"]
    command += ["--slots", "4", "--context", "512", "--images", "1", *options]
    try:
        for number in range(processes):
            with (logs / str(number)).open("w") as log:
                place = f"{coordinator},{number},{processes}"
                everyone.append(
                    subprocess.Popen(
                        [*command, "--join", place], stderr=log, text=True, cwd=ROOT,
                        env=env | {"XDG_CACHE_HOME": str(logs / "cache")},
                    )
                )  # fmt: skip
        while '"ready"' not in (told := (logs / "0").read_text()):
            assert all(process.poll() is None for process in everyone), told
            time.sleep(0.05)
        (url,) = re.findall(r'"url": "([^"]+)"', told)
        yield everyone, url
    finally:
        for process in everyone:
            for child in children(process):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()


def conversations() -> list[list[dict[str, Any]]]:
    """With and without pictures, one of which is shown twice."""
    red, wide = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (120, 40), "blue")
    shown = [[], [red], [wide], [red]]
    return [
        [{"role": "user", "content": [*({"type": "image", "image": each} for each in images), text(f"Question {i}?")]}]
        for i, images in enumerate(shown)
    ]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def check_answers(client: openai.OpenAI, model: Mllama) -> None:
    """Whole and streamed, all at once, likeliest or drawn, answers are those that one process gives each alone."""
    questions = conversations()
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}]
    expected = [
        each.text
        for setting in settings
        for each in model.generate(questions, max_new_tokens=12, stop_ids=(), **setting)
    ]

    def create(i: int, **more: Any) -> Any:
        return client.chat.completions.create(
            model=model.directory.name, messages=asked(questions[i % len(questions)]), max_tokens=12,
            extra_body={"ignore_eos": True}, **settings[i // len(questions)], **more,
        )  # fmt: skip

    def whole(i: int) -> str:
        return create(i).choices[0].message.content

    def streamed(i: int) -> str:
        return "".join(choice.delta.content or "" for chunk in create(i, stream=True) for choice in chunk.choices)

    with ThreadPoolExecutor(16) as pool:
        for way in (whole, streamed):
            assert list(pool.map(way, range(len(expected)))) == expected


def endless(client: openai.OpenAI, name: str, stream: bool) -> Any:
    """An answer that takes a while."""
    return client.chat.completions.create(
        model=name, messages=HELLO, max_tokens=400, stream=stream, extra_body={"ignore_eos": True}
    )
