"""`Mllama`: a loaded model, asked in token ids or in conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.generate import decode
from mllama_jax.generate.batch import Rows, bucket, make_rows
from mllama_jax.generate.sampling import SamplingParams, Settings
from mllama_jax.model.cache import CrossCache
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.processing.chat import ChatTemplate, Prompt, encode_conversation
from mllama_jax.processing.image import preprocess
from mllama_jax.processing.tokenizer import TextStream, Tokenizer

Conversation = Sequence[Mapping[str, Any]]
Images = Sequence[Sequence[Image.Image]]

STEPS = 32  # tokens made in one dispatch
ENCODE_AT_ONCE = 8  # pictures encoded in one dispatch


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        tokens: its ids, the stop token included.
        logprobs: the log-probability of each of them.
        finish_reason: "stop" (a stop token) or "length" (max_new_tokens).
        prompt_tokens: how many ids were read.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int


@dataclasses.dataclass
class Mllama:
    """A model with its parameters on devices, and its tokenizer where the checkpoint has one.

    Rows are ragged: any lengths, any number of pictures. Methods that take tokens work without a tokenizer.
    """

    model: MllamaModel
    params: Params
    tokenizer: Tokenizer | None
    template: ChatTemplate
    directory: Path

    @property
    def config(self) -> MllamaConfig:
        return self.model.config

    # ---- in arrays ------------------------------------------------------------------------------------------------

    def encode_images(self, images: Images) -> np.ndarray:
        """Projected vision features, float32 [B, I, C, N, D]; zeros where a row has fewer than I pictures."""
        vision = self.config.vision
        if vision is None:
            raise InputError("this model is text-only and takes no pictures")
        shape = (vision.max_tiles, vision.tokens, self.config.text.width)
        out = np.zeros((len(images), max(map(len, images), default=0), *shape), np.float32)
        flat = [image for row in images for image in row]
        if flat:
            features = iter(np.asarray(self._encode(*preprocess(flat, vision)), np.float32))
            for b, row in enumerate(images):
                for i in range(len(row)):
                    out[b, i] = next(features)
        return out

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray, images: Images) -> np.ndarray:
        """Logits float32 [B, T, V] of every position of tokens int [B, T]."""
        rows, cross = self._prepare(_lists(tokens), images)
        logits = decode.all_logits(self.model, self.params, jnp.asarray(rows.tokens), cross)
        return np.asarray(logits)[:, : int(rows.lengths.max())]

    def intermediates(self, tokens: Sequence[Sequence[int]] | np.ndarray, images: Images) -> dict[str, np.ndarray]:
        """Every named intermediate, for comparison layer by layer.

        `vision/...` are [I, C, N, width] over the pictures of all rows in order, padding tokens left out; `text/...`
        are [B, T, D]. `text/layer_i` counts cross-attention layers too.
        """
        rows, cross = self._prepare(_lists(tokens), images)
        found = decode.text_intermediates(self.model, self.params, rows.tokens, cross)
        found = {name: value[:, : int(rows.lengths.max())] for name, value in found.items()}
        if rows.pixels is not None:
            found = decode.vision_intermediates(self.model, self.params, rows.pixels, rows.ratio_ids) | found
        return {name: np.asarray(value, np.float32) for name, value in found.items()}

    def generate_tokens(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, images: Images, **sampling: Any
    ) -> list[list[int]]:
        """Continue rows of ids; returns the new ids of each, a stop token included. Settings as in `SamplingParams`."""
        return [made for made, _ in self._complete(_lists(tokens), images, SamplingParams(**sampling))]

    # ---- in words -------------------------------------------------------------------------------------------------

    def generate(self, conversations: Sequence[Conversation], **sampling: Any) -> list[Completion]:
        """Answer conversations: lists of {"role", "content"} with parts {"type": "text" | "image", ...}.

        Settings as in `SamplingParams`. Raises InputError for a malformed conversation or setting.
        """
        params, prompts = SamplingParams(**sampling), [self.prompt(conversation) for conversation in conversations]
        made = self._complete([p.tokens for p in prompts], [p.images for p in prompts], params)
        return [
            self._completion(prompt, *tokens_logprobs, params)
            for prompt, tokens_logprobs in zip(prompts, made, strict=True)
        ]

    def stream(self, conversation: Conversation, **sampling: Any) -> Iterator[str]:
        """Answer one conversation piece by piece; a piece never ends inside a character."""
        params, prompt = SamplingParams(**sampling), self.prompt(conversation)
        text, stops = TextStream(self._tokenizer()), self._stops(params)
        for columns, _ in self._blocks([prompt.tokens], [prompt.images], params):
            piece = "".join(text.push(int(token)) for token in columns[0] if token not in stops)
            if piece:
                yield piece
        if rest := text.finish():
            yield rest

    def prompt(self, conversation: Conversation) -> Prompt:
        """The token ids and pictures that a conversation becomes."""
        return encode_conversation(conversation, self._tokenizer(), self.template)

    # ---- how ------------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{self.directory}: no tokenizer.json or tokenizer.model here; add one, or work in token ids"
            )
        return self.tokenizer

    def _completion(
        self, prompt: Prompt, tokens: list[int], logprobs: list[float], params: SamplingParams
    ) -> Completion:
        stopped = tokens[-1] in self._stops(params)
        text = self._tokenizer().decode(tokens[:-1] if stopped else tokens)
        return Completion(text, tokens, logprobs, "stop" if stopped else "length", len(prompt.tokens))

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        return self.config.stops if params.stop_ids is None else params.stop_ids

    def _encode(self, pixels: np.ndarray, ratio_ids: np.ndarray) -> jax.Array:
        """Projected features [I, C, N, D] of preprocessed pictures, a few at a time."""
        features = []
        for start in range(0, len(pixels), ENCODE_AT_ONCE):
            some, ids = pixels[start : start + ENCODE_AT_ONCE], ratio_ids[start : start + ENCODE_AT_ONCE]
            spare = bucket(len(some)) - len(some)
            some, ids = np.pad(some, ((0, spare), *((0, 0),) * 4)), np.pad(ids, (0, spare))
            features.append(decode.encode(self.model, self.params, some, ids)[: len(some) - spare])
        return jnp.concatenate(features)

    def _prepare(self, tokens: list[list[int]], images: Images, new_tokens: int = 0) -> tuple[Rows, CrossCache | None]:
        """Rows as arrays, and what their pictures leave in the cross-attention caches."""
        rows = make_rows(self.config, tokens, images, new_tokens)
        if rows.pixels is None:
            return rows, None
        features = self._encode(rows.pixels, rows.ratio_ids)
        spare = bucket(len(features)) - len(features)
        features = jnp.pad(features, ((0, spare), *((0, 0),) * 3))
        return rows, decode.keys_values(self.model, self.params, features, rows.tiles, rows.spans)

    def _blocks(
        self, tokens: list[list[int]], images: Images, params: SamplingParams
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """New tokens and their log-probabilities, [B, n] at a time, until every row is done."""
        rows, cross = self._prepare(tokens, images, params.max_new_tokens)
        settings = Settings.of([params] * len(tokens))
        stops = jnp.asarray(np.array([self._stops(params) or (-1,)] * len(tokens), np.int32))
        length = bucket(int(rows.lengths.max()) + params.max_new_tokens, 64)
        state, logprob = decode.prefill(
            self.model, self.params, rows.tokens, rows.lengths, cross, settings, stops, length=length
        )
        yield np.asarray(state.token)[:, None], np.asarray(logprob)[:, None]
        while not np.asarray(state.done).all():
            state, block, logprobs, made = decode.decode(
                self.model, self.params, state, cross, settings, stops, steps=STEPS
            )
            yield np.asarray(block)[:, : int(made)], np.asarray(logprobs)[:, : int(made)]

    def _complete(
        self, tokens: list[list[int]], images: Images, params: SamplingParams
    ) -> list[tuple[list[int], list[float]]]:
        """Each row's new tokens, up to and with its stop token, and their log-probabilities."""
        blocks = list(self._blocks(tokens, images, params))
        made = np.concatenate([block for block, _ in blocks], axis=1)
        logprobs = np.concatenate([logprob for _, logprob in blocks], axis=1)
        stops, answers = self._stops(params), []
        for row, row_logprobs in zip(made[:, : params.max_new_tokens].tolist(), logprobs.tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            answers.append((row[:end], row_logprobs[:end]))
        return answers


def _lists(tokens: Sequence[Sequence[int]] | np.ndarray) -> list[list[int]]:
    return [[int(token) for token in row] for row in tokens]
