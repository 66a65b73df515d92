"""Requests to the engine: prompts whose pictures are prepared, and answers that grow."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mllama_jax.config import MllamaConfig, VisionConfig
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.batch import check_rows
from mllama_jax.generate.sampling import LOGPROBS_AT_MOST, SamplingParams, Settings
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import Prompt, image_spans
from mllama_jax.processing.image import open_image, split_tiles

AT_ONCE = 4  # files that are prepared in one moment


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as the device takes it: uint8 pixels [1, C, 3, P, P] and ratio id int32 [1].

    The digest is of both, so that equal ones look equal to the model.
    """

    digest: bytes
    pixels: np.ndarray
    ratio_id: np.ndarray

    @classmethod
    def of(cls, image: Image.Image, vision: VisionConfig) -> Picture:
        """Prepare a picture; the one that somebody, such as a slot, still holds where there is an equal one."""
        tiles, ratio_id = split_tiles(image, vision.tile, vision.max_tiles)
        pixels = np.ascontiguousarray(tiles)[None]
        if absent := vision.max_tiles - len(tiles):
            pixels = np.pad(pixels, ((0, 0), (0, absent), *((0, 0),) * 3))
        digest = hashlib.sha256(pixels.data)
        digest.update(bytes([ratio_id]))
        picture = cls(digest.digest(), pixels, np.array([ratio_id], np.int32))
        return _held.setdefault((picture.digest, vision), picture)

    @property
    def tiles(self) -> int:
        return TILES[int(self.ratio_id[0])]


_held: weakref.WeakValueDictionary[tuple[bytes, VisionConfig], Picture] = weakref.WeakValueDictionary()


class Pictures:
    """Prepares picture files, each once for as long as somebody, such as a slot, holds it prepared.

    Few at once: one may take 400 MB, and their threads would keep the engine's from Python's lock.
    """

    def __init__(self, vision: VisionConfig | None):
        self.vision, self._few = vision, threading.BoundedSemaphore(AT_ONCE)
        self._lock, self._prepared = threading.Lock(), weakref.WeakValueDictionary[bytes, Picture]()
        self._turns = weakref.WeakValueDictionary[bytes, threading.Lock]()

    def of(self, file: bytes) -> Picture:
        """Prepare a file, or wait until somebody else has. Raises InputError where it is no picture."""
        assert self.vision is not None
        key = hashlib.sha256(file).digest()
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            if (picture := self._prepared.get(key)) is None:
                with self._few:
                    picture = self._prepared[key] = Picture.of(open_image(file), self.vision)
            return picture


class Guide(Protocol):
    """Says what an answer may go on with."""

    def mask(self) -> np.ndarray:
        """bool [V], the tokens that may come next."""
        ...

    def take(self, token: int) -> None:
        """The answer goes on with this one."""
        ...


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its answer as it grows.

    Attributes:
        marks: the prompt's token ids, the pictures' digests in place of image tokens: equal marks, equal caches.
        spans: which positions see each picture.
        guide: what the answer is held to. While one is being decoded a dispatch makes one token.
    """

    prompt: Prompt
    answer: Answer
    marks: list[int | bytes]
    pictures: list[Picture]
    spans: list[tuple[int, int]]
    guide: Guide | None = None

    @property
    def tokens(self) -> list[int]:
        """The prompt's and the answer's."""
        return [*self.prompt.tokens, *self.answer.tokens]

    @property
    def tiles(self) -> int:
        """Of all pictures."""
        return sum(picture.tiles for picture in self.pictures)

    @classmethod
    def of(cls, config: MllamaConfig, prompt: Prompt[Any], answer: Answer, guide: Guide | None = None) -> Request:
        """Prepare a prompt, which takes a while where its pictures are not ready: they are Pictures or PIL images.

        Raises InputError where the model cannot read it.
        """
        check_rows(config, [prompt.tokens], [prompt.images], [answer.params.max_new_tokens])
        answer.params.check_ids(config.text.vocab)
        pictures = []
        for image in prompt.images:
            assert config.vision is not None
            pictures.append(image if isinstance(image, Picture) else Picture.of(image, config.vision))
        return cls.prepared(config, prompt, answer, pictures, guide)

    @classmethod
    def prepared(
        cls, config: MllamaConfig, prompt: Prompt, answer: Answer, pictures: list[Picture], guide: Guide | None
    ) -> Request:
        """From pictures that are ready; those of the prompt are not looked at."""
        digests = iter([picture.digest for picture in pictures])
        marks = [next(digests) if token == config.image_token else token for token in prompt.tokens]
        return cls(prompt, answer, marks, pictures, image_spans(prompt.tokens, config.image_token), guide)


# ---- In arrays ----------------------------------------------------------------------------------------------------

NEVER = -1e30  # the bias of a token that must not come
IDLE = Answer(SamplingParams(), (), None)


def settings_of(config: MllamaConfig, requests: Sequence[Request | None]) -> tuple[Settings, jax.Array | None, int]:
    """The settings of rows, of which some are idle; `counts_of` these; how many of the likeliest tokens to report.

    They are of two kinds, so that two programs do: where no row has a bias, a guide, a penalty or wants to hear of the
    likeliest tokens, nothing of all this; else all of it, zero for those who have none.
    """
    answers = [IDLE if each is None else each.answer for each in requests]
    prompts = [[] if each is None else each.prompt.tokens for each in requests]
    settings = Settings.of([each.params for each in answers], prompts, config.stops, config.text.vocab)
    settings = guided(settings, {row: each.guide for row, each in enumerate(requests) if each and each.guide})
    reported = any(each.params.logprobs for each in answers)
    if not reported and settings.bias is None and settings.in_prompt is None:
        return settings, None, 0
    shape = len(requests), config.text.vocab
    if settings.bias is None:
        settings = dataclasses.replace(settings, bias=jnp.zeros(shape))
    if settings.in_prompt is None:
        settings = dataclasses.replace(settings, in_prompt=jnp.zeros(shape, bool))
        return settings, jnp.zeros(shape, jnp.int32), LOGPROBS_AT_MOST
    return settings, counts_of(settings, answers), LOGPROBS_AT_MOST


def guided(settings: Settings, guides: Mapping[int, Guide]) -> Settings:
    """Settings in which rows may only go on as their guides let them."""
    if not guides:
        return settings
    masks = {row: guide.mask() for row, guide in guides.items()}
    shape = (len(settings.seed), *next(iter(masks.values())).shape)
    bias = np.zeros(shape, np.float32) if settings.bias is None else np.array(settings.bias)
    for row, mask in masks.items():
        bias[row, ~mask] = NEVER
    return dataclasses.replace(settings, bias=jax.device_put(bias))


def counts_of(settings: Settings, answers: Sequence[Answer]) -> jax.Array | None:
    """int32 [B, V], how often each token is in an answer; None where no row has a penalty."""
    if settings.in_prompt is None:
        return None
    counts = np.zeros(settings.in_prompt.shape, np.int32)
    for row, answer in zip(counts, answers, strict=True):
        np.add.at(row, answer.tokens, 1)
    return jax.device_put(counts)
