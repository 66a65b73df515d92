"""A conversation that keeps its caches: no picture is encoded twice, no shared beginning read twice."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.generate import decode
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.batch import bucket, check_rows
from mllama_jax.generate.decoding import Decoding
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.model.cache import CrossCache, KVCache
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.model.vision import TILES
from mllama_jax.processing.chat import Prompt, image_spans
from mllama_jax.processing.image import preprocess


class Chat:
    """One conversation of several turns.

    Attributes:
        messages: the turns so far, each {"role", "content"}.
    """

    def __init__(
        self,
        model: MllamaModel,
        params: Params,
        prompt: Callable[[Sequence[dict[str, Any]]], Prompt],
        start: Callable[[SamplingParams], Answer],
    ):
        """`prompt` makes token ids of messages, `start` an empty answer of settings."""
        self.messages: list[dict[str, Any]] = []
        self._model, self._params, self._prompt, self._start = model, params, prompt, start
        # What is in the cache from position 0 on: token ids, and the pictures' digests where these are image tokens.
        self._read: list[int | bytes] = []
        self._cache: tuple[KVCache, ...] = ()
        self._pictures: dict[bytes, tuple[KVCache, ...]] = {}

    @property
    def config(self) -> MllamaConfig:
        return self._model.config

    def say(self, content: str | list[dict[str, Any]], **settings: Any) -> Generator[str, None, None]:
        """Add a user's message and stream the answer; closed early, the conversation keeps what was said so far.

        Raises InputError and leaves the conversation as it was where the message or a setting cannot be used.
        """
        params = SamplingParams.of(settings)
        if params.n != 1:
            raise InputError(f"n must be 1 in a chat, got {params.n}")
        answer = self._start(params)
        user = {"role": "user", "content": content}
        prompt = self._prompt([*self.messages, user])
        check_rows(self.config, [prompt.tokens], [prompt.images], [answer.params.max_new_tokens])
        blocks = self._blocks(prompt, answer)
        first = next(blocks)  # whatever is refused is refused here, before the conversation changes
        self.messages.append(user)
        try:
            for block, columns in itertools.chain([first], blocks):
                if piece := answer.push(block, 0, columns):
                    yield piece
        finally:
            blocks.close()
            self.messages.append({"role": "assistant", "content": answer.text})

    def undo(self) -> bool:
        """Take the last question and its answer back; False where there is none."""
        there = bool(self.messages)
        del self.messages[-2:]
        return there

    def _blocks(self, prompt: Prompt, answer: Answer) -> Generator[tuple[decode.Made, int], None, None]:
        digests = iter([_digest(image) for image in prompt.images])
        wanted = [next(digests) if token == self.config.image_token else token for token in prompt.tokens]
        known = _common(wanted[:-1], self._read)
        new = prompt.tokens[known:]
        tokens = np.full((1, bucket(len(new), 16)), self.config.pad, np.int32)
        tokens[0, : len(new)] = new
        self._make_room(known + tokens.shape[1] + answer.params.max_new_tokens)
        decoding = Decoding(self._model, self._params, [answer], [prompt.tokens], self._cross(prompt))
        cache, self._cache, self._read = self._cache, (), []  # prefill takes the cache: none is left until it is back
        try:
            yield from decoding.blocks(tokens, np.array([known], np.int32), np.array([len(new)], np.int32), cache)
        finally:
            state = getattr(decoding, "state", None)
            if state is not None and not state.position.is_deleted():  # an interrupted dispatch may have taken it
                self._cache = state.cache
                self._read = [*wanted, *answer.tokens][: int(state.position[0])]

    def _make_room(self, length: int) -> None:
        """Let the cache hold `length` positions."""
        if not self._cache:
            self._cache = decode.new_cache(self._model, 1, bucket(length, 256))
        short = bucket(length, 256) - self._cache[0].k.shape[2]
        if short > 0:
            self._cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))), self._cache)

    def _cross(self, prompt: Prompt) -> CrossCache | None:
        """What the conversation's pictures leave in the cross-attention caches; only new ones are encoded."""
        if not prompt.images:
            return None
        vision, kept, spans = self.config.vision, [], []
        assert vision is not None
        for image, span in zip(prompt.images, image_spans(prompt.tokens, self.config.image_token), strict=True):
            layers = self._picture(image)
            kept.append(layers)
            spans += [span] * (layers[0].k.shape[2] // vision.padded_tokens)
        layers = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *kept)
        missing = bucket(len(spans)) - len(spans)  # tiles that nobody sees, for fewer programs
        width = missing * vision.padded_tokens
        layers = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, width), (0, 0))), layers)
        return CrossCache(layers, jnp.asarray([[*spans, *[(0, 0)] * missing]], jnp.int32), vision.tokens)

    def _picture(self, image: Image.Image) -> tuple[KVCache, ...]:
        """A picture's keys and values in each cross-attention layer, padding tiles left out."""
        key = _digest(image)
        if key not in self._pictures:
            assert self.config.vision is not None
            pixels, ratio_ids = preprocess([image], self.config.vision)
            features = decode.encode(self._model, self._params, pixels, ratio_ids)
            tiles = np.arange(TILES[ratio_ids[0]], dtype=np.int32)[None]
            spans = np.zeros((*tiles.shape, 2), np.int32)
            self._pictures[key] = decode.keys_values(self._model, self._params, features, tiles, spans).layers
        return self._pictures[key]


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).digest()


def _common(a: Sequence[int | bytes], b: Sequence[int | bytes]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
