"""`mllama chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllama_jax.errors import InputError
from mllama_jax.generate.chat import Chat
from mllama_jax.processing.image import open_image

HELP = """\
/image FILE   show a picture with the next question
/undo         take the last picture, or question and answer, back
/save FILE    write the conversation to a JSON file
/help         this list
/quit         leave (as does ctrl-D); ctrl-C stops an answer"""


class Terminal:
    """Reads lines, talks to a Chat, and prints; a mistake costs one line, never the conversation."""

    def __init__(self, chat: Chat, sampling: dict[str, Any], read: Callable[[str], str] = input):
        self.chat, self.sampling, self.read = chat, sampling, read
        self.shown: list[dict[str, Any]] = []  # pictures for the next question

    def run(self) -> None:
        print("Ask away; /help lists commands.")
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or ctrl-D leaves")
                continue
            if line == "/quit":
                return
            try:
                self._take(line)
            except InputError as error:
                print(error, file=sys.stderr)

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/image" and argument:
            if self.chat.config.vision is None:
                raise InputError("this model is text-only and takes no pictures")
            self.shown.append({"type": "image", "image": open_image(argument), "path": argument})
            print(f"{argument} goes with the next question")
        elif line == "/undo":
            self._undo()
        elif command == "/save" and argument:
            self._save(Path(argument))
        elif command == "/help":
            print(HELP)
        elif line.startswith("/"):
            raise InputError(f"{line}: not a command; /help lists them")
        elif line:
            self._ask(line)

    def _undo(self) -> None:
        if self.shown:
            print(f"{self.shown.pop()['path']} stays out of the next question")
        else:
            print("taken back" if self.chat.undo() else "there is nothing to take back")

    def _ask(self, line: str) -> None:
        before = len(self.chat.messages)
        answer = self.chat.say([*self.shown, {"type": "text", "text": line}], **self.sampling)
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="")
        finally:
            answer.close()
        print()
        if len(self.chat.messages) > before:
            self.shown = []
        else:
            print("stopped before it was read: the question is not in the conversation, its pictures wait for the next")

    def _save(self, path: Path) -> None:
        def plain(part: dict[str, Any]) -> dict[str, Any]:
            return {"type": "image", "image": part["path"]} if part["type"] == "image" else part

        messages = [
            message | {"content": [plain(part) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in self.chat.messages
        ]
        if path.is_dir() or not path.name:
            raise InputError(f"{path}: expected the name of a file, got a folder; add one")
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}; choose another place") from None
        print(f"{len(messages)} messages in {path}")
