"""Dialogues about pictures that are drawn when they are wanted: chats to learn from that no disk has to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from mllama_jax.errors import InputError
from mllama_jax.processing.chat import encode_conversation
from mllama_jax.train.batch import IGNORED, Batch, Row, Shape, answer_labels, make_batch
from mllama_jax.train.chats import Reader
from mllama_jax.train.pictures.dialogue import dialogue
from mllama_jax.train.pictures.example import Example, conversation
from mllama_jax.train.pictures.labels import CLASSES, patch_labels
from mllama_jax.train.pictures.stream import sample, training_seed
from mllama_jax.train.recipe import Pictures


@struct.dataclass
class PictureBatch(Batch):
    """A batch that also tells what lies at each patch of its pictures.

    Attributes:
        patches: int8 [I, C, N - 1, aspects], the classes of `patch_labels`.
    """

    patches: jax.Array | np.ndarray


class Drawings:
    """So many dialogues, each about new pictures of the training split; a dialogue is a function of seed and number.

    Attributes:
        lines, lengths, pictures, dropped, cut, path, digest: as those of `Chats`; all rows are as long as a row may be.
    """

    path = "drawn pictures"
    dropped = cut = 0

    def __init__(self, pictures: Pictures, n: int, seed: int, reader: Reader):
        self.reader, self.seed = reader, seed
        self.families = pictures.families()
        self.lines = np.arange(1, n + 1)
        self.lengths = np.full(n, reader.length)
        self.pictures = np.full(n, 2 if "pairs" in self.families else 1)
        self.digest = f"{pictures}, seed {seed}"

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[Row, Example]:
        """A dialogue's row and an example that has its pictures."""
        rng = np.random.default_rng(training_seed(self.seed, i))
        asked = dialogue(sample(self.families[i % len(self.families)], rng), rng)
        tokens = self._tokens(asked)
        return Row(tokens, answer_labels(tokens, self.reader.tokenizer), []), asked[0]

    def _tokens(self, asked: Sequence[Example]) -> list[int]:
        """The ids of a conversation, without the last questions where the row is too short for them."""
        if not asked:
            raise InputError(f"length: expected room for a question, 128 tokens, got {self.reader.length}")
        messages = conversation(asked[0])
        for example in asked[1:]:
            messages.append({"role": "user", "content": example.question})
            messages.append({"role": "assistant", "content": example.answer})
        encoded = encode_conversation(
            messages, self.reader.tokenizer, self.reader.template, add_generation_prompt=False
        )
        return encoded.tokens if len(encoded.tokens) <= self.reader.length else self._tokens(asked[:-1])

    def batch(self, chats: Sequence[int], samples: int, shape: Shape) -> PictureBatch:
        """These dialogues as a batch of so many, padded to `shape`."""
        config = self.reader.config
        vision = config.vision
        if vision is None:
            raise InputError("pictures: this model is text-only; expected one that sees")
        drawn = [self[chat] for chat in chats]
        rows = [(row, list(example.images)) for row, example in drawn]
        batch = make_batch([*rows, *[None] * (samples - len(rows))], shape, config)
        patches = np.full(
            (samples, shape.pictures, vision.max_tiles, vision.tokens - 1, len(CLASSES)), IGNORED, np.int8
        )
        for b, (_, example) in enumerate(drawn):
            for i in range(len(example.images)):
                patches[b, i] = patch_labels(example, i, vision)
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return PictureBatch(**fields, patches=patches.reshape(-1, *patches.shape[2:]))
