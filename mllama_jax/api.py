"""`Mllama`: a loaded model, asked in token ids or in conversations."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mllama_jax.config import MllamaConfig
from mllama_jax.convert.store import BucketPath
from mllama_jax.errors import InputError
from mllama_jax.generate import decode
from mllama_jax.generate.answer import Answer, Completion
from mllama_jax.generate.batch import Rows, bucket, make_rows
from mllama_jax.generate.chat import Chat
from mllama_jax.generate.decode import Made
from mllama_jax.generate.decoding import blocks
from mllama_jax.generate.draft import Draft
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.generate.speculate import checked
from mllama_jax.look import Look, Question, words_of
from mllama_jax.model.cache import CrossCache
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.processing.chat import ChatTemplate, Prompt, Read, read_conversation
from mllama_jax.processing.guard import ANSWER, Verdict, guard_prompts, joined, read_verdict
from mllama_jax.processing.image import open_image, preprocess
from mllama_jax.processing.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
Images = Sequence[Sequence[Image.Image]]
Tools = Sequence[Mapping[str, Any]]

PICTURES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Mllama:
    """A model with its parameters on devices, and its tokenizer where the checkpoint has one.

    Rows are ragged: any lengths, any number of pictures. Methods that take tokens work without a tokenizer.
    """

    model: MllamaModel
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None
    template: ChatTemplate
    directory: Path | BucketPath

    @property
    def config(self) -> MllamaConfig:
        return self.model.config

    @property
    def groups(self) -> int:
        """Into how many groups of devices a mesh splits the rows of a batch."""
        return self._up(1, "batch")

    # ---- in arrays ------------------------------------------------------------------------------------------------

    def encode_images(self, images: Images) -> np.ndarray:
        """Projected vision features, float32 [B, I, C, N, D]; zeros where a row has fewer than I pictures."""
        vision = self.config.vision
        if vision is None:
            raise InputError("this model is text-only and takes no pictures")
        _check_pictures(images)
        shape = (vision.max_tiles, vision.tokens, self.config.text.width)
        out = np.zeros((len(images), max(map(len, images), default=0), *shape), np.float32)
        flat = [image for row in images for image in row]
        if flat:
            features = iter(np.asarray(decode.on_host(self._encode(*preprocess(flat, vision))), np.float32))
            for b, row in enumerate(images):
                for i in range(len(row)):
                    out[b, i] = next(features)
        return out

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray, images: Images) -> np.ndarray:
        """Logits float32 [B, T, V] of every position of tokens int [B, T]."""
        rows, cross = self._prepare(*_rows(tokens, images))
        logits = decode.all_logits(self.model, self.params, rows.tokens, cross)
        return decode.on_host(logits)[: len(tokens), : int(rows.lengths.max())]

    def following(self, tokens: Sequence[Sequence[int]], images: Images) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each ragged row of T ids what the model says of the ids that follow each other.

        Returns:
            the log-probability, float32 [T - 1], of each id after the first, and bool [T - 1] whether it is the
            likeliest.
        """
        rows, cross = self._prepare(*_rows(tokens, images))
        logprob, likeliest = decode.on_host(decode.following(self.model, self.params, rows.tokens, cross))
        lengths = rows.lengths[: len(tokens)]
        return [(logprob[b, : n - 1], likeliest[b, : n - 1]) for b, n in enumerate(lengths)]

    def intermediates(self, tokens: Sequence[Sequence[int]] | np.ndarray, images: Images) -> dict[str, np.ndarray]:
        """Every named intermediate, for comparison layer by layer.

        `vision/...` are [I, C, N, width] over the pictures of all rows in order, padding tokens left out; `text/...`
        are [B, T, D], `text/logits` [B, T, V]. `text/layer_i` counts cross-attention layers too; `vision/patch` stands
        before the class token, with N - 1 tokens.
        """
        rows, cross = self._prepare(*_rows(tokens, images))
        found = decode.text_intermediates(self.model, self.params, rows.tokens, cross)
        found = {name: value[: len(tokens), : int(rows.lengths.max())] for name, value in found.items()}
        if rows.pixels is not None:
            found = decode.vision_intermediates(self.model, self.params, rows.pixels, rows.ratio_ids) | found
        return {name: np.asarray(value, np.float32) for name, value in decode.on_host(found).items()}

    def generate_tokens(
        self, tokens: Sequence[Sequence[int]] | np.ndarray, images: Images, **settings: Any
    ) -> list[list[int]]:
        """Continue rows of ids; returns the new ids of each, a stop token included. Settings as in `SamplingParams`."""
        params = SamplingParams.of(settings)
        if params.n != 1:
            raise InputError(f"n must be 1 for rows of token ids, got {params.n}; repeat the rows")
        prompts = [Prompt(row, list(own)) for row, own in zip(*_rows(tokens, images), strict=True)]
        return [answer.tokens for answer in self._answers(prompts, [params] * len(prompts))]

    # ---- in words -------------------------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Sequence[Conversation],
        params: Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        lookup: int = 0,
        draft: Mllama | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Answer conversations: lists of {"role", "content"} with parts {"type": "text" | "image", ...}.

        Args:
            params: the settings of each conversation; or give `settings` for all, as in `SamplingParams`.
            tools: JSON schemas of functions that the model may call, for its chat template.
            lookup: how many tokens to guess at once from what is written already, 0 for none: faster where answers
                repeat the prompt or themselves. They are the same, sampled or not, up to the rounding of other shapes.
            draft: a smaller model of the same vocabulary, text-only or not, that guesses these `lookup` tokens instead.
                It does not see the pictures. Loaded on the model's mesh if there is one.

        Returns:
            the answers in order, `n` of them for each conversation.

        Raises:
            InputError: a conversation or setting is malformed.
        """
        _check_list("conversations", conversations)
        if params is not None and settings:
            raise InputError(f"give params or {', '.join(settings)}, not both")
        if params is None:
            params = [SamplingParams.of(settings)] * len(conversations)
        if not isinstance(params, list | tuple) or not all(isinstance(each, SamplingParams) for each in params):
            raise InputError("params must be a list, one SamplingParams for each conversation")
        if len(params) != len(conversations):
            raise InputError(f"params must be as many as conversations, got {len(params)} and {len(conversations)}")
        prompts = [self.prompt(conversation, tools) for conversation in conversations]
        return self.complete(prompts, params, lookup, draft)

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        lookup: int = 0,
        draft: Mllama | None = None,
    ) -> list[Completion]:
        """As `generate`, of conversations that `prompt` has read, or prompts of one's own."""
        each = [(prompt, one) for prompt, all_n in zip(prompts, params, strict=True) for one in all_n.each()]
        own_prompts, own_params = [prompt for prompt, _ in each], [one for _, one in each]
        answers = self._answers(own_prompts, own_params, self._tokenizer(), lookup, draft)
        return [answer.completion(len(prompt.tokens)) for answer, (prompt, _) in zip(answers, each, strict=True)]

    def stream(
        self,
        conversation: Conversation,
        *,
        tools: Tools | None = None,
        lookup: int = 0,
        draft: Mllama | None = None,
        **settings: Any,
    ) -> Generator[str, None, None]:
        """Answer one conversation piece by piece; a piece never ends inside a character or a stop text.

        Closing the iterator ends the work, but for a block that is under way. `lookup` and `draft` as in `generate`.
        """
        params, prompt = SamplingParams.of(settings), self.prompt(conversation, tools)
        if params.n != 1:
            raise InputError(f"n must be 1 to stream, got {params.n}")
        (answer,) = self._start([params], self._tokenizer())
        blocks = self._blocks([prompt], [answer], *self._guesses(lookup, draft))
        return (piece for block, (columns, *_) in blocks if (piece := answer.push(block, 0, columns)))

    def chat(self, *, tools: Tools | None = None) -> Chat:
        """A conversation of several turns that keeps its caches."""
        tokenizer = self._tokenizer()
        if self.groups > 1:
            raise InputError(
                f"a chat is one row and the mesh splits rows in {self.groups}; load it on a mesh that does not"
            )
        prompt = functools.partial(self.prompt, tools=tools)
        return Chat(self.model, self.params, prompt, lambda params: self._start([params], tokenizer)[0])

    def moderate(self, conversation: Conversation) -> Verdict:
        """What this model, a Llama Guard 3 11B Vision, says of the last turn of a conversation: the user's, or the
        assistant's answer where it ends with one. It sees one picture at a time; unsafe with one is unsafe.

        Raises:
            InputError: the conversation is malformed, or (NoVerdict) the model says neither safe nor unsafe.
        """
        prompts = guard_prompts(conversation, self._tokenizer(), open_image)
        answers = self.complete(prompts, [SamplingParams(max_new_tokens=ANSWER)] * len(prompts))
        return joined(read_verdict(each.text, whole=each.finish_reason == "stop") for each in answers)

    def look(self, conversation: Conversation, answer: str, *, tools: Tools | None = None) -> Look:
        """Where on the conversation's pictures the words of this answer to it look.

        A word's heat is the cross-attention, the mean over layers and heads, at the places that make its tokens: each
        one before the token.

        Raises:
            InputError: there is no picture in the conversation or no word in the answer.
        """
        question = self.looking(conversation, answer, tools)
        return question.answered(self.attention(question.rows))

    def looking(self, conversation: Conversation, answer: str, tools: Tools | None = None) -> Question:
        """What `look` asks the model by `attention`."""
        if not isinstance(answer, str):
            raise InputError(f"answer: expected text, got {type(answer).__name__}")
        prompt, tokenizer, vision = self.prompt(conversation, tools), self._tokenizer(), self.config.vision
        tokens = tokenizer.encode(answer, specials=False)
        words = words_of(tokens, tokenizer)
        if vision is None or not prompt.images:
            raise InputError("the conversation shows no picture to look at; give it one")
        if not words:
            raise InputError("the answer has no words, so there is nothing to show")
        rows, first = self._batch([prompt.tokens + tokens], [prompt.images]), len(prompt.tokens) - 1
        return Question(rows, [(word, [first + n for n in places]) for word, places in words], prompt.images, vision)

    def attention(self, rows: Rows) -> np.ndarray:
        """How the first row's attention is spread over its tiles, the mean over layers and heads: float32 [T, M, N]."""
        cross = self._cross(rows)
        assert cross is not None
        return decode.on_host(decode.attention_to_tiles(self.model, self.params, rows.tokens, cross))[0]

    def prompt(self, conversation: Conversation, tools: Tools | None = None) -> Prompt[Image.Image]:
        """The token ids and pictures that a conversation becomes."""
        return self.read(conversation, tools).opened(open_image)

    def read(self, conversation: Conversation, tools: Tools | None = None) -> Read:
        """The token ids that a conversation becomes, and its pictures as they were given."""
        tokenizer = self._tokenizer()
        if self.config.vision is None and any(
            isinstance(message, Mapping) and isinstance(parts := message.get("content"), list) and _shows(parts)
            for message in conversation
        ):
            raise InputError("this model is text-only and takes no pictures")
        return read_conversation(conversation, tokenizer, self.template, tools=tools)

    # ---- how ------------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{self.directory}: no tokenizer.json or tokenizer.model here; add one, or work in token ids"
            )
        return self.tokenizer

    def _encode(self, pixels: np.ndarray, ratio_ids: np.ndarray) -> jax.Array:
        """Projected features [I, C, N, D] of preprocessed pictures, a few at a time."""
        features = []
        for start in range(0, len(pixels), PICTURES_AT_ONCE):
            some, ids = (each[start : start + PICTURES_AT_ONCE] for each in (pixels, ratio_ids))
            spare = self._up(bucket(len(some)), "images") - len(some)
            some, ids = np.pad(some, ((0, spare), *((0, 0),) * 4)), np.pad(ids, (0, spare))
            features.append(decode.encode(self.model, self.params, some, ids)[: len(some) - spare])
        return jnp.concatenate(features)

    def _prepare(
        self, tokens: list[list[int]], images: Images, new_tokens: Sequence[int] = ()
    ) -> tuple[Rows, CrossCache | None]:
        """Rows as arrays, and what pictures leave in the image caches."""
        rows = self._batch(tokens, images, new_tokens)
        return rows, self._cross(rows)

    def _batch(self, tokens: list[list[int]], images: Images, new_tokens: Sequence[int] = ()) -> Rows:
        """Rows as arrays, idle ones added where a mesh asks for it."""
        idle = self._up(len(tokens), "batch") - len(tokens)
        return make_rows(self.config, [*tokens, *[[self.config.pad]] * idle], [*images, *[[]] * idle], new_tokens)

    def _cross(self, rows: Rows) -> CrossCache | None:
        """What the rows' pictures leave in the image caches; None where there are none."""
        if rows.pixels is None:
            return None
        features = self._encode(rows.pixels, rows.ratio_ids)
        spare = bucket(len(features)) - len(features)
        features = jnp.pad(features, ((0, spare), *((0, 0),) * 3))
        return decode.keys_values(self.model, self.params, features, rows.tiles, rows.spans)

    def _answers(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        tokenizer: Tokenizer | None = None,
        lookup: int = 0,
        draft: Mllama | None = None,
    ) -> list[Answer]:
        """Each prompt's finished answer; text only with a tokenizer."""
        answers, guesses = self._start(params, tokenizer), self._guesses(lookup, draft)
        for block, columns in self._blocks(prompts, answers, *guesses):
            for row, answer in enumerate(answers):
                answer.push(block, row, columns[row])
        return answers

    def _start(self, params: Sequence[SamplingParams], tokenizer: Tokenizer | None) -> list[Answer]:
        if tokenizer is None and any(each.stop for each in params):
            tokenizer = self._tokenizer()
        return [
            Answer(each, self.config.stops if each.stop_ids is None else each.stop_ids, tokenizer) for each in params
        ]

    def _guesses(self, lookup: int, draft: Mllama | None) -> tuple[int, Draft | None]:
        """How many tokens to guess at once, and who guesses."""
        if draft is not None and not isinstance(draft, Mllama):
            raise InputError(f"draft: expected a loaded model, got {type(draft).__name__}; load it first")
        k = checked(lookup, draft)
        return k, None if draft is None else Draft.of(self.model, draft.model, draft.params)

    def _blocks(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], lookup: int = 0, draft: Draft | None = None
    ) -> Iterator[tuple[Made, Sequence[int]]]:
        """Blocks of new tokens on the host and how many columns each row made of them, until all have ended."""
        limits = [answer.params.max_new_tokens for answer in answers]
        tokens = [prompt.tokens for prompt in prompts]
        spare = self._up(len(tokens), "batch") - len(tokens)
        rows, cross = self._prepare(tokens, [prompt.images for prompt in prompts], [*limits, *[1] * spare])
        idle = [Answer(SamplingParams(max_new_tokens=1), (), None) for _ in range(spare)]
        length = bucket(rows.tokens.shape[1] + max(limits) + lookup, 64)
        cache = decode.new_cache(self.model, len(rows.tokens), length)
        everyone, texts = [*answers, *idle], [*tokens, *[[]] * spare]
        for block, columns in blocks(
            self.model, self.params, everyone, texts, (rows.tokens, rows.lengths), cache, cross, lookup, draft
        ):
            for row, answer in enumerate(idle, start=len(tokens)):
                answer.push(block, row, columns[row])
            yield block, columns

    def _up(self, n: int, axis: str) -> int:
        """`n` rounded up such that a mesh divides an axis of this logical name."""
        return n + -n % self.model.constrain.parts(axis)


def _shows(parts: Sequence[Any]) -> bool:
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _check_list(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple | np.ndarray):
        raise InputError(f"{name}: expected a list, got {type(value).__name__}")


def _check_pictures(images: Images) -> None:
    _check_list("images", images)
    for i, row in enumerate(images):
        _check_list(f"images[{i}]", row)
        for image in row:
            if not isinstance(image, Image.Image):
                raise InputError(f"row {i}: images must be PIL images, got {type(image).__name__}")


def _rows(tokens: Sequence[Sequence[int]] | np.ndarray, images: Images) -> tuple[list[list[int]], Images]:
    _check_list("tokens", tokens)
    _check_pictures(images)
    if len(tokens) != len(images):
        raise InputError(
            f"{len(tokens)} rows of tokens but {len(images)} rows of images; give one list of images a row"
        )
    try:
        return [[operator.index(token) for token in row] for row in tokens], images
    except TypeError:
        raise InputError("tokens must be rows of integers") from None
