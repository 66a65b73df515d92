"""`mllama_jax.serve.throughput`: it measures what it says, and over HTTP answers are what the engine's are."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mllama_jax
from mllama_jax.serve import throughput
from mllama_jax.serve.service import Limits, Service


def test_everything_is_measured_beside_its_name(tiny_directory: Path) -> None:
    command = [sys.executable, "-m", "mllama_jax.serve.throughput", str(tiny_directory), "--rounds", "1", "--json"]
    command += ["--dtype", "bfloat16", "int8", "--cache", "int8"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    kinds = [
        "decode alone",
        *(f"{way}, {kind}" for kind in ("32 pictures", "one picture") for way in ("engine", "HTTP")),
    ]
    assert list(told["figures"]) == [f"{kind}, {dtype}" for dtype in ("bfloat16", "int8") for kind in kinds]
    assert all(figure.get("requests_per_second", 1) > 0 for figure in told["figures"].values())
    decode, engine = told["figures"]["decode alone, int8"], told["figures"]["engine, one picture, int8"]
    share = engine["tokens_per_second"] / decode["tokens_per_second"]
    assert told["ratios"]["engine, one picture, int8, of decode alone"] == pytest.approx(share)
    http = told["figures"]["HTTP, 32 pictures, bfloat16"]["requests_per_second"]
    share = http / told["figures"]["engine, 32 pictures, bfloat16"]["requests_per_second"]
    assert told["ratios"]["HTTP, 32 pictures, bfloat16, of the engine"] == pytest.approx(share)


def test_answers_over_http_are_the_engines(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "ROWS", 3)
    monkeypatch.setattr(throughput, "NEW", 60)
    model = mllama_jax.load(tiny_directory, dtype="float32")
    service = Service(model, "tiny", slots=3, context=256, limits=Limits())
    questions = throughput.Questions(service).round(2)
    assert len({question.picture for question in questions}) == 2
    with throughput.listening(service) as port:
        asked = [throughput.in_process(service, question) for question in questions]
        within = asyncio.run(throughput.together(asked))
        bodies = [throughput.request_body(question) for question in questions]
        with ThreadPoolExecutor() as clients:
            outside = throughput.over_http(clients, port, bodies)
    assert [answer.text for answer in outside.answers] == [answer.text for answer in within.answers]
    assert len({answer.text for answer in within.answers}) == 3
    for answer, question in zip(within.answers, questions, strict=True):
        assert [end for _, end in answer.pieces][-1] == answer.tokens == 60
        assert len(model.prompt(throughput.conversation(question)).tokens) == throughput.PROMPT
