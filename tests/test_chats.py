"""Chats of several turns: what is encoded and read is counted, and answers are those of the whole conversation anew."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import mllama_jax
from mllama_jax import Mllama, MllamaConfig
from mllama_jax.convert.export import write_hf
from mllama_jax.errors import InputError
from mllama_jax.generate import decode, slots
from mllama_jax.model.mllama import init_parameters
from mllama_jax.terminal import Terminal
from tests.conftest import SMALL

Draw = Callable[..., Image.Image]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": ()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many pictures each `encode`, and how many real tokens each `read`, was given by a chat."""
    counted: dict[str, list[int]] = {"encode": [], "prefill": []}
    encode, read = slots.encode, slots.read

    def count_encode(model: Any, params: Any, pixels: Any, ratio_ids: Any) -> Any:
        counted["encode"].append(len(pixels))
        return encode(model, params, pixels, ratio_ids)

    def count_read(*args: Any, **options: Any) -> Any:
        counted["prefill"] += (args[7] + 1).tolist()  # up to the last real token
        return read(*args, **options)

    monkeypatch.setattr(slots, "encode", count_encode)
    monkeypatch.setattr(slots, "read", count_read)
    return counted


def message(text: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    return [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]


def test_nothing_is_done_twice(small: Mllama, picture: Draw, calls: dict[str, list[int]]) -> None:
    chat = small.chat()
    turns = [message("What is it?", picture(1)), message("And where?"), message("This one?", picture(2, 120, 50))]
    read = 0
    for turn in turns:
        answer = "".join(chat.say(turn, **SETTINGS))
        history = [*chat.messages[:-1]]
        prompt = small.prompt(history)
        assert calls["prefill"][-1] <= len(prompt.tokens) - read
        read = len(prompt.tokens)
        made = list(calls["prefill"]), list(calls["encode"])
        assert small.generate([history], **SETTINGS)[0].text == answer
        calls["prefill"], calls["encode"] = list(made[0]), list(made[1])
    assert calls["encode"] == [1, 1]  # two pictures in three turns


def test_undo_and_ask_again(small: Mllama, picture: Draw) -> None:
    chat = small.chat()
    first = "".join(chat.say(message("What is it?", picture(1)), **SETTINGS))
    "".join(chat.say("And where?", **SETTINGS))
    assert chat.undo()
    again = "".join(chat.say("How many?", **SETTINGS))
    assert [each["role"] for each in chat.messages] == ["user", "assistant"] * 2
    assert small.generate([chat.messages[:-1]], **SETTINGS)[0].text == again
    assert chat.undo()
    assert chat.undo()
    assert not chat.undo()
    assert "".join(chat.say(message("What is it?", picture(1)), **SETTINGS)) == first


def test_another_picture_is_another_conversation(small: Mllama, picture: Draw) -> None:
    chat = small.chat()
    "".join(chat.say(message("What is it?", picture(1)), **SETTINGS))
    chat.undo()
    again = "".join(chat.say(message("What is it?", picture(2)), **SETTINGS))
    assert small.generate([chat.messages[:-1]], **SETTINGS)[0].text == again


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(small: Mllama, picture: Draw) -> None:
    chat = small.chat()
    answer = chat.say(message("What is it?", picture(1)), max_new_tokens=200, stop_ids=(), temperature=1.0)
    seen = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": seen}
    after = "".join(chat.say("Go on", **SETTINGS))
    assert small.generate([chat.messages[:-1]], **SETTINGS)[0].text == after


def test_a_refused_message_changes_nothing(small: Mllama) -> None:
    chat = small.chat()
    with pytest.raises(InputError, match="exceed the context of 512"):
        next(chat.say("word " * 600))
    with pytest.raises(InputError, match="temperature must be at least 0"):
        next(chat.say("Hello", temperature=-1.0))
    with pytest.raises(InputError, match="logit_bias must name ids below 768"):
        next(chat.say("Hello", logit_bias={5000: 1.0}))
    assert chat.messages == []


def talk(model: Mllama, lines: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[Terminal, str, str]:
    """Run a terminal that is given `lines`; exceptions among them are raised where the line would be read."""
    given = iter(lines)

    def read(prompt: str) -> str:
        line = next(given, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    terminal = Terminal(model.chat(), {"max_new_tokens": 12}, read)
    terminal.run()
    out, err = capsys.readouterr()
    return terminal, out, err


def test_terminal(small: Mllama, picture: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, saved = tmp_path / "photo.png", tmp_path / "chat.json"
    picture(1).save(photo)
    lines = [f"/image {photo}", "What is it?", KeyboardInterrupt(), "And where?", "/undo", f"/save {saved}", "/quit"]
    terminal, out, err = talk(small, lines, capsys)
    assert err == ""
    assert "ctrl-D leaves" in out
    assert len(terminal.chat.messages) == 2
    conversation = json.loads(saved.read_text())
    assert conversation[0]["content"][0] == {"type": "image", "image": str(photo)}
    (again,) = small.generate([conversation[:1]], max_new_tokens=12)
    assert again.text == conversation[1]["content"]


def test_terminal_mistakes_cost_one_line(small: Mllama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/image /nowhere.png", "/nonsense", "/save /nowhere/chat.json", "/save /", "/undo", "word " * 600, "/help"]
    terminal, out, err = talk(small, lines, capsys)
    assert len(err.splitlines()) == 5
    assert "nothing to take back" in out
    assert terminal.chat.messages == []


def interrupt_once(monkeypatch: pytest.MonkeyPatch, module: ModuleType, program: str) -> None:
    """Let ctrl-C meet the first call of one of the compiled programs."""
    original, interrupted = getattr(module, program), []

    def interrupt(*args: Any, **options: Any) -> Any:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, program, interrupt)


def test_ctrl_c_stops_the_answer(
    small: Mllama, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_once(monkeypatch, decode, "decode")
    terminal, _, _ = talk(small, ["Hello", "And now?"], capsys)
    assert [message["role"] for message in terminal.chat.messages] == ["user", "assistant"] * 2


def test_ctrl_c_before_the_first_token_keeps_the_picture(
    small: Mllama, picture: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_once(monkeypatch, slots, "read")
    picture(1).save(photo := tmp_path / "photo.png")
    terminal, out, _ = talk(small, [f"/image {photo}", "What is it?", "And now?"], capsys)
    assert "its pictures wait for the next" in out
    assert [part["type"] for part in terminal.chat.messages[0]["content"]] == ["image", "text"]
    assert len(terminal.chat.messages) == 2


def test_a_picture_that_waits_can_be_taken_back(
    small: Mllama, picture: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(1).save(photo := tmp_path / "photo.png")
    terminal, out, _ = talk(small, ["Hello", f"/image {photo}", "/undo", "And now?"], capsys)
    assert "stays out of the next question" in out
    assert [len(message["content"]) for message in terminal.chat.messages[::2]] == [1, 1]


def test_a_text_only_model_refuses_pictures(small_directory: Path, picture: Draw, tmp_path: Path) -> None:
    text = dataclasses.replace(SMALL.text, layers=4, cross_layers=(), extra_embeddings=0)
    params = jax.device_get(init_parameters(MllamaConfig(text, None), jax.random.key(0)))
    write_hf(tmp_path, params, dataclasses.replace(SMALL, text=text, vision=None), np.dtype("float32"))
    shutil.copy(small_directory / "tokenizer.json", tmp_path)
    chat = mllama_jax.load(tmp_path, dtype="float32").chat()
    "".join(chat.say("Hello", **SETTINGS))
    with pytest.raises(InputError, match="this model is text-only and takes no pictures"):
        next(chat.say(message("What is it?", picture(1)), **SETTINGS))
    assert len(chat.messages) == 2
