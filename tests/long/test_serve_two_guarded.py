"""Two processes with a guard in front, asked where answers look: they take turns on the devices as one does."""

from __future__ import annotations

import base64
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import mllama_jax
from mllama_jax.serve.replies import told_look
from tests.served import asked, post
from tests.served_together import HELLO, conversations, serving
from tests.steered import write_guard


def test_two_processes_judge_and_look_as_one(tiny_directory: Path, tmp_path: Path) -> None:
    """All of it at once, then an end for both."""
    model = mllama_jax.load(tiny_directory, dtype="float32")
    _, red, wide, _ = conversations()
    questions, answer = [red, wide] * 2, "top left"
    looks = [told_look(model.look(question, answer)) for question in questions]
    (hello,) = model.generate([HELLO], max_new_tokens=8, stop_ids=())
    with serving(tiny_directory, tmp_path, 2, "--guard", str(write_guard(tmp_path / "guard"))) as (processes, url):

        def chat(text: str) -> tuple[int, Any]:
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
            return post(url, "/v1/chat/completions", body | {"ignore_eos": True})

        def look(question: Any) -> tuple[int, Any]:
            return post(url, "/look", {"messages": [*asked(question), {"role": "assistant", "content": answer}]})

        with ThreadPoolExecutor(16) as pool:
            good, bad = ([pool.submit(chat, text) for _ in range(4)] for text in ("Hello", "Hello!"))
            looked = [pool.submit(look, question) for question in questions]
            for each in bad:
                status, told = each.result()
                assert (status, told["error"]["code"]) == (400, "content_filter")
            for each in good:
                status, told = each.result()
                assert status == 200
                verdict = told["choices"][0]
                assert verdict["message"]["content"] == hello.text or verdict["finish_reason"] == "content_filter"
            for each, expected in zip(looked, looks, strict=True):
                status, told = each.result()
                assert (status, told["words"]) == (200, expected["words"])
                for view, alone in zip(told["views"], expected["views"], strict=True):
                    heat, heat_alone = (np.frombuffer(base64.b64decode(x["heat"]), np.uint8) for x in (view, alone))
                    np.testing.assert_allclose(heat.astype(int), heat_alone, atol=1)  # they are rounded
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [0, 0]
