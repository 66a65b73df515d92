"""`mllama serve` in four processes: what two do, answers that are held to a schema, and an end for all."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

import mllama_jax
from tests.served_together import HELLO, check_answers, endless, serving

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


def test_four_processes_answer_as_one(tiny_directory: Path, tmp_path: Path) -> None:
    """Any of them may be asked to end: open requests are answered, then all leave."""
    name = tiny_directory.name
    with serving(tiny_directory, tmp_path, 4) as (processes, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        with client, ThreadPoolExecutor(4) as pool:
            check_answers(client, mllama_jax.load(tiny_directory, dtype="float32"))

            def held(seed: int) -> Any:
                made = client.chat.completions.create(
                    model=name, messages=HELLO, temperature=2, seed=seed, max_tokens=60,
                    response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}},
                )  # fmt: skip
                return json.loads(made.choices[0].message.content or "")

            assert all(each in ({"n": 1}, {"n": 22}) for each in pool.map(held, range(4)))
            stream = endless(client, name, stream=True)
            next(stream)
            processes[2].send_signal(signal.SIGTERM)
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert [process.wait(60) for process in processes] == [0] * 4
