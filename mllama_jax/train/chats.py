"""Chats with pictures in a JSON Lines file: one to learn from a line, or one with a better and a worse answer.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...],
     "images": ["photo.jpg", {"bytes": "base64"}]}
    {"prompt": [...], "chosen": [...], "rejected": [...], "images": [...]}

An image part shows its own `image` or `path`, or the next of the line's `images`: a path, relative to the file, or
bytes.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.processing.chat import ChatTemplate, encode_conversation
from mllama_jax.processing.tokenizer import Tokenizer
from mllama_jax.train.batch import IGNORED, Batch, Row, Shape, answer_labels, make_batch

TooLong = Literal["drop", "cut"]


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a line becomes rows.

    Attributes:
        rows: 1, or 2 where lines hold a chosen and a rejected answer.
        length: the most tokens of a row.
        too_long: whether a longer one is left out or cut behind; never is a picture cut off.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    config: MllamaConfig
    rows: int
    length: int
    too_long: TooLong

    def read(self, line: bytes, folder: Path) -> list[Row] | None:
        """A line's rows; None where it is too long. Raises InputError."""
        made = [self._row(messages, images, folder) for messages, images in self._conversations(line)]
        rows = [row for row in made if row is not None]
        return rows if len(rows) == len(made) else None

    def _conversations(self, line: bytes) -> list[tuple[list[Any], list[Any]]]:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"expected JSON, got an error at '{error}'") from None
        keys = ("messages",) if self.rows == 1 else ("chosen", "rejected")
        if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
            raise InputError(f"expected an object with a list of messages under {' and '.join(map(repr, keys))}")
        prompt, images = content.get("prompt", []) if self.rows == 2 else [], content.get("images") or []
        for name, value in (("prompt", prompt), ("images", images)):
            if not isinstance(value, list):
                raise InputError(f"{name}: expected a list, got {type(value).__name__}")
        return [([*prompt, *content[key]], images) for key in keys]

    def _row(self, messages: list[Any], images: list[Any], folder: Path) -> Row | None:
        following, sources = iter(images), []
        shown = [_with_pictures(message, following, sources, folder) for message in messages]
        if left := sum(1 for _ in following):
            parts = f"{len(images) - left} image parts without their own"
            raise InputError(f'images: {len(images)} pictures but {parts}; each needs one, {{"type": "image"}}')
        if sources and self.config.vision is None:
            raise InputError("shows a picture, and this model is text-only")
        tokens = encode_conversation(shown, self.tokenizer, self.template, add_generation_prompt=False).tokens
        labels = answer_labels(tokens, self.tokenizer)
        if all(label == IGNORED for label in labels):
            raise InputError("no answer to learn from; expected a message of the assistant's")
        if cut := len(tokens) > self.length:
            keep = slice(self.length if self.too_long == "cut" else 0)
            tokens, labels, left_out = tokens[keep], [*labels[keep][:-1], IGNORED], tokens[keep.stop :]
            if self.config.image_token in left_out or all(label == IGNORED for label in labels):
                return None
        return Row(tokens, labels, sources, cut)


_UNSEEN = Image.new("RGB", (1, 1))  # stands for a picture where only tokens are wanted


def _with_pictures(message: Any, following: Iterator[Any], sources: list[Path | bytes], folder: Path) -> Any:
    """A message whose image parts hold a picture that costs nothing; where the real ones are goes to `sources`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    content = []
    for part in message["content"]:
        if isinstance(part, Mapping) and part.get("type") == "image":
            own = (part[key] for key in ("image", "path") if part.get(key) is not None)
            source = next(itertools.chain(own, following), None)
            if source is None:
                raise InputError(
                    "an image part without a picture; give it an 'image' or a 'path', or the line more 'images'"
                )
            sources.append(_source(source, folder))
            part = {"type": "image", "image": _UNSEEN}
        content.append(part)
    return {**message, "content": content}


def _source(source: Any, folder: Path) -> Path | bytes:
    if isinstance(source, Mapping) and isinstance(source.get("bytes"), str):
        try:
            return base64.b64decode(source["bytes"], validate=True)
        except binascii.Error as error:
            raise InputError(f"picture: expected base64, got an error at '{error}'") from None
    if isinstance(source, Mapping):
        source = source.get("path")
    if not isinstance(source, str):
        raise InputError(f'picture: expected a path or {{"bytes": base64}}, got {type(source).__name__}')
    path = folder / source
    if not path.is_file():
        raise InputError(f"{str(path)!r}: no such file; expected a picture, check the path")
    return path


class Chats:
    """The lines of a file, in any order: where each begins, how long its rows are, how many pictures they show.

    Every line is read once here, its pictures not opened, so that what is wrong is told before training begins.

    Attributes:
        lines: int [n], numbers of the lines that are used, from 1.
        lengths, pictures: int [n], of the longest row and of the one with most pictures.
        dropped, cut: how many were too long.
        digest: of all bytes.
    """

    def __init__(self, path: str | os.PathLike[str], reader: Reader):
        self.path, self.reader = Path(path), reader
        if not self.path.is_file():
            raise InputError(f"{path}: no such file; expected chats in JSON Lines")
        found: list[tuple[int, int, int, int]] = []
        self.dropped = self.cut = 0
        digest = hashlib.sha256()
        with (
            open(self.path, "rb") as file,
            tqdm(
                total=self.path.stat().st_size, unit="B", unit_scale=True, desc=f"reading {path}", disable=None
            ) as bar,
        ):
            start = 0
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    rows = self._rows(line, number)
                    self.dropped += rows is None
                    if rows is not None:
                        self.cut += any(row.cut for row in rows)
                        tokens, pictures = (max(len(r.tokens) for r in rows), max(len(r.sources) for r in rows))
                        found.append((number, start, tokens, pictures))
                start += len(line)
                bar.update(len(line))
        if not found:
            raise InputError(
                f"{path}: nothing to learn from; {self.dropped} lines are longer than {reader.length} tokens"
                if self.dropped
                else f"{path}: no chats in it; expected one a line"
            )
        self.lines, self.starts, self.lengths, self.pictures = np.array(found, np.int64).T
        self.digest = digest.hexdigest()

    def _rows(self, line: bytes, number: int) -> list[Row] | None:
        try:
            return self.reader.read(line, self.path.parent)
        except InputError as error:
            raise InputError(f"{self.path}, line {number}: {error}") from None

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> list[tuple[Row, list[Image.Image]]]:
        """The rows of a line and their pictures."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            rows = self._rows(file.readline(), int(self.lines[i]))
        if rows is None:  # it was read whole before
            raise InputError(f"{self.path}, line {self.lines[i]}: has changed since the run began; start again")
        try:
            return [(row, row.images()) for row in rows]
        except InputError as error:
            raise InputError(f"{self.path}, line {self.lines[i]}: {error}") from None

    def batch(self, chats: Sequence[int], samples: int, shape: Shape) -> Batch:
        """These chats as a batch of so many, padded to `shape`."""
        rows = [row for chat in chats for row in self[chat]]
        return make_batch([*rows, *[None] * (samples * self.reader.rows - len(rows))], shape, self.reader.config)
