"""A conversation that keeps its caches: no picture is encoded twice, no shared beginning read twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mllama_jax.config import MllamaConfig
from mllama_jax.errors import InputError
from mllama_jax.generate.answer import Answer
from mllama_jax.generate.engine import Engine
from mllama_jax.generate.requests import Request
from mllama_jax.generate.sampling import SamplingParams
from mllama_jax.model.mllama import MllamaModel, Params
from mllama_jax.processing.chat import Prompt


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
        self._prompt, self._start = prompt, start
        self._engine = Engine(model, params, slots=1, context=model.config.text.context)

    @property
    def config(self) -> MllamaConfig:
        return self._engine.config

    def say(self, content: str | list[dict[str, Any]], **settings: Any) -> Generator[str, None, None]:
        """Add a user's message and stream the answer; closed early, the conversation keeps what was said so far.

        Raises InputError and leaves the conversation as it was where the message or a setting cannot be used.
        """
        params = SamplingParams.of(settings)
        if params.n != 1:
            raise InputError(f"n must be 1 in a chat, got {params.n}")
        answer, user = self._start(params), {"role": "user", "content": content}
        pieces = self._pieces(Request.of(self.config, self._prompt([*self.messages, user]), answer))
        first = next(pieces)  # whatever is refused is refused here, before the conversation changes
        self.messages.append(user)
        try:
            yield from filter(None, itertools.chain([first], pieces))
        finally:
            pieces.close()
            self.messages.append({"role": "assistant", "content": answer.text})

    def undo(self) -> bool:
        """Take the last question and its answer back; False where there is none."""
        there = bool(self.messages)
        del self.messages[-2:]
        return there

    def _pieces(self, request: Request) -> Generator[str, None, None]:
        self._engine.submit(request)
        try:
            while not request.answer.finish_reason:
                for _, piece in self._engine.step():
                    yield piece
        finally:
            self._engine.cancel(request)
